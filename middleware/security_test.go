package middleware_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

// The threats of docs/security.md, on a real server and a real database.

// bank is a service's authentication, mounted outside: it knows the accounts of tokens, and the
// rights of accounts.
type bank struct {
	mu      sync.Mutex
	tokens  map[string]string // account by token
	revoked map[string]bool   // accounts that may no longer see their answers
}

func (k *bank) change(do func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	do()
}

func (k *bank) authenticate(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		k.mu.Lock()
		account, ok := k.tokens[strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer ")]
		k.mu.Unlock()
		if !ok {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		r.Header.Set("Account", account)
		next.ServeHTTP(w, r)
	})
}

func TestRetryAfterTokenRotationDoesNotPayTwice(t *testing.T) {
	t.Parallel()
	auth := &bank{tokens: map[string]string{"first": "acme", "theirs": "globex"}}
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, handler http.Handler) http.Handler {
		return auth.authenticate(idem.Handler(handler))
	}}, transfer)
	post := func(token string) reply {
		t.Helper()
		return b.post(t, "/", "{}", "Idempotency-Key", "k", "Authorization", "Bearer "+token)
	}
	first := post("first")
	want(t, first, 201, idempotency.OutcomeExecuted, "")
	auth.change(func() { delete(auth.tokens, "first"); auth.tokens["second"] = "acme" })
	if got := post("first"); got.status != 401 || got.body != "" {
		t.Errorf("the old token: %d %s", got.status, got.body)
	}
	again := post("second")
	want(t, again, 201, idempotency.OutcomeReplayed, "")
	if again.body != first.body || b.effects(t) != 1 {
		t.Errorf("replayed %s of %s, %d effects", again.body, first.body, b.effects(t))
	}
	// The same key of another account is another request.
	want(t, post("theirs"), 201, idempotency.OutcomeExecuted, "")
	if b.effects(t) != 2 {
		t.Errorf("%d effects, want 2", b.effects(t))
	}
}

func TestAnswerIsNotReplayedToACallerWhoLostTheRight(t *testing.T) {
	t.Parallel()
	auth := &bank{tokens: map[string]string{"t": "acme"}, revoked: map[string]bool{}}
	b := setup(t, setupOptions{
		middleware: &middleware.Options{AuthorizeReplay: func(r *http.Request, _ *idempotency.Record) error {
			auth.mu.Lock()
			defer auth.mu.Unlock()
			if auth.revoked[r.Header.Get("Account")] {
				return errors.New("revoked")
			}
			return nil
		}},
		mount: func(idem *middleware.Middleware, handler http.Handler) http.Handler {
			return auth.authenticate(idem.Handler(handler))
		},
	}, transfer)
	post := func() reply {
		t.Helper()
		return b.post(t, "/", "{}", "Idempotency-Key", "k", "Authorization", "Bearer t")
	}
	first := post()
	want(t, first, 201, idempotency.OutcomeExecuted, "")
	auth.change(func() { auth.revoked["acme"] = true })
	denied := post()
	want(t, denied, 403, idempotency.OutcomeUnknown, idempotency.ReasonReplayDenied)
	for _, name := range []string{"Location", "Idempotent-Replayed", "Idempotency-Created-At", "Idempotency-Expires-At"} {
		if denied.header.Get(name) != "" {
			t.Errorf("%s: %s", name, denied.header.Get(name))
		}
	}
	if strings.Contains(denied.body, strings.TrimSpace(first.body)) {
		t.Errorf("the answer is shown: %s", denied.body)
	}
	auth.change(func() { auth.revoked["acme"] = false })
	want(t, post(), 201, idempotency.OutcomeReplayed, "")
	if b.effects(t) != 1 {
		t.Errorf("%d effects", b.effects(t))
	}
}

// Only the first client gets a one-time secret: retries and the table get status and Location.
func TestStatusAndLocationOnly(t *testing.T) {
	t.Parallel()
	const secret = "canary-one-time-password"
	handler := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", "/passwords/1")
		w.Header().Set("Etag", `"`+secret+`"`)
		w.Header().Set("Content-Type", "text/plain")
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, secret)
	}
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, handler http.Handler) http.Handler {
		mux := http.NewServeMux()
		mux.Handle("/whole", idem.Handler(handler))
		mux.Handle("/reduced", idem.With(func(o *middleware.Options) { o.Reduce = middleware.StatusAndLocation }).Handler(handler))
		return mux
	}}, handler)
	scan := func() (found int) {
		t.Helper()
		return b.count(t, `SELECT count(*) FROM idempotency_keys r WHERE position('\x`+fmt.Sprintf("%x", secret)+`'::bytea IN body) > 0
			OR position('\x`+fmt.Sprintf("%x", secret)+`'::bytea IN headers) > 0 OR r::text LIKE '%`+secret+`%'`)
	}
	first := b.post(t, "/reduced", "{}", "Idempotency-Key", "k")
	want(t, first, 201, idempotency.OutcomeExecuted, "")
	if first.body != secret || first.header.Get("Etag") == "" {
		t.Errorf("the first client got %q %v", first.body, first.header)
	}
	if scan() != 0 {
		t.Error("the secret is in the table")
	}
	again := b.post(t, "/reduced", "{}", "Idempotency-Key", "k")
	want(t, again, 201, idempotency.OutcomeReplayed, "")
	if again.body != "" || again.header.Get("Location") != "/passwords/1" || again.header.Get("Etag") != "" || again.header.Get("Content-Type") != "" || again.header.Get("Content-Length") != "0" {
		t.Errorf("replayed %q %v", again.body, again.header)
	}
	want(t, b.post(t, "/whole", "{}", "Idempotency-Key", "whole"), 201, idempotency.OutcomeExecuted, "")
	if scan() != 1 {
		t.Error("the scan finds nothing, not even where all of it is recorded")
	}
}

// A header that no replay may have is not recorded, even if Reduce puts it into its answer: the
// record would be taken for a forged one, and the key would be useless until it expires.
func TestReducedAnswerCanBeReplayed(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{middleware: &middleware.Options{Reduce: func(answer idempotency.Answer) idempotency.Answer {
		header := http.Header{"Content-Length": {"0"}, "date": {"today"}, "Idempotency-Status": {"executed"}, "Location": {"/1"}}
		return idempotency.Answer{Status: answer.Status, Header: header}
	}}}, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusCreated) })
	for _, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
		want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 201, outcome, "")
	}
}

// A flood of duplicates of a running request takes nothing from the others: none of them takes a
// connection, waits or runs anything.
func TestFloodOfDuplicatesTakesNothingFromOthers(t *testing.T) {
	t.Parallel()
	entered, release := make(chan struct{}), make(chan struct{})
	b := setup(t, setupOptions{
		poolMax:    4,
		store:      &postgres.Options{AcquireTimeout: 20 * time.Second, IdleInTransactionTimeout: 59 * time.Second},
		middleware: &middleware.Options{Timeouts: idempotency.Timeouts{Handler: 50 * time.Second}},
	}, func(w http.ResponseWriter, r *http.Request) {
		if key, _ := idempotency.KeyFrom(r.Context()); key.Value == "running" {
			close(entered)
			<-release
		}
		transfer(w, r)
	})
	const duplicates, others = 500, 50
	before := b.pool.Stat()
	first := make(chan reply, 1)
	go func() { first <- b.post(t, "/", "{}", "Idempotency-Key", "running") }()
	<-entered
	var mu sync.Mutex
	seen := map[string]int{}
	post := func(name, key string) {
		got := b.post(t, "/", "{}", "Idempotency-Key", key)
		mu.Lock()
		defer mu.Unlock()
		seen[fmt.Sprint(name, " ", got.status, " ", got.outcome)]++
	}
	var senders sync.WaitGroup
	for range 10 {
		senders.Go(func() {
			for range duplicates / 10 {
				post("duplicate", "running")
			}
		})
	}
	for sender := range 5 {
		senders.Go(func() {
			for i := range others / 5 {
				post("other", fmt.Sprint("other-", sender, "-", i))
			}
		})
	}
	senders.Wait()
	close(release)
	want(t, <-first, 201, idempotency.OutcomeExecuted, "")
	if fmt.Sprint(seen) != fmt.Sprintf("map[duplicate 409 in-progress:%d other 201 executed:%d]", duplicates, others) {
		t.Errorf("answers %v", seen)
	}
	after := b.pool.Stat()
	if n := after.AcquireCount() - before.AcquireCount(); n != 1+others || after.CanceledAcquireCount() != before.CanceledAcquireCount() {
		t.Errorf("%d connections were taken by %d requests, %d waited in vain", n, 1+others, after.CanceledAcquireCount())
	}
	if after.TotalConns() > 4 || after.AcquiredConns() != 0 {
		t.Errorf("%d connections, %d held", after.TotalConns(), after.AcquiredConns())
	}
	if b.runs.Load() != 1+others || b.effects(t) != 1+others {
		t.Errorf("%d runs, %d effects; want %d", b.runs.Load(), b.effects(t), 1+others)
	}
}

// plant changes a record's headers in the table.
func (b *testBundle) plant(t *testing.T, key string, headers []byte) {
	t.Helper()
	if _, err := b.pool.Exec(context.Background(), "UPDATE idempotency_keys SET headers = $2 WHERE key = $1", key, headers); err != nil {
		t.Fatal(err)
	}
}
