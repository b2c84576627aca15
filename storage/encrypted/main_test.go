package encrypted_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/encrypted"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// secretOf returns a key with a secret that repeats one byte.
func secretOf(id, fill byte) encrypted.Key {
	key := encrypted.Key{ID: id}
	for i := range key.Secret {
		key.Secret[i] = fill
	}
	return key
}

var oneKey = encrypted.Keys{Current: secretOf(1, 0xa1)}

// service is a server that records its answers in a store.
type service struct {
	server *httptest.Server
	runs   atomic.Int64

	mu   sync.Mutex
	logs strings.Builder
}

func (s *service) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.logs.Write(p)
}

func (s *service) logged() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.logs.String()
}

// serve serves a handler that answers 201 with the request's body, and 404 at /declined.
func serve(t *testing.T, store idempotency.Store, change func(o *middleware.Options)) *service {
	t.Helper()
	s := &service{}
	scope := func(r *http.Request) (string, error) { return r.Header.Get("Account"), nil }
	options := &middleware.Options{Logger: slog.New(slog.NewTextHandler(s, nil))}
	if change != nil {
		change(options)
	}
	s.server = httptest.NewServer(middleware.New(store, scope, options).Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.runs.Add(1)
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		w.Header().Set("Location", "/transfers/1")
		if r.URL.Path == "/declined" {
			w.WriteHeader(http.StatusNotFound)
		} else {
			w.WriteHeader(http.StatusCreated)
		}
		_, _ = w.Write(body)
	})))
	t.Cleanup(s.server.Close)
	return s
}

type reply struct {
	status  int
	outcome string
	header  http.Header
	body    string
}

func (s *service) post(t *testing.T, account, key, path, body string) reply {
	t.Helper()
	r, err := http.NewRequestWithContext(context.Background(), http.MethodPost, s.server.URL+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.GetBody = nil // or Go's client resends keyed requests by itself
	r.Header.Set("Account", account)
	r.Header.Set("Idempotency-Key", key)
	response, err := s.server.Client().Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }()
	got, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return reply{response.StatusCode, response.Header.Get("Idempotency-Status"), response.Header, string(got)}
}

func want(t *testing.T, what string, got reply, status int, outcome idempotency.Outcome, body string) {
	t.Helper()
	if got.status != status || got.outcome != string(outcome) || !strings.Contains(got.body, body) {
		t.Errorf("%s: %d %s %.200q; want %d %s %q", what, got.status, got.outcome, got.body, status, outcome, body)
	}
}

func isCorrupt(err error) bool { return errors.Is(err, idempotency.ErrRecordCorrupt) }
func isUnknown(err error) bool { return errors.Is(err, idempotency.ErrUnknown) }
