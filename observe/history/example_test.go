package history_test

import (
	"context"
	"os"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/observe/history"
	"github.com/paidonce/idempotency/storage/postgres"
)

// A service that keeps the history of its keys for its operators.
func ExampleNew() {
	ctx := context.Background()
	store, err := postgres.Open(ctx, os.Getenv("DATABASE_URL"), nil)
	if err != nil {
		panic(err)
	}
	defer store.Close()
	h := history.New(store, nil)
	engine := idempotency.NewEngine(store, &idempotency.Options{Tracer: h})
	_ = engine // serve; then, when no request is in flight any more:
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := h.Close(ctx); err != nil {
		panic(err)
	}
}
