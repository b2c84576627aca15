package idempotency_test

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/memory"
)

// foreignContext is a context of other code. Its contents may change at any time, and only its
// owner may read them: printing a map while another goroutine writes to it ends the process.
type foreignContext struct {
	context.Context
	Values foreignValues
}

type foreignKey struct{}

type foreignValues struct{ printed *atomic.Int64 }

func (v foreignValues) String() string {
	v.printed.Add(1)
	return "canary"
}

type printingStore struct {
	idempotency.Store
	print func(ctx context.Context)
}

func (s printingStore) Begin(ctx context.Context, claim *idempotency.Claim) (idempotency.Attempt, *idempotency.Record, error) {
	s.print(ctx)
	return s.Store.Begin(ctx, claim)
}

// A service may print the contexts that it gets from us, in a log or an error. They show neither
// the key nor any value that other code put below them.
func TestContextsPrintNothingThatIsNotOurs(t *testing.T) {
	t.Parallel()
	var printed atomic.Int64
	print := func(ctx context.Context) {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%d"} {
			if text := fmt.Sprintf(verb, ctx); strings.Contains(text, "canary") || text == "" {
				t.Errorf("%s of %T is %q", verb, ctx, text)
			}
		}
	}
	engine := idempotency.NewEngine(printingStore{memory.New(nil), print}, nil)
	below := foreignContext{context.WithValue(t.Context(), foreignKey{}, foreignValues{&printed}), foreignValues{&printed}}
	req := keyed("key-canary")
	result := engine.Do(below, req, func(ctx context.Context) (*idempotency.Answer, error) {
		print(ctx)
		cancelable, cancel := context.WithCancel(ctx) // package context prints the parent with String
		defer cancel()
		print(cancelable)
		return &idempotency.Answer{Status: 201}, nil
	})
	if result.Outcome != idempotency.OutcomeExecuted {
		t.Errorf("outcome %s", result.Outcome)
	}
	if n := printed.Load(); n != 0 {
		t.Errorf("values of others were read %d times", n)
	}
}
