package main

import (
	"context"
	"fmt"
	"os"

	"github.com/paidonce/idempotency/internal/pgserver"
)

// databaseURL returns DATABASE_URL, as in any service. If that is not set it starts an embedded
// PostgreSQL; stop ends it and deletes its data.
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
