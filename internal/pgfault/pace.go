package pgfault

import (
	"net"
	"time"
)

// pieces is how many writes a second a limited rate is spread over.
const pieces = 20

// forward writes a chunk with the latency, the rate and the pauses that are set.
func (c *connection) forward(to net.Conn, chunk []byte) error {
	if err := c.sleep(time.Duration(c.proxy.latency.Load())); err != nil {
		return err
	}
	for len(chunk) > 0 {
		piece := chunk
		rate := int(c.proxy.rate.Load())
		if rate > 0 {
			piece = chunk[:min(len(chunk), max(rate/pieces, 1))]
			if err := c.sleep(time.Duration(len(piece)) * time.Second / time.Duration(rate)); err != nil {
				return err
			}
		}
		if err := c.resumed(); err != nil {
			return err
		}
		if _, err := to.Write(piece); err != nil {
			return err
		}
		chunk = chunk[len(piece):]
	}
	return nil
}

// sleep sleeps unless the connection is cut.
func (c *connection) sleep(d time.Duration) error {
	if d <= 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-c.ctx.Done():
		return c.ctx.Err()
	}
}

// resumed returns when the proxy is not paused.
func (c *connection) resumed() error {
	for {
		resume := c.proxy.pause()
		if resume == nil {
			return c.ctx.Err()
		}
		select {
		case <-resume:
		case <-c.ctx.Done():
			return c.ctx.Err()
		}
	}
}
