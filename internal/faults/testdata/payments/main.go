// Command payments is a service that TestF30 builds twice: from these sources and, in a version of
// its own, from older ones. Both versions must have the same flags.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

func main() {
	name := flag.String("name", "", "what it calls itself in its answers")
	database := flag.String("database", "", "its URL")
	files := flag.String("migrations", "", "folder of the migrations; the embedded ones where empty")
	fingerprint := flag.Int("fingerprint", 0, "version of a fingerprint function of its own; the built-in one where 0")
	flag.Parse()
	if err := run(*name, *database, *files, int16(*fingerprint)); err != nil {
		log.Fatal(err)
	}
}

// run prints its address, and serves until its input ends.
func run(name, database, files string, fingerprint int16) error {
	ctx := context.Background()
	store, err := postgres.Open(ctx, database, &postgres.Options{PoolConfig: func(config *pgxpool.Config) { config.MaxConns = 8 }})
	if err != nil {
		return err
	}
	defer store.Close()
	var up *migrations.Options
	if files != "" {
		up = &migrations.Options{Files: os.DirFS(files), VersionTable: "idempotency_migrations"}
	}
	if err := migrations.Up(ctx, store, up); err != nil {
		return err
	}
	if err := store.Check(ctx); err != nil {
		return err
	}

	var opts middleware.Options
	if fingerprint != 0 {
		opts.Fingerprinters = []middleware.Fingerprinter{
			{Version: fingerprint, Content: func(_ *http.Request, body []byte) []byte { return body }},
			middleware.FingerprinterV1(),
		}
	}
	scope := func(*http.Request) (string, error) { return "acme", nil }
	handler := middleware.New(store, scope, &opts).Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		tx := postgres.Tx(r.Context())
		if r.Header.Get("Hold") != "" { // until the lock is released
			if _, err := tx.Exec(r.Context(), "SELECT pg_advisory_xact_lock(30)"); err != nil {
				http.Error(w, "not let go", http.StatusInternalServerError)
				return
			}
		}
		if _, err := tx.Exec(r.Context(), "INSERT INTO payments (key) VALUES ($1)", r.Header.Get("Idempotency-Key")); err != nil {
			http.Error(w, "the payment failed", http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		fmt.Fprintf(w, `{"by":%q,"nonce":%q}`, name, uuid.NewString())
	}))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println("http://" + listener.Addr().String())
	server := &http.Server{Handler: handler}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		_ = server.Close()
	}()
	if err := server.Serve(listener); err != http.ErrServerClosed {
		return err
	}
	return nil
}
