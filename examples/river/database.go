package main

import (
	"context"
	"fmt"
	"os"

	"github.com/paidonce/idempotency/internal/pgserver"
)

// databaseURL returns DATABASE_URL, so that a service reads as it would anywhere. Without one it starts an embedded
// PostgreSQL, which stop ends and whose data is gone then.
func databaseURL(ctx context.Context) (url string, stop func(), err error) {
	if url := os.Getenv("DATABASE_URL"); url != "" {
		return url, func() {}, nil
	}
	server, err := pgserver.Start(ctx, &pgserver.Options{Progress: os.Stderr})
	if err != nil {
		return "", nil, err
	}
	fmt.Printf("PostgreSQL %s is embedded: its data is gone at exit. Set DATABASE_URL to use one of yours.\n", server.Version())
	stop = func() {
		if err := server.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	return server.URL(), stop, nil
}
