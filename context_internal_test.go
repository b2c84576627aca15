package idempotency

import (
	"context"
	"sync/atomic"
	"testing"
)

// Only a handler that asks gets its request marked. A key that the library derives for itself is the same key, and is sent to
// nobody.
func TestKeysThatTheLibraryDerivesMarkNothing(t *testing.T) {
	t.Parallel()
	ctx := &attemptContext{Context: context.Background(), running: running{key: Key{Scope: "acme", Value: "k"}, derived: new(atomic.Bool)}}
	own := ctx.running.derive("charge")
	if ctx.running.derived.Load() {
		t.Error("it marks the request")
	}
	if asked := DerivedKey(ctx, "charge"); asked != own || !ctx.running.derived.Load() {
		t.Errorf("the handler gets %s, the library %s; marked: %v", asked, own, ctx.running.derived.Load())
	}
}
