package history_test

import (
	"context"
	"os"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/observe/history"
	"github.com/paidonce/idempotency/storage/postgres"
)

// A service that keeps the history of its keys for its operators.
func ExampleNew() {
	ctx := context.Background()
	pool, err := pgxpool.New(ctx, os.Getenv("DATABASE_URL"))
	if err != nil {
		panic(err)
	}
	defer pool.Close()
	h := history.New(pool, nil)
	engine := idempotency.NewEngine(postgres.New(pool, nil), &idempotency.Options{Tracer: h})
	_ = engine // serve; then, when no request is in flight any more:
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := h.Close(ctx); err != nil {
		panic(err)
	}
}
