package main

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/paidonce/idempotency/internal/pgtest"
	paidonce "github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/sqldb"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// A transfer that is paid, declined or wrong leaves the rows that its answer stands for, however
// often it is sent.
func TestTransfersAgreeWithTheirAnswers(t *testing.T) {
	t.Parallel()
	store, err := paidonce.Open(t.Context(), pgtest.Database(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	db := sqldb.Open(store, &sqldb.Options{Pool: true})
	t.Cleanup(func() { _ = db.Close() })
	var handler http.Handler
	for range 2 { // a program that starts again finds its tables
		if handler, err = newHandler(t.Context(), store, db); err != nil {
			t.Fatal(err)
		}
	}
	send := func(method, key, body string) *httptest.ResponseRecorder {
		r := httptest.NewRequestWithContext(t.Context(), method, "/transfers", strings.NewReader(body))
		r.Header.Set("Account", "alice")
		if key != "" {
			r.Header.Set("Idempotency-Key", key)
		}
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		return w
	}
	for _, step := range []struct {
		key, body string
		status    int
		outcome   string
	}{
		{"paid", `{"to":"bob","amount":1250}`, http.StatusCreated, "executed"},
		{"paid", `{"to":"bob","amount":1250}`, http.StatusCreated, "replayed"},
		{"too-much", `{"to":"bob","amount":20000}`, http.StatusPaymentRequired, "executed"},
		{"too-much", `{"to":"bob","amount":20000}`, http.StatusPaymentRequired, "replayed"},
		{"nobody", `{"to":"nobody","amount":1}`, http.StatusNotFound, "executed"},
		{"the-rest", `{"to":"bob","amount":8750}`, http.StatusCreated, "executed"},
	} {
		w := send(http.MethodPost, step.key, step.body)
		if got := w.Header().Get("Idempotency-Status"); w.Code != step.status || got != step.outcome {
			t.Errorf("%s: %d %s, want %d %s: %s", step.key, w.Code, got, step.status, step.outcome, w.Body)
		}
	}
	want := `[{"id":1,"payer":"alice","payee":"bob","amount":1250},{"id":2,"payer":"alice","payee":"bob","amount":8750}]` + "\n"
	if w := send(http.MethodGet, "", ""); w.Body.String() != want {
		t.Errorf("the transfers are %s, want %s", w.Body, want)
	}
}
