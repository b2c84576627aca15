// Package deadline has a context for work that is bounded only by time. It costs one allocation
// until its Done is called. context.WithTimeout costs a timer, its closures and a channel each
// time, and a request has three such sections.
package deadline

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"
)

// Context ends at its deadline, or when its maker calls End, and for no other reason. It has the
// values of its parent, but does not end with it. So until its maker ends it, only time can end it:
// code that uses it may set the deadline of a socket, for example, and need not wait for Done.
//
// It is safe for concurrent use. Make it with [After], or as a field with Start; end it with End.
type Context struct {
	context.Context // its values

	at time.Time

	mu   sync.Mutex
	done chan struct{} // nil until Done is called
	// For done. It is not reused: a timer made in a synctest bubble belongs to that bubble.
	timer *time.Timer
	err   error
}

// After returns a context that ends after the timeout. Its parent must never end, such as a
// context.WithoutCancel: its values are passed on unchanged.
func After(parent context.Context, timeout time.Duration) *Context {
	c := new(Context)
	c.Start(parent, timeout)
	return c
}

// Start initializes a zero Context like one from After. It must be called once, before any other
// method.
func (c *Context) Start(parent context.Context, timeout time.Duration) {
	c.Context, c.at = parent, time.Now().Add(timeout)
}

// Within is After for a part of c's work: the part ends no later than c.
func (c *Context) Within(timeout time.Duration) *Context {
	part := After(c.Context, timeout)
	if c.at.Before(part.at) {
		part.at = c.at
	}
	return part
}

// Deadline implements context.Context.
func (c *Context) Deadline() (time.Time, bool) { return c.at, true }

// Done implements context.Context.
func (c *Context) Done() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done == nil {
		c.done = make(chan struct{})
		if c.ended() != nil {
			close(c.done)
		} else {
			c.timer = time.AfterFunc(time.Until(c.at), c.expire)
		}
	}
	return c.done
}

// Err implements context.Context.
func (c *Context) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended()
}

// String returns only the context's name. The contexts below it belong to other packages, which may
// change them meanwhile.
func (*Context) String() string { return "deadline.Context" }

// Format keeps the contexts below out of every verb of fmt. It drops the error, for which fmt has
// no use.
func (c *Context) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, c.String()) }

// End ends the context, unless it has ended, and stops its timer. The maker calls it when the work
// is done.
func (c *Context) End() { c.finish(context.Canceled) }

func (c *Context) expire() { c.finish(context.DeadlineExceeded) }

func (c *Context) finish(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.end(err)
	}
}

// ended returns the reason why the context ended, or nil. It ends the context if its deadline has
// passed. The caller holds mu.
func (c *Context) ended() error {
	if c.err == nil && !time.Now().Before(c.at) {
		c.end(context.DeadlineExceeded)
	}
	return c.err
}

// end ends the context. The caller holds mu, and the context must not have ended.
func (c *Context) end(err error) {
	c.err = err
	if c.timer != nil {
		c.timer.Stop()
		close(c.done)
	}
}

// Sleep returns nil after d, or ctx's error if ctx ends first.
func Sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
