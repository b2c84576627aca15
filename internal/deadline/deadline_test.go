package deadline

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

type valueKey struct{}

func parent() context.Context { return context.WithValue(context.Background(), valueKey{}, "value") }

func TestContextEndsAtItsDeadline(t *testing.T) {
	t.Parallel()
	for name, watch := range map[string]func(c *Context){
		"and somebody waits": func(c *Context) { <-c.Done() },
		"and nobody waits":   func(*Context) { time.Sleep(time.Minute) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				started := time.Now()
				c := After(parent(), time.Minute)
				time.Sleep(time.Minute - 1)
				if err := c.Err(); err != nil {
					t.Errorf("a nanosecond before its deadline: %v", err)
				}
				if at, ok := c.Deadline(); !ok || at.Sub(started) != time.Minute {
					t.Errorf("deadline after %v, %v", at.Sub(started), ok)
				}
				watch(c)
				if err := c.Err(); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("after its deadline: %v", err)
				}
				select {
				case <-c.Done():
				default:
					t.Error("it ended, and its channel is open")
				}
				c.End()
				if err := c.Err(); !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("End after the deadline changed the reason to %v", err)
				}
			})
		})
	}
}

func TestEndEndsTheContextAndItsTimer(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := After(parent(), time.Minute)
		derived, cancel := context.WithCancel(c)
		defer cancel()
		called := make(chan struct{})
		context.AfterFunc(c, func() { close(called) })
		c.End()
		<-derived.Done()
		<-called
		if err := c.Err(); !errors.Is(err, context.Canceled) {
			t.Errorf("after End: %v", err)
		}
		c.End() // a second call does no harm
		time.Sleep(time.Hour)
		if err := c.Err(); !errors.Is(err, context.Canceled) {
			t.Errorf("the deadline after End changed the reason to %v", err)
		}
		unasked := After(parent(), time.Minute)
		unasked.End()
		<-unasked.Done()
	})
}

func TestWithinEndsNoLater(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		started := time.Now()
		c := After(parent(), time.Minute)
		for timeout, want := range map[time.Duration]time.Duration{time.Second: time.Second, time.Hour: time.Minute} {
			if at, _ := c.Within(timeout).Deadline(); at.Sub(started) != want {
				t.Errorf("within %v: ends after %v, want %v", timeout, at.Sub(started), want)
			}
		}
		if got := c.Within(time.Second).Value(valueKey{}); got != "value" {
			t.Errorf("value %v", got)
		}
	})
}

// The cost that a request pays three times.
func BenchmarkContext(b *testing.B) {
	b.Run("deadline.After", func(b *testing.B) {
		for b.Loop() {
			c := After(parent(), time.Minute)
			if c.Err() != nil {
				b.Fatal("ended")
			}
			c.End()
		}
	})
	b.Run("context.WithTimeout", func(b *testing.B) {
		for b.Loop() {
			c, cancel := context.WithTimeout(parent(), time.Minute)
			if c.Err() != nil {
				b.Fatal("ended")
			}
			cancel()
		}
	})
}
