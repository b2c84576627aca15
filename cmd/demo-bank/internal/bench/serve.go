package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"sync/atomic"
	"time"
)

// The serving process reads orders from its standard input, one JSON object after another, and
// writes a reply to each on its standard output. It ends when the input does, so it never outlives
// the process that started it.

// order is one order to the serving process.
type order struct {
	Set   *setting `json:"set,omitempty"`   // serve this from now on
	Stats bool     `json:"stats,omitempty"` // collect garbage if Begin is set, and count
	Begin bool     `json:"begin,omitempty"`

	Consume *consume `json:"consume,omitempty"` // consume messages
}

// reply is the result of an order.
type reply struct {
	Address string `json:"address,omitempty"`
	Stats   stats  `json:"stats"`

	Consumed consumed `json:"consumed"`
	Error    string   `json:"error,omitempty"`
}

// stats are the serving process's counts so far. The peaks count from the last order for stats.
type stats struct {
	CPU         time.Duration `json:"cpu_ns"` // 0 if unknown
	Allocations uint64        `json:"allocations"`
	RoundTrips  int64         `json:"round_trips"`
	BusyMax     int64         `json:"busy_max"`
	Runs        int64         `json:"runs"`
	HeldMax     int           `json:"held_max"`
}

const shutdownTimeout = 5 * time.Second

// Serve is the serving process: it reads orders from in and writes replies to out until in or ctx
// ends.
func Serve(ctx context.Context, in io.Reader, out io.Writer) (err error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	p := &serving{address: listener.Addr().String()}
	server := &http.Server{Handler: p, ReadHeaderTimeout: connectTimeout}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
		defer cancel()
		if server.Shutdown(ctx) != nil {
			_ = server.Close() // a client that still waits for an answer has gone
		}
		<-served
		if d := p.stand.Load(); d != nil {
			d.close()
		}
	}()
	decoder, encoder := json.NewDecoder(in), json.NewEncoder(out)
	for {
		var o order
		if err := decoder.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read an order: %w", err)
		}
		if err := encoder.Encode(p.obey(ctx, o)); err != nil {
			return fmt.Errorf("answer an order: %w", err)
		}
	}
}

// serving is the serving process: one stand after another.
type serving struct {
	address string
	wire    wire
	stand   atomic.Pointer[stand]
}

func (p *serving) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if d := p.stand.Load(); d != nil {
		d.router.ServeHTTP(w, r)
		return
	}
	http.NotFound(w, r)
}

// obey carries out one order.
func (p *serving) obey(ctx context.Context, o order) reply {
	r := reply{Address: p.address}
	if o.Set != nil {
		if d := p.stand.Swap(nil); d != nil {
			d.close()
		}
		d, err := newStand(ctx, *o.Set, &p.wire)
		if err != nil {
			r.Error = err.Error()
			return r
		}
		p.stand.Store(d)
	}
	if o.Consume != nil {
		var err error
		if d := p.stand.Load(); d == nil || d.messages == nil {
			err = errors.New("nothing consumes messages")
		} else {
			r.Consumed, err = d.messages.consume(ctx, o.Consume)
		}
		if err != nil {
			r.Error = err.Error()
			return r
		}
	}
	if o.Begin {
		runtime.GC() // the garbage of another design must not count here
	}
	if o.Stats {
		r.Stats = p.count()
	}
	return r
}

func (p *serving) count() stats {
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	s := stats{
		CPU: ownCPU(), Allocations: memory.Mallocs, RoundTrips: p.wire.roundTrips.Load(),
		BusyMax: p.wire.busyMax.Swap(p.wire.busy.Load()),
	}
	if d := p.stand.Load(); d != nil {
		s.Runs, s.HeldMax = d.runs.Load(), d.holders.take()
	}
	return s
}
