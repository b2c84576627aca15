package postgres_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	outside "github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/storage/postgres"
)

// payout is a service that holds an amount, sends it through a rail, and posts it, or releases what
// it held. Each step that it does to the books is a row.
type payout struct {
	store    *postgres.Store
	engine   *idempotency.Engine
	rail     string // URL
	client   *http.Client
	closed   bool // the account is closed when the payout is to be posted
	at       func(point string)
	transfer *outside.Declared[int, string]
	recall   *outside.Declared[string, string]
}

func newPayout(store *postgres.Store, rail string, closed bool, at func(point string)) *payout {
	p := &payout{store: store, rail: rail, closed: closed, at: at, client: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}}
	p.engine = idempotency.NewEngine(store, &idempotency.Options{BackoffMax: 10 * time.Millisecond})
	p.engine.Resumable("payout/1", func(idempotency.Key, []byte) (idempotency.RunFunc, error) { return p.run, nil })
	p.transfer = outside.New("transfer", outside.Effect[int, string]{Do: func(ctx context.Context, key string, in int) (string, error) {
		return p.send(ctx, "payouts", key, fmt.Sprint(in))
	}})
	p.recall = outside.New("recall", outside.Effect[string, string]{Do: func(ctx context.Context, key, in string) (string, error) {
		return p.send(ctx, "recalls", key, in)
	}})
	return p
}

// send makes one call.
func (p *payout) send(ctx context.Context, path, key, body string) (string, error) {
	p.at("before the send of " + path)
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, p.rail+"/"+path, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	r.Header.Set("Idempotency-Key", key)
	response, err := p.client.Do(r)
	if err == nil {
		defer func() { _ = response.Body.Close() }()
	}
	p.at("after the reply of " + path)
	if err := outside.FromHTTP(response, err); err != nil {
		return "", err
	}
	id, err := io.ReadAll(response.Body)
	return string(id), err
}

// book is a phase that writes one row.
func (p *payout) book(ctx context.Context, step string, end error) error {
	_, err := postgres.Phase(ctx, step, func(tx pgx.Tx) (struct{}, error) {
		_, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ($1)", step)
		p.at("in " + step)
		return struct{}{}, errors.Join(err, end)
	})
	p.at("after " + step)
	return err
}

func (p *payout) run(ctx context.Context) (*idempotency.Answer, error) {
	p.at("begin")
	if err := p.book(ctx, "hold", nil); err != nil {
		return nil, err
	}
	sent, err := p.transfer.Call(ctx, 900)
	p.at("after transfer")
	switch {
	case errors.Is(err, outside.ErrDeclined):
		return p.release(ctx, 422)
	case err != nil:
		return nil, err
	}
	var closed error
	if p.closed {
		closed = outside.Declined(errors.New("the account is closed"), nil)
	}
	err = p.book(ctx, "settle", closed)
	switch {
	case errors.Is(err, outside.ErrDeclined):
		if _, err := p.recall.Undo(ctx, p.transfer, sent); err != nil {
			return nil, err
		}
		p.at("after recall")
		return p.release(ctx, 409)
	case err != nil:
		return nil, err
	}
	return said(201), nil
}

func (p *payout) release(ctx context.Context, status int) (*idempotency.Answer, error) {
	return said(status), p.book(ctx, "release", nil)
}

func (p *payout) do(ctx context.Context) idempotency.Result {
	req := testservice.Request(idempotency.Key{Scope: "acme", Value: "payout"})
	req.Resumable, req.Stored = "payout/1", func() []byte { return nil }
	return p.engine.Do(ctx, req, p.run)
}

// payoutVariable makes the test binary a process that is killed:
// "<database>|<rail>|<closed>|<point>".
const payoutVariable = "PAIDONCE_PAYOUT_CHILD"

// payoutChild makes one payout, and kills itself with SIGKILL at a point. It returns if it does not
// get there.
func payoutChild() int {
	arguments := strings.Split(os.Getenv(payoutVariable), "|")
	store, err := postgres.Open(context.Background(), arguments[0], nil)
	if err != nil {
		fmt.Fprintln(os.Stderr, "child:", err)
		return 1
	}
	p := newPayout(store, arguments[1], arguments[2] == "true", func(point string) {
		if point == arguments[3] {
			if self, err := os.FindProcess(os.Getpid()); err != nil || self.Kill() != nil {
				os.Exit(1)
			}
			select {}
		}
	})
	result := p.do(context.Background())
	fmt.Fprintf(os.Stderr, "child: it ended: %+v\n", result)
	return 1
}

// rail is the other service: it acts once for each key.
type rail struct {
	*httptest.Server
	refuses bool
	mu      sync.Mutex
	done    map[string]map[string]bool // keys, by path
}

func newRail(t *testing.T, refuses bool) *rail {
	r := &rail{refuses: refuses, done: map[string]map[string]bool{"/payouts": {}, "/recalls": {}}}
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.refuses && req.URL.Path == "/payouts" {
			w.WriteHeader(http.StatusUnprocessableEntity)
			return
		}
		r.done[req.URL.Path][req.Header.Get("Idempotency-Key")] = true
		_, _ = io.WriteString(w, "id")
	}))
	t.Cleanup(r.Close)
	return r
}

// A process is killed with kill -9 between any two steps of a payout, and nobody retries. The
// completer of another process ends the request: each step counts once, and a retry gets the
// answer.
func TestKilledPayoutIsCompleted(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		refuses, closed  bool
		points           []string
		books            string // rows, in their order
		payouts, recalls int
		status           int
	}{
		"settled": {
			points: []string{"begin", "in hold", "after hold", "before the send of payouts", "after the reply of payouts", "after transfer", "in settle", "after settle"},
			books:  "hold settle", payouts: 1, status: 201,
		},
		"refused": {
			refuses: true,
			points:  []string{"after the reply of payouts", "after transfer", "in release", "after release"},
			books:   "hold release", status: 422,
		},
		"taken back": {
			closed: true,
			points: []string{"in settle", "after settle", "before the send of recalls", "after the reply of recalls", "after recall", "in release", "after release"},
			books:  "hold release", payouts: 1, recalls: 1, status: 409,
		},
	} {
		for _, point := range c.points {
			t.Run(name+" killed "+point, func(t *testing.T) {
				t.Parallel()
				s := testservice.New(t, nil)
				r := newRail(t, c.refuses)
				command := exec.CommandContext(t.Context(), os.Args[0])
				command.Env = append(os.Environ(), payoutVariable+"="+strings.Join([]string{s.URL, r.URL, fmt.Sprint(c.closed), point}, "|"))
				if output, err := command.CombinedOutput(); err == nil || command.ProcessState.Exited() {
					t.Fatalf("it was not killed: %v\n%s", err, output)
				}
				p := newPayout(s.Store, r.URL, c.closed, func(string) {})
				committed := point != "begin" && point != "in hold"
				if n := s.Count(t, "SELECT count(*) FROM idempotency_open"); (n == 1) != committed {
					t.Errorf("%d open", n)
				}
				deadline := time.Now().Add(patience)
				// A retry is then the first request, once the server has noticed the death.
				if !committed {
					result := p.do(t.Context())
					for ; result.Outcome == idempotency.OutcomeInProgress && time.Now().Before(deadline); result = p.do(t.Context()) {
						time.Sleep(10 * time.Millisecond)
					}
					want(t, result, idempotency.OutcomeExecuted, "")
				}
				completer := idempotency.NewCompleter(p.engine, nil)
				for s.Count(t, "SELECT count(*) FROM idempotency_open") > 0 {
					// End the lease of the process that died, and move the sends back until a
					// refusal is final.
					s.Exec(t, "UPDATE idempotency_open SET next_at = now()")
					s.Exec(t, "UPDATE idempotency_effects SET sent_first_at = sent_first_at - interval '3 minutes', doubt_at = doubt_at - interval '3 minutes' WHERE state = 1")
					if _, err := completer.Once(t.Context()); err != nil || time.Now().After(deadline) {
						t.Fatalf("not completed: %v; %s", err, s.Text(t, "SELECT COALESCE(max(parked), max(last_reason), '') FROM idempotency_open"))
					}
				}
				result := p.do(t.Context())
				if want(t, result, idempotency.OutcomeReplayed, ""); result.Answer == nil || result.Answer.Status != c.status {
					t.Errorf("%+v", result)
				}
				if books := s.Text(t, "SELECT string_agg(name, ' ' ORDER BY id) FROM effects"); books != c.books {
					t.Errorf("booked %q", books)
				}
				if payouts, recalls := len(r.done["/payouts"]), len(r.done["/recalls"]); payouts != c.payouts || recalls != c.recalls {
					t.Errorf("%d payouts, %d recalls", payouts, recalls)
				}
			})
		}
	}
}
