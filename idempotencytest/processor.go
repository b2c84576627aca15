package idempotencytest

import (
	"context"
	"errors"
	"reflect"
	"sync"

	"github.com/paidonce/idempotency/effect"
)

// Fault is what happens to one request to a [Processor].
type Fault uint8

// The faults.
const (
	NoFault     Fault = iota
	LostReply         // it is served, and the reply is lost
	LostRequest       // it never arrives, and the caller can't know
	LateRequest       // it arrives when the caller has given up, after the next request with its key
	NotSent           // no connection: it provably never arrives
)

// Processor stands in for another service that a handler calls, such as a card processor: use Do
// and Lookup as those of the [effect.Effect]. It serves each key once, keeps a no under its key
// too, and refuses a key with another input. It counts what it did for each key, so that an
// invariant can compare that with the service's own tables. It is safe for concurrent use.
type Processor[In, Out any] struct {
	// Serve executes a request with a new key. It returns the result, or effect.Declined for a no. It
	// is called once for each key, for one key at a time. Required.
	Serve func(key string, in In) (Out, error)

	// FaultOf returns the fault of a request; asked is 1 for the first request with its key. It is
	// called for one request at a time. Nil takes NoFault, LostReply, LostRequest and LateRequest in
	// turn for the first request of each key, and NoFault for all later ones.
	FaultOf func(key string, asked int) Fault

	mu    sync.Mutex
	keys  map[string]*Served[In, Out]
	order []*Served[In, Out]
	turn  int
}

// Served is what a [Processor] did for one key.
type Served[In, Out any] struct {
	Key   string
	In    In
	Out   Out
	Err   error // of Serve; nil if it was done
	Asked int   // requests with the key, lost ones included

	served bool
	late   bool // a request with the key has not arrived yet
}

// The errors of a [Processor].
var (
	errNoReply   = errors.New("there was no reply")
	errOtherCall = errors.New("the key was used with another input")
)

// Do serves a request. It is the Do of an effect.
func (p *Processor[In, Out]) Do(ctx context.Context, key string, in In) (out Out, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if ctx.Err() != nil {
		return out, effect.NotSent(context.Cause(ctx))
	}
	s := p.keys[key]
	if s == nil {
		s = &Served[In, Out]{Key: key, In: in}
		if p.keys == nil {
			p.keys = map[string]*Served[In, Out]{}
		}
		p.keys[key] = s
		p.order = append(p.order, s)
	}
	s.Asked++
	if !reflect.DeepEqual(s.In, in) {
		return out, effect.Park("the processor has another call under its key", errOtherCall)
	}
	switch p.fault(key, s.Asked) {
	case NotSent:
		return out, effect.NotSent(errNoReply)
	case LostRequest:
		return out, errNoReply
	case LateRequest:
		s.late = true
		return out, errNoReply
	case LostReply:
		p.serve(s)
		return out, errNoReply
	}
	p.serve(s)
	return s.Out, s.Err
}

// fault returns the fault of a request.
func (p *Processor[In, Out]) fault(key string, asked int) Fault {
	if p.FaultOf != nil {
		return p.FaultOf(key, asked)
	}
	if asked > 1 {
		return NoFault
	}
	p.turn++
	return Fault((p.turn - 1) % int(NotSent))
}

// serve serves the key, unless it was served before. A late request with the key has arrived by
// then too.
func (p *Processor[In, Out]) serve(s *Served[In, Out]) {
	if !s.served {
		s.Out, s.Err = p.Serve(s.Key, s.In)
	}
	s.served, s.late = true, false
}

// Lookup finds the result of a key. It is the Lookup of an effect.
func (p *Processor[In, Out]) Lookup(_ context.Context, key string, _ In) (out Out, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.keys[key]
	if s == nil || !s.served {
		return out, effect.ErrAbsent
	}
	return s.Out, s.Err
}

// Served returns the keys that were served so far, in the order of their first requests, without
// those that were declined. A late request arrives now.
func (p *Processor[In, Out]) Served() (all []Served[In, Out]) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, s := range p.order {
		if s.late {
			p.serve(s)
		}
		if s.served && s.Err == nil {
			all = append(all, *s)
		}
	}
	return all
}
