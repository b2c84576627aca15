package middleware_test

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"runtime/debug"
	"strconv"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
	"github.com/paidonce/idempotency/storage/postgres"
)

// The limits that a change must keep, in allocations. They equal the measured figures: a change
// that needs fewer lowers them. The limits of round trips, WAL and connections are in
// storage/postgres.
const (
	// A fresh request, minus the same handler in a plain transaction of pgx, for two batches and an
	// answer of 200 bytes.
	allocsFreshMax = 19
	// A whole replay from PostgreSQL, without net/http.
	allocsReplayMax = 37
	// The middleware and the engine with the memory store, minus the handler; the store's
	// allocations are included.
	allocsMemoryFreshMax  = 32
	allocsMemoryReplayMax = 28
)

// These tests count the allocations of the whole process, so nothing else may run: they are not
// parallel.

func TestGateAllocationsOfAFreshRequest(t *testing.T) {
	skipUnderRace(t)
	b := setup(t, setupOptions{poolMax: 1}, nil)
	plain := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.ReadAll(r.Body); err != nil {
			t.Error(err)
		}
		tx, err := b.pool.Begin(r.Context())
		if err != nil {
			t.Error(err)
			return
		}
		transferByBatch(r.Context(), t, tx)
		if err := tx.Commit(r.Context()); err != nil {
			t.Error(err)
		}
		answerJSON(w)
	})
	keyed := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.ReadAll(r.Body); err != nil {
			t.Error(err)
		}
		transferByBatch(r.Context(), t, postgres.Tx(r.Context()))
		answerJSON(w)
	})
	idem := middleware.New(b.store, byAccount, nil).Handler(keyed)
	bare := allocations(t, plain, strconv.Itoa, "")
	fresh := allocations(t, idem, strconv.Itoa, "executed")
	gate(t, "a fresh request", fresh-bare, allocsFreshMax)
	gate(t, "a replay", allocations(t, idem, func(int) string { return "0" }, "replayed"), allocsReplayMax)
}

func TestGateAllocationsWithTheMemoryStore(t *testing.T) {
	skipUnderRace(t)
	handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { answerJSON(w) })
	idem := middleware.New(memory.New(nil), byAccount, nil).Handler(handler)
	bare := allocations(t, handler, strconv.Itoa, "")
	gate(t, "a fresh request", allocations(t, idem, strconv.Itoa, "executed")-bare, allocsMemoryFreshMax)
	gate(t, "a replay", allocations(t, idem, func(int) string { return "0" }, "replayed"), allocsMemoryReplayMax)
}

func skipUnderRace(t *testing.T) {
	t.Helper()
	if raceDetector {
		t.Skip("the race detector allocates too")
	}
}

func gate(t *testing.T, name string, got, limit int) {
	t.Helper()
	t.Logf("%s: %d allocations", name, got)
	if got > limit {
		t.Errorf("%s costs %d allocations; the limit is %d", name, got, limit)
	}
}

// allocations returns the number of allocations of one request to the handler, including those of
// the request and of a ResponseWriter. Each answer must have the status.
func allocations(t *testing.T, handler http.Handler, key func(n int) string, status string) int {
	t.Helper()
	body := bytes.Repeat([]byte("x"), 200)
	n := 0
	once := func() {
		ctx, cancel := context.WithCancel(context.Background()) // as a server's request has
		defer cancel()
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://bank/transfers", bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		r.RequestURI = "/transfers"
		r.Header["Account"] = []string{"acme"}
		r.Header["Content-Type"] = []string{"application/json"}
		r.Header["Idempotency-Key"] = []string{key(n)}
		n++
		w := &nowhere{header: make(http.Header)}
		handler.ServeHTTP(w, r)
		if got := w.header.Get("Idempotency-Status"); got != status {
			t.Fatalf("status %q, want %q", got, status)
		}
	}
	for range 20 { // connections, prepared statements and pools are warm
		once()
	}
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // a collection empties pools
	return int(testing.AllocsPerRun(200, once))
}

// nowhere is a ResponseWriter that keeps only the header.
type nowhere struct{ header http.Header }

func (w *nowhere) Header() http.Header { return w.header }

func (w *nowhere) WriteHeader(int) {}

func (w *nowhere) Write(p []byte) (int, error) { return len(p), nil }

var said = bytes.Repeat([]byte("x"), 200)

func answerJSON(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusCreated)
	_, _ = w.Write(said)
}

func byAccount(r *http.Request) (string, error) { return r.Header.Get("Account"), nil }

// transferByBatch does the database work of a transfer: it reads in one round trip and writes in
// another.
func transferByBatch(ctx context.Context, t *testing.T, tx pgx.Tx) {
	look := &pgx.Batch{}
	look.Queue("SELECT id FROM effects WHERE id = $1 FOR UPDATE", 1)
	look.Queue("SELECT id FROM effects WHERE id = $1 FOR UPDATE", 2)
	write := &pgx.Batch{}
	for range 3 {
		write.Queue("INSERT INTO effects DEFAULT VALUES")
	}
	for _, batch := range []*pgx.Batch{look, write} {
		if err := tx.SendBatch(ctx, batch).Close(); err != nil {
			t.Error(err)
		}
	}
}
