package observe_test

import (
	"context"
	"log/slog"
	"os"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/observe"
	"github.com/paidonce/idempotency/observe/lostkey"
	"github.com/paidonce/idempotency/storage/memory"
)

// An engine has one tracer. Join makes one of several: here a log, and a detector that writes to
// it.
func ExampleJoin() {
	handler := slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey || a.Key == "after" {
			return slog.Attr{}
		}
		return a
	}})
	log := observe.NewLog(slog.New(handler))
	detector := lostkey.New(&lostkey.Options{OnLost: log.LostKey})
	engine := idempotency.NewEngine(memory.New(nil), &idempotency.Options{Tracer: observe.Join(log, detector)})

	for _, key := range []string{"8e03978e", "c2a91b07"} { // one transfer, sent twice
		engine.Do(context.Background(), idempotency.Request{
			Key: idempotency.Key{Scope: "acme", Value: key}, Fingerprint: idempotency.NewFingerprint(100, []byte("1250 to bob")), Route: "POST /transfers",
		}, func(context.Context) (*idempotency.Answer, error) { return &idempotency.Answer{Status: 201}, nil })
	}
	// Output:
	// level=WARN msg="idempotency: the same request came with another key" route="POST /transfers"
}
