package idempotencytest

import (
	"context"
	"errors"
	"testing"

	"github.com/paidonce/idempotency/effect"
)

func TestProcessorServesAKeyOnceWhateverIsLost(t *testing.T) {
	t.Parallel()
	for fault, name := range map[Fault]string{NoFault: "none", LostReply: "lost reply", LostRequest: "lost request", LateRequest: "late", NotSent: "not sent"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			serves := 0
			p := &Processor[int, string]{
				Serve:   func(key string, in int) (string, error) { serves++; return key, nil },
				FaultOf: func(_ string, asked int) Fault { return fault * Fault(min(1, 2/asked-1)) }, // of the first request
			}
			_, err := p.Do(t.Context(), "k", 1)
			if (err == nil) != (fault == NoFault) {
				t.Errorf("%v", err)
			}
			if _, err := p.Lookup(t.Context(), "k", 1); (err == nil) != (fault == NoFault || fault == LostReply) || err != nil && !errors.Is(err, effect.ErrAbsent) {
				t.Errorf("looked up: %v", err)
			}
			if out, err := p.Do(t.Context(), "k", 1); out != "k" || err != nil {
				t.Errorf("%q, %v", out, err)
			}
			if served := p.Served(); len(served) != 1 || served[0].Asked != 2 || serves != 1 {
				t.Errorf("served %d times: %+v", serves, served)
			}
		})
	}
}

// A late request arrives, even if nobody asks again.
func TestLateRequestArrives(t *testing.T) {
	t.Parallel()
	p := &Processor[int, string]{
		Serve:   func(string, int) (string, error) { return "done", nil },
		FaultOf: func(string, int) Fault { return LateRequest },
	}
	_, _ = p.Do(t.Context(), "k", 1)
	if _, err := p.Lookup(t.Context(), "k", 1); !errors.Is(err, effect.ErrAbsent) {
		t.Errorf("it is there already: %v", err)
	}
	if served := p.Served(); len(served) != 1 || served[0].Out != "done" {
		t.Errorf("%+v", served)
	}
}

func TestProcessorKeepsANo(t *testing.T) {
	t.Parallel()
	no := true
	p := &Processor[int, string]{Serve: func(string, int) (string, error) {
		if no {
			return "", effect.Declined(errors.New("no money"), nil)
		}
		return "done", nil
	}}
	for range 2 {
		if _, err := p.Do(t.Context(), "k", 1); !errors.Is(err, effect.ErrDeclined) {
			t.Error(err)
		}
		no = false
	}
	if served := p.Served(); len(served) != 0 {
		t.Errorf("%+v", served)
	}
}

func TestProcessorRefusesAKeyWithAnotherInput(t *testing.T) {
	t.Parallel()
	p := &Processor[int, string]{Serve: func(string, int) (string, error) { return "done", nil }}
	_, _ = p.Do(t.Context(), "k", 1)
	if _, err := p.Do(t.Context(), "k", 2); !errors.Is(err, errOtherCall) || errors.Is(err, effect.ErrDeclined) {
		t.Errorf("%v", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := p.Do(ended, "other", 1); err == nil || len(p.Served()) != 1 {
		t.Errorf("%v, %+v", err, p.Served())
	}
}
