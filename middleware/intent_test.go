package middleware_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

// service charges a card for each POST, and posts the charge in its last transaction.
type service struct {
	*testBundle
	completer *idempotency.Completer
	direct    string // the database's URL, without the faults of the service's

	mu      sync.Mutex
	charges map[string]int // sends, by key
	do      func()         // runs in each call, after it was counted
	finish  func(w http.ResponseWriter, r *http.Request)
}

func newService(t *testing.T, timeout time.Duration, opts setupOptions) *service {
	t.Helper()
	s := &service{charges: map[string]int{}}
	charge := effect.New("charge", effect.Effect[string, string]{
		Do: func(_ context.Context, key, in string) (string, error) {
			s.mu.Lock()
			s.charges[key]++
			do := s.do
			s.mu.Unlock()
			if do != nil {
				do()
			}
			return "ch_" + in, nil
		},
		Timeout: timeout,
	})
	through := opts.url
	opts.url = func(database string) string {
		s.direct = database
		if through != nil {
			return through(database)
		}
		return database
	}
	opts.mount = func(idem *middleware.Middleware, _ http.Handler) http.Handler {
		topUp := idem.With(func(o *middleware.Options) { o.Resumable = "topup/1" }).Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			key, _ := idempotency.KeyFrom(r.Context())
			id, err := charge.Call(r.Context(), key.Value)
			if err != nil {
				return
			}
			s.mu.Lock()
			finish := s.finish
			s.mu.Unlock()
			if finish != nil {
				finish(w, r)
				return
			}
			if _, err := postgres.Tx(r.Context()).Exec(r.Context(), "INSERT INTO effects (name) VALUES ($1)", key.Value); err != nil {
				http.Error(w, "not posted", http.StatusInternalServerError)
				return
			}
			w.WriteHeader(http.StatusCreated)
			_, _ = io.WriteString(w, id)
		}))
		s.completer = idem.Completer(nil)
		return topUp
	}
	s.testBundle = setup(t, opts, nil)
	return s
}

// ask queries the database, on a connection of its own.
func (s *service) ask(t *testing.T, sql string, arguments ...any) (n int) {
	conn, err := pgx.Connect(t.Context(), s.direct)
	if err != nil {
		t.Error(err)
		return -1
	}
	defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
	if err := conn.QueryRow(t.Context(), sql, arguments...).Scan(&n); err != nil {
		t.Error(err)
	}
	return n
}

func (s *service) set(change func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change()
}

// sent returns the number of keys that the other service got, and how often it got one.
func (s *service) sent() (keys, times int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.charges {
		times += n
	}
	return len(s.charges), times
}

// The reply to the intent's COMMIT is lost, in each possible way. Nothing is sent until the intent
// is proven to be committed, no client gets not-executed after an intent, and a retry or the
// completer ends the request with one charge and one posting.
func TestLostIntentIsNeitherSentNorForgotten(t *testing.T) {
	t.Parallel()
	const late = 3 * time.Second
	for _, claimed := range []bool{false, true} { // else the claim travels with the intent
		for _, kind := range []pgfault.Kind{pgfault.CutBefore, pgfault.CutAfter, pgfault.Silence, pgfault.LateCommit, pgfault.HalfOpen, pgfault.DelayReply} {
			name := kind.String()
			if claimed {
				name += " after the claim"
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				var faulty, hit atomic.Bool
				options := &middleware.Options{
					Timeouts: idempotency.Timeouts{Commit: 500 * time.Millisecond, Resolve: time.Second}, BackoffMax: 20 * time.Millisecond,
				}
				if claimed {
					options.Quota = middleware.Quota{KeysMax: 10}
				}
				s := newService(t, time.Second, setupOptions{middleware: options, url: func(database string) string {
					network, address, err := pgfault.Upstream(database)
					if err != nil {
						t.Fatal(err)
					}
					proxy, err := pgfault.Start(pgfault.Options{Network: network, Address: address, OnCommit: func(commit pgfault.Commit) pgfault.Fault {
						if !faulty.Load() || !bytes.Contains(commit.Messages, []byte("idempotency_open")) || hit.Swap(true) {
							return pgfault.Fault{}
						}
						return pgfault.Fault{Kind: kind, Delay: late}
					}})
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { _ = proxy.Close() })
					return proxy.URL(database)
				}})
				post := func() reply { return s.post(t, "/topups", "{}", "Idempotency-Key", "k") }
				s.do = func() {
					if n := s.ask(t, "SELECT count(*) FROM idempotency_effects WHERE key = 'k' AND name = 'charge'"); n != 1 {
						t.Error("the charge was sent before its intent was there")
					}
				}
				faulty.Store(true)
				sent := time.Now()
				first := post()
				if !hit.Load() {
					t.Fatal("the fault was not met")
				}
				keys, _ := s.sent()
				switch idempotency.Outcome(first.outcome) {
				case idempotency.OutcomeExecuted:
					if keys != 1 {
						t.Errorf("executed, and %d charges", keys)
					}
				case idempotency.OutcomeUnknown:
				case idempotency.OutcomeNotExecuted:
					if !claimed || kind != pgfault.CutBefore || keys != 0 {
						t.Errorf("not-executed, and %d charges", keys)
					}
				default:
					t.Errorf("%d %s %s", first.status, first.outcome, first.body)
				}

				// The first request has ended. Now the late commit arrives, and PostgreSQL ends the sessions
				// that nobody uses.
				var last reply
				for begin := time.Now(); ; time.Sleep(50 * time.Millisecond) {
					if kind == pgfault.HalfOpen {
						s.ask(t, "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'")
					}
					if _, err := s.completer.Once(t.Context()); err != nil {
						t.Fatal(err)
					}
					if last = post(); last.status == http.StatusCreated {
						break
					}
					if last.outcome == string(idempotency.OutcomeNotExecuted) && s.ask(t, "SELECT count(*) FROM idempotency_effects") != 0 {
						t.Errorf("not-executed, and there is an intent: %s", last.body)
					}
					if time.Since(begin) > time.Minute {
						t.Fatalf("it does not end: %d %s", last.status, last.body)
					}
				}
				if kind == pgfault.LateCommit { // it may come only now, and must find the key taken
					time.Sleep(time.Until(sent.Add(late + 500*time.Millisecond)))
				}
				if open := s.ask(t, "SELECT count(*) FROM idempotency_open"); open != 0 {
					t.Errorf("%d are open", open)
				}
				if last.body != "ch_k" {
					t.Errorf("the answer is %q", last.body)
				}
				keys, times := s.sent()
				if posted := s.ask(t, "SELECT count(*) FROM effects"); keys != 1 || times != 1 || posted != 1 {
					t.Errorf("%d keys were sent %d times, %d postings", keys, times, posted)
				}
			})
		}
	}
}

// A client may use a new key only after not-executed. Whatever goes wrong after the intent, neither
// the service nor package client reports not-executed, and the same key leads to one charge and one
// posting.
func TestClientIsNeverToldNotExecutedAfterAnIntent(t *testing.T) {
	t.Parallel()
	fails := func(status int) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "failed", status) }
	}
	statement := func(statements ...string) func(http.ResponseWriter, *http.Request) {
		return func(w http.ResponseWriter, r *http.Request) {
			for _, sql := range statements {
				_, _ = postgres.Tx(r.Context()).Exec(r.Context(), sql)
			}
			w.WriteHeader(http.StatusCreated)
		}
	}
	for name, c := range map[string]struct {
		do     func() // in the call
		finish func(http.ResponseWriter, *http.Request)
		parks  bool
	}{
		"the call panics":                {do: func() { panic("no reply") }},
		"the handler answers 500":        {finish: fails(500)},
		"it answers 503":                 {finish: fails(503)},
		"it answers 409":                 {finish: fails(409), parks: true},
		"it answers 408":                 {finish: fails(408)},
		"it refuses":                     {finish: fails(402), parks: true},
		"it panics":                      {finish: func(http.ResponseWriter, *http.Request) { panic("a bug") }},
		"its statement fails":            {finish: statement("INSERT INTO nothing VALUES (1)")},
		"its session is ended":           {finish: statement("SELECT pg_terminate_backend(pg_backend_pid())")},
		"it is not serializable":         {finish: statement("DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$")},
		"its deferred constraint fails":  {finish: statement("CREATE TABLE d (n int UNIQUE DEFERRABLE INITIALLY DEFERRED)", "INSERT INTO d VALUES (1), (1)")},
		"its answer can not be recorded": {finish: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(201); _, _ = w.Write(make([]byte, 17<<20)) }},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newService(t, time.Second, setupOptions{middleware: &middleware.Options{BackoffMax: 10 * time.Millisecond}})
			s.do, s.finish = c.do, c.finish
			transport := client.New(neverNotExecuted{t, &http.Transport{}}, &client.Options{
				Honours: client.Everywhere, BackoffFirst: time.Millisecond, BackoffMax: 2 * time.Millisecond, RetryAfterMax: time.Millisecond, AttemptsMax: 3,
			})
			t.Cleanup(transport.CloseIdleConnections)
			send := func() (reply, error) {
				r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.server.URL+"/topups", strings.NewReader("{}"))
				if err != nil {
					t.Fatal(err)
				}
				r.Header.Set("Account", "acme")
				r.Header.Set("Idempotency-Key", `"k"`)
				response, err := (&http.Client{Transport: transport}).Do(r)
				if err != nil {
					return reply{}, err
				}
				return read(t, response), nil
			}
			if _, err := send(); !errors.Is(err, client.ErrUnknown) || errors.Is(err, client.ErrNotExecuted) {
				t.Fatalf("the client's error is %v", err)
			}
			s.set(func() { s.do, s.finish = nil, nil })
			if c.parks {
				if _, err := send(); !errors.Is(err, client.ErrUnknown) || errors.Is(err, client.ErrNotExecuted) || s.ask(t, "SELECT count(parked) FROM idempotency_open") != 1 {
					t.Errorf("parked: %v", err)
				}
			} else {
				var got reply
				for begin := time.Now(); got.status != http.StatusCreated; time.Sleep(10 * time.Millisecond) {
					_, err := s.completer.Once(t.Context())
					if err != nil {
						t.Fatal(err)
					}
					if got, err = send(); errors.Is(err, client.ErrNotExecuted) || time.Since(begin) > time.Minute {
						t.Fatalf("%d %s, %v", got.status, got.body, err)
					}
				}
				if posted := s.ask(t, "SELECT count(*) FROM effects"); posted != 1 {
					t.Errorf("%d postings", posted)
				}
			}
			if keys, _ := s.sent(); keys != 1 {
				t.Errorf("%d keys were sent", keys)
			}
		})
	}
}

// neverNotExecuted fails the test if a single answer is not-executed.
type neverNotExecuted struct {
	t    *testing.T
	base *http.Transport
}

func (n neverNotExecuted) RoundTrip(r *http.Request) (*http.Response, error) {
	response, err := n.base.RoundTrip(r)
	if err == nil && response.Header.Get("Idempotency-Status") == string(idempotency.OutcomeNotExecuted) {
		n.t.Errorf("an answer is %s, not-executed", response.Status)
	}
	return response, err
}

func (n neverNotExecuted) CloseIdleConnections() { n.base.CloseIdleConnections() }

// The other service holds its reply for two seconds, to 32 clients of a service with four
// connections. None of them is checked out, no transaction is open, and all 32 requests end.
func TestSlowServiceHoldsNoConnectionOfOurs(t *testing.T) {
	t.Parallel()
	const clients, hold = 32, 2 * time.Second
	s := newService(t, time.Minute, setupOptions{
		poolMax: 4, middleware: &middleware.Options{Timeouts: idempotency.Timeouts{Handler: 40 * time.Second}},
		store: &postgres.Options{AcquireTimeout: 30 * time.Second, IdleInTransactionTimeout: 50 * time.Second},
	})
	arrived, release := make(chan struct{}, clients), make(chan struct{})
	s.do = func() {
		arrived <- struct{}{}
		<-release
	}
	var group sync.WaitGroup
	for n := range clients {
		group.Go(func() {
			got := s.post(t, "/topups", "{}", "Idempotency-Key", "k"+string(rune('A'+n)))
			if got.status != http.StatusCreated || got.outcome != string(idempotency.OutcomeExecuted) {
				t.Errorf("%d %s %s", got.status, got.outcome, got.body)
			}
		})
	}
	for range clients {
		select {
		case <-arrived:
		case <-time.After(time.Minute):
			close(release)
			t.Fatal("not all requests got to their call: a call holds a connection")
		}
	}
	for begin := time.Now(); time.Since(begin) < hold; time.Sleep(20 * time.Millisecond) {
		open := s.ask(t, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND xact_start IS NOT NULL AND pid <> pg_backend_pid()")
		locks := s.ask(t, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())")
		if used := s.pool.Stat().AcquiredConns(); used != 0 || open != 0 || locks != 0 {
			t.Errorf("while the other service is slow: %d connections, %d transactions and %d locks", used, open, locks)
			break
		}
	}
	close(release)
	group.Wait()
	if posted, open := s.ask(t, "SELECT count(*) FROM effects"), s.ask(t, "SELECT count(*) FROM idempotency_open"); posted != clients || open != 0 {
		t.Errorf("%d postings of %d, and %d are open", posted, clients, open)
	}
}
