package client_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/client/pgintent"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
	"github.com/paidonce/idempotency/storage/postgres"
)

// real is a service behind the real middleware. Its handler runs count as effects.
type real struct {
	url     string
	pool    *pgxpool.Pool // nil: the store is in memory
	effects func() int
}

// lossy loses the replies of every third request, and every fifth request before it arrives.
func lossy(next http.Handler) http.Handler {
	var n atomic.Int64
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch n := n.Add(1); {
		case n%3 == 0:
			next.ServeHTTP(httptest.NewRecorder(), r)
			lose()
		case n%5 == 0:
			lose()
		}
		next.ServeHTTP(w, r)
	})
}

func onMemory(t *testing.T) *real {
	var runs atomic.Int64
	handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusCreated)
		_, _ = fmt.Fprintf(w, "effect %d", runs.Add(1))
	})
	idem := middleware.New(memory.New(nil), account, nil)
	server := httptest.NewServer(lossy(idem.Handler(handler)))
	t.Cleanup(server.Close)
	return &real{url: server.URL, effects: func() int { return int(runs.Load()) }}
}

func account(*http.Request) (string, error) { return "acme", nil }

func onPostgreSQL(t *testing.T) *real {
	s := testservice.New(t, nil)
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var id int64
		if err := postgres.Tx(r.Context()).QueryRow(r.Context(), "INSERT INTO effects DEFAULT VALUES RETURNING id").Scan(&id); err != nil {
			http.Error(w, "failed", http.StatusInternalServerError)
			return
		}
		w.WriteHeader(http.StatusCreated)
		_, _ = fmt.Fprintf(w, "effect %d", id)
	})
	idem := middleware.New(s.Store, account, nil)
	server := httptest.NewServer(lossy(idem.Handler(handler)))
	t.Cleanup(server.Close)
	return &real{url: server.URL, pool: s.Pool, effects: func() int { return s.Effects(t) }}
}

// TestLostRepliesHaveOneEffect: with the real middleware, in memory and on PostgreSQL, each request
// has one effect, its caller gets its answer, and no two callers get the same one.
func TestLostRepliesHaveOneEffect(t *testing.T) {
	t.Parallel()
	for name, start := range map[string]func(*testing.T) *real{"memory": onMemory, "PostgreSQL": onPostgreSQL} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			service := start(t)
			c := newClient(t, quick(func(o *client.Options) { o.AttemptsMax, o.Unbudgeted = 50, true }))
			const requests = 60
			var mu sync.Mutex
			answers := map[string]int{}
			replayed := 0
			var group sync.WaitGroup
			for range 6 {
				group.Go(func() {
					for range requests / 6 {
						response, body, err := post(t, c, t.Context(), service.url, "body")
						if err != nil {
							t.Error(err)
							return
						}
						mu.Lock()
						answers[body]++
						if response.Header.Get("Idempotency-Status") == "replayed" {
							replayed++
						}
						mu.Unlock()
					}
				})
			}
			group.Wait()
			if n := service.effects(); n != requests || len(answers) != requests || replayed == 0 {
				t.Errorf("%d requests had %d effects and %d answers, %d of them replayed", requests, n, len(answers), replayed)
			}
		})
	}
}

// TestRealRefusalsAreTheCallers: if the middleware refuses the request itself, the caller gets that
// answer at once.
func TestRealRefusalsAreTheCallers(t *testing.T) {
	t.Parallel()
	refuse := func(*http.Request) (string, error) { return "", fmt.Errorf("nobody") }
	service := middleware.New(memory.New(nil), refuse, nil).Handler(http.NotFoundHandler())
	var requests atomic.Int64
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		service.ServeHTTP(w, r)
	}))
	defer server.Close()
	response, _, err := post(t, newClient(t, quick()), t.Context(), server.URL, "body")
	if err != nil || response.StatusCode != 401 || response.Header.Get("Idempotency-Status") != string(idempotency.OutcomeNotExecuted) || requests.Load() != 1 {
		t.Errorf("after %d requests: %v, %v", requests.Load(), response, err)
	}

	good := onMemory(t)
	c := newClient(t, quick(func(o *client.Options) { o.AttemptsMax, o.Unbudgeted = 50, true }))
	ctx := client.WithKey(t.Context(), "mine")
	if response, _, err := post(t, c, ctx, good.url, "body"); err != nil || response.StatusCode != 201 {
		t.Errorf("the first request: %v, %v", response, err)
	}
	if response, _, err := post(t, c, ctx, good.url, "another body"); err != nil || response.StatusCode != 422 {
		t.Errorf("another request with the key: %v, %v", response, err)
	}
}

// TestIntentsInPostgreSQLAreResumed by another store, as another process would, with one effect.
func TestIntentsInPostgreSQLAreResumed(t *testing.T) {
	t.Parallel()
	service := onPostgreSQL(t)
	if err := pgintent.Create(t.Context(), service.pool, nil); err != nil {
		t.Fatal(err)
	}
	const requests = 12
	first := newClient(t, quick(func(o *client.Options) { o.AttemptsMax, o.Intents = 1, pgintent.New(service.pool, nil) }))
	left := 0
	for range requests {
		if _, _, err := post(t, first, t.Context(), service.url, "body"); err != nil {
			expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptsSpent)
			left++
		}
	}
	second := client.New(&http.Transport{DisableKeepAlives: true}, quick(func(o *client.Options) {
		o.AttemptsMax, o.Unbudgeted, o.Intents = 50, true, pgintent.New(service.pool, &pgintent.Options{PendingAfter: 1000})
	}))
	report, err := second.Resume(t.Context(), nil)
	if err != nil || report != (client.Report{Settled: left}) || left == 0 {
		t.Errorf("of %d intents: %+v, %v", left, report, err)
	}
	if n := service.effects(); n != requests {
		t.Errorf("%d requests had %d effects", requests, n)
	}
}
