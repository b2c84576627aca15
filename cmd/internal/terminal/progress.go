package terminal

import (
	"fmt"
	"io"
	"sync"
	"time"
)

const (
	intervalTerminal = 200 * time.Millisecond
	intervalPlain    = 10 * time.Second
)

// ShowProgress writes the result of text again and again, until end is called. At a terminal it
// rewrites one line. Elsewhere it writes a line every ten seconds that begins with name, the
// command's name. It calls text from its own goroutine. If w is nil it writes nothing.
func ShowProgress(w io.Writer, terminal bool, name string, text func() string) (end func()) {
	if w == nil {
		return func() {}
	}
	stop := make(chan struct{})
	var group sync.WaitGroup
	group.Go(func() {
		interval, before, after := intervalPlain, name+": ", "\n"
		if terminal {
			interval, before, after = intervalTerminal, "\r\x1b[K", ""
		}
		tick := time.NewTicker(interval)
		defer tick.Stop()
		for {
			// A terminal that is gone is no reason to stop.
			_, _ = fmt.Fprint(w, before, text(), after)
			select {
			case <-tick.C:
			case <-stop:
				if terminal {
					_, _ = fmt.Fprint(w, "\r\x1b[K")
				}
				return
			}
		}
	})
	return sync.OnceFunc(func() {
		close(stop)
		group.Wait()
	})
}
