package pgfault

import (
	"net"
	"time"
)

// pieces is the number of writes per second over which a limited rate is spread.
const pieces = 20

// forward writes a chunk with the current latency, rate and pauses.
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

// sleep sleeps for d, or until the conn is cut.
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

// resumed blocks while the proxy is paused.
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
