package idempotency

import (
	"context"
	"sync/atomic"
	"testing"
)

// Only a handler that calls DerivedKey marks its request. The library derives the same key for
// itself without sending it anywhere.
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
