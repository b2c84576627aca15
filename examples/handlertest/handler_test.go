package main

import (
	"maps"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/memory"
)

type testBundle struct {
	store   *memory.Store
	books   *memoryBooks
	handler http.Handler
}

func setup(_ *testing.T, opts *memory.Options) *testBundle {
	b := &testBundle{store: memory.New(opts), books: &memoryBooks{balances: map[string]int64{"alice": 10000}}}
	b.handler = newHandler(b.store, b.books)
	return b
}

// send sends a transfer from alice and returns the answer.
func (b *testBundle) send(key, body string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodPost, "/transfers", strings.NewReader(body))
	r.Header.Set("Account", "alice")
	r.Header.Set("Idempotency-Key", key)
	w := httptest.NewRecorder()
	b.handler.ServeHTTP(w, r)
	return w
}

func want(t *testing.T, w *httptest.ResponseRecorder, status int, outcome idempotency.Outcome) {
	t.Helper()
	if got := idempotency.Outcome(w.Header().Get("Idempotency-Status")); w.Code != status || got != outcome {
		t.Errorf("answer is %d %s, want %d %s: %s", w.Code, got, status, outcome, w.Body)
	}
}

func (b *testBundle) wantBalances(t *testing.T, alice, bob int64) {
	t.Helper()
	if want := map[string]int64{"alice": alice, "bob": bob}; !maps.Equal(b.books.balances, want) {
		t.Errorf("balances are %v, want %v", b.books.balances, want)
	}
}

const body = `{"to":"bob","amount":1250}`

func TestRetryPaysOnce(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	first := b.send("k1", body)
	want(t, first, http.StatusCreated, idempotency.OutcomeExecuted)
	retry := b.send("k1", body)
	want(t, retry, http.StatusCreated, idempotency.OutcomeReplayed)
	if retry.Body.String() != first.Body.String() || retry.Header().Get("Content-Type") != "application/json" {
		t.Errorf("retry is answered %q with %q, want the first answer %q", retry.Body, retry.Header(), first.Body)
	}
	b.wantBalances(t, 8750, 1250)
}

func TestKeyOfAnotherRequestIsRefused(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	want(t, b.send("k1", body), http.StatusCreated, idempotency.OutcomeExecuted)
	want(t, b.send("k1", `{"to":"bob","amount":9999}`), http.StatusUnprocessableEntity, idempotency.OutcomeMismatch)
	b.wantBalances(t, 8750, 1250)
}

// A handler's refusal is an answer too: it is replayed even if there is enough money by then.
func TestRefusalIsReplayed(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	const tooMuch = `{"to":"bob","amount":20000}`
	want(t, b.send("k1", tooMuch), http.StatusPaymentRequired, idempotency.OutcomeExecuted)
	b.books.balances["alice"] = 50000
	want(t, b.send("k1", tooMuch), http.StatusPaymentRequired, idempotency.OutcomeReplayed)
	if b.books.transfers != 1 {
		t.Errorf("the handler ran %d times", b.books.transfers)
	}
}

// Options.Fault produces answers that are hard to provoke. Here the client learns that the outcome
// is unknown, and must keep its key.
func TestUnknownOutcome(t *testing.T) {
	t.Parallel()
	b := setup(t, &memory.Options{Fault: func(step idempotency.Step) error {
		// COMMIT is lost, and its outcome can't be found.
		if step == idempotency.StepCommit || step == idempotency.StepResolve {
			return idempotency.ErrUnknown
		}
		return nil
	}})
	w := b.send("k1", body)
	want(t, w, http.StatusServiceUnavailable, idempotency.OutcomeUnknown)
	if w.Header().Get("Retry-After") == "" {
		t.Error("there is no Retry-After")
	}
}

// The memory store has no transaction, so the writes of a declined handler stay. storage/postgres
// undoes both writes: test that with PostgreSQL.
func TestMemoryStoreDoesNotUndoWrites(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	want(t, b.send("k1", `{"to":"bob","amount":20000}`), http.StatusPaymentRequired, idempotency.OutcomeExecuted)
	b.wantBalances(t, -10000, 20000) // in production: 10000, 0
}
