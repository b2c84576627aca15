package encrypted_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/storage/encrypted"
	"github.com/paidonce/idempotency/storage/memory"
	"github.com/paidonce/idempotency/storage/postgres"
)

const (
	secretRequest = "canary-of-a-request"
	secretInput   = "canary-of-an-input"
	secretOutput  = "canary-of-an-output"
	secretAnswer  = "canary-of-an-answer"
)

// caller is a service with one resumable route that calls another service.
type caller struct {
	*testservice.Service
	engine *idempotency.Engine
	mute   bool // the other service gives no answer
	no     bool // it declines
	charge *effect.Declared[string, string]

	mu     sync.Mutex // the completer runs several requests at once
	sent   []string   // inputs
	resume []string   // what resumed runs started from
}

func newCaller(t *testing.T) *caller {
	c := &caller{Service: testservice.New(t, nil)}
	c.charge = effect.New("charge", effect.Effect[string, string]{
		Do: func(_ context.Context, _, in string) (string, error) {
			c.mu.Lock()
			c.sent = append(c.sent, in)
			c.mu.Unlock()
			switch {
			case c.mute:
				return "", errors.New("no answer")
			case c.no:
				return "", effect.Declined(errors.New("no funds"), secretOutput)
			}
			return secretOutput, nil
		},
		KeepsDeclines: true,
	})
	c.serve(oneKey)
	return c
}

// serve answers with these keys from now on.
func (c *caller) serve(keys encrypted.Keys) {
	c.engine = idempotency.NewEngine(encrypted.New(c.Store, keys), &idempotency.Options{BackoffMax: time.Millisecond})
	c.engine.Resumable("topup/1", func(_ idempotency.Key, stored []byte) (idempotency.RunFunc, error) {
		c.mu.Lock()
		c.resume = append(c.resume, string(stored))
		c.mu.Unlock()
		return c.run, nil
	})
}

func (c *caller) run(ctx context.Context) (*idempotency.Answer, error) {
	out, err := c.charge.Call(ctx, secretInput)
	var declined *effect.DeclinedError
	switch {
	case errors.As(err, &declined):
		return &idempotency.Answer{Status: 402, Body: append([]byte(secretAnswer), declined.Detail...)}, nil
	case err != nil:
		return nil, err
	}
	return &idempotency.Answer{Status: 201, Body: []byte(secretAnswer + out)}, nil
}

func (c *caller) request(key string) idempotency.Result {
	req := testservice.Request(idempotency.Key{Scope: "acme", Value: key})
	req.Resumable, req.Stored = "topup/1", func() []byte { return []byte(secretRequest) }
	return c.engine.Do(context.Background(), req, c.run)
}

// rows returns all that the tables hold, as text.
func (c *caller) rows(t *testing.T) string {
	return strings.Join(c.Strings(t, `SELECT r::text FROM idempotency_keys r UNION ALL SELECT r::text FROM idempotency_open r UNION ALL SELECT r::text FROM idempotency_effects r`), "\n")
}

// Neither the stored request nor the input, output or answer of an open request is readable in the
// tables, and every later run gets each of them as it was.
func TestOpenRequestIsEncrypted(t *testing.T) {
	t.Parallel()
	for name, status := range map[string]int{"done": 201, "declined": 402} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCaller(t)
			hidden := func() {
				t.Helper()
				rows := c.rows(t)
				for _, secret := range []string{secretRequest, secretInput, secretOutput, secretAnswer} {
					if strings.Contains(rows, secret) || strings.Contains(rows, fmt.Sprintf("%x", secret)) {
						t.Errorf("%s is in the tables", secret)
					}
				}
				if !strings.Contains(rows, "topup/1") && !strings.Contains(rows, "charge") {
					t.Error("the look sees nothing")
				}
			}
			c.mute = true
			if result := c.request("k"); !result.Accepted {
				t.Fatalf("%+v", result)
			}
			hidden()
			c.mute, c.no = false, status == 402
			// The result is recorded, and the run ends before its answer: the next one reads it.
			c.Exec(t, `CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'no'; END $$;
				CREATE TRIGGER refuse BEFORE UPDATE ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION refuse()`)
			c.complete(t, 1)
			hidden()
			c.Exec(t, "DROP TRIGGER refuse ON idempotency_keys")
			c.complete(t, 0)
			hidden()
			want := secretAnswer + secretOutput
			if status == 402 {
				want = secretAnswer + `"` + secretOutput + `"`
			}
			if result := c.request("k"); result.Outcome != idempotency.OutcomeReplayed || result.Answer.Status != status || string(result.Answer.Body) != want {
				t.Errorf("%+v", result)
			}
			if fmt.Sprint(c.sent) != fmt.Sprintf("[%s %s]", secretInput, secretInput) || len(c.resume) != 2 || c.resume[0] != secretRequest || c.resume[1] != secretRequest {
				t.Errorf("sent %q, resumed from %q", c.sent, c.resume)
			}
		})
	}
}

// The output of a phase, and the detail of a declined one, are encrypted like those of calls, and
// one can't stand in for the other.
func TestPhasesAreEncrypted(t *testing.T) {
	t.Parallel()
	for name, forged := range map[string]bool{"as they were": false, "forged": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCaller(t)
			final, ran := false, 0
			run := func(ctx context.Context) (*idempotency.Answer, error) {
				out, err := postgres.Phase(ctx, "hold", func(pgx.Tx) (string, error) {
					ran++
					return secretOutput, nil
				})
				if err != nil {
					return nil, err
				}
				_, err = postgres.Phase(ctx, "settle", func(pgx.Tx) (string, error) {
					ran++
					return "", effect.Declined(errors.New("closed"), secretInput)
				})
				var declined *effect.DeclinedError
				if !errors.As(err, &declined) || !final {
					return nil, errors.Join(err, errors.New("died"))
				}
				return &idempotency.Answer{Status: 201, Body: append([]byte(out), declined.Detail...)}, nil
			}
			c.engine.Resumable("payout/1", func(idempotency.Key, []byte) (idempotency.RunFunc, error) { return run, nil })
			req := testservice.Request(idempotency.Key{Scope: "acme", Value: "k"})
			req.Resumable, req.Stored = "payout/1", func() []byte { return []byte(secretRequest) }
			if result := c.engine.Do(t.Context(), req, run); !result.Accepted {
				t.Fatalf("%+v", result)
			}
			rows := c.rows(t)
			for _, secret := range []string{secretRequest, secretInput, secretOutput} {
				if strings.Contains(rows, secret) || strings.Contains(rows, fmt.Sprintf("%x", secret)) {
					t.Errorf("%s is in the tables", secret)
				}
			}
			if !strings.Contains(rows, "settle") {
				t.Error("the look sees nothing")
			}
			if final = true; forged {
				c.Exec(t, "UPDATE idempotency_effects SET output = (SELECT output FROM idempotency_effects WHERE name = 'settle') WHERE name = 'hold'")
				c.complete(t, 1)
			} else {
				c.complete(t, 0)
				if result := c.engine.Do(t.Context(), req, run); result.Outcome != idempotency.OutcomeReplayed || string(result.Answer.Body) != secretOutput+`"`+secretInput+`"` {
					t.Errorf("%+v", result)
				}
			}
			if ran != 2 {
				t.Errorf("%d phases ran", ran)
			}
		})
	}
}

// complete makes the completer look once, and fails the test unless this many requests are open
// after it.
func (c *caller) complete(t *testing.T, open int) {
	t.Helper()
	c.Exec(t, "UPDATE idempotency_open SET next_at = now()")
	if _, err := idempotency.NewCompleter(c.engine, &idempotency.CompleterOptions{OnResume: func(idempotency.Key, idempotency.Result) {}}).Once(t.Context()); err != nil {
		t.Fatal(err)
	}
	if n := c.Count(t, "SELECT count(*) FROM idempotency_open"); n != open {
		t.Errorf("%d requests are open, want %d", n, open)
	}
}

// No part of an open request can stand in for another: not that of another request, of another
// place, or of another effect. A request with such a part is not run, and nothing is sent.
func TestPartsOfAnOpenRequestAreBound(t *testing.T) {
	t.Parallel()
	for name, forge := range map[string]string{
		"the request of another":  "UPDATE idempotency_open SET request = (SELECT request FROM idempotency_open WHERE key = 'other') WHERE key = 'k'",
		"the input of another":    "UPDATE idempotency_effects SET input = (SELECT input FROM idempotency_effects WHERE key = 'other') WHERE key = 'k'",
		"the request as an input": "UPDATE idempotency_effects SET input = (SELECT request FROM idempotency_open WHERE key = 'k') WHERE key = 'k'",
		"the input as an output":  "UPDATE idempotency_effects SET output = input, state = 2 WHERE key = 'k'",
		"another effect's":        "UPDATE idempotency_effects SET name = 'charge2' WHERE key = 'k'",
		"another attempt's":       "UPDATE idempotency_keys SET attempt_id = gen_random_uuid() WHERE key = 'k'",
		"another scope's":         "SET LOCAL session_replication_role = replica; UPDATE idempotency_keys SET scope = 'evil'; UPDATE idempotency_open SET scope = 'evil'; UPDATE idempotency_effects SET scope = 'evil'",
		"one that is not sealed":  `UPDATE idempotency_effects SET output = '"free"', state = 2 WHERE key = 'k'`,
		"a bit":                   "UPDATE idempotency_open SET request = set_bit(request, 200, 1 - get_bit(request, 200)) WHERE key = 'k'",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCaller(t)
			c.mute = true
			c.request("k")
			c.request("other")
			c.mute = false
			c.Exec(t, forge)
			c.Exec(t, "UPDATE idempotency_open SET next_at = now() WHERE key = 'k'")
			scope := c.Text(t, "SELECT scope FROM idempotency_open WHERE key = 'k'")
			sent := len(c.sent)
			result := c.engine.Resume(t.Context(), idempotency.Key{Scope: scope, Value: "k"})
			if result.Outcome != idempotency.OutcomeUnknown || result.Answer != nil || len(c.sent) != sent || len(c.resume) != 0 {
				t.Errorf("%+v; sent %d times, run %d times", result, len(c.sent)-sent, len(c.resume))
			}
			if result.Err == nil || strings.Contains(result.Err.Error(), "canary") {
				t.Errorf("error: %v", result.Err)
			}
		})
	}
}

// Requests that this program can't decrypt stay open, and do not keep others from ending.
func TestRequestsUnderAnUnknownKeyDoNotStopTheOthers(t *testing.T) {
	t.Parallel()
	c := newCaller(t)
	c.mute = true
	c.serve(encrypted.Keys{Current: encrypted.Key{ID: 9, Secret: [32]byte{9}}})
	const foreign = 8 // as many as the completer takes at once
	for i := range foreign {
		c.request(fmt.Sprint("foreign-", i))
	}
	c.serve(oneKey)
	c.request("ours")
	c.mute = false
	c.Exec(t, "UPDATE idempotency_open SET next_at = now() - interval '1 hour' WHERE key <> 'ours'")
	completer := idempotency.NewCompleter(c.engine, &idempotency.CompleterOptions{AtOnce: foreign, OnResume: func(idempotency.Key, idempotency.Result) {}})
	for deadline := time.Now().Add(20 * time.Second); c.Count(t, "SELECT count(*) FROM idempotency_open WHERE key = 'ours'") > 0; time.Sleep(10 * time.Millisecond) {
		if _, err := completer.Once(t.Context()); err != nil || time.Now().After(deadline) {
			t.Fatalf("ours is not completed: %v", err)
		}
	}
	if n := c.Count(t, "SELECT count(*) FROM idempotency_open"); n != foreign || len(c.resume) != 1 {
		t.Errorf("%d of the others are open, %d runs", n, len(c.resume))
	}
	// With the key named they end too.
	c.serve(encrypted.Keys{Current: oneKey.Current, Older: []encrypted.Key{{ID: 9, Secret: [32]byte{9}}}})
	c.complete(t, 0)
}

// The recorded answer of a request that was open is bound to it, as that of any other request.
func TestAnswerOfAnOpenRequestIsBoundToIt(t *testing.T) {
	t.Parallel()
	c := newCaller(t)
	for _, key := range []string{"a", "b"} {
		if result := c.request(key); result.Outcome != idempotency.OutcomeExecuted {
			t.Fatalf("%+v", result)
		}
	}
	c.Exec(t, "UPDATE idempotency_keys SET body = (SELECT body FROM idempotency_keys WHERE key = 'b') WHERE key = 'a'")
	if result := c.request("a"); result.Outcome != idempotency.OutcomeUnknown || result.Answer != nil {
		t.Errorf("%+v", result)
	}
	if result := c.request("b"); result.Outcome != idempotency.OutcomeReplayed || !bytes.Equal(result.Answer.Body, []byte(secretAnswer+secretOutput)) {
		t.Errorf("%+v", result)
	}
}

// LookUp decrypts the answer, and returns none that was changed.
func TestLookUpDecrypts(t *testing.T) {
	t.Parallel()
	c := newCaller(t)
	lookUp := func() idempotency.Result {
		return c.engine.LookUp(t.Context(), testservice.Request(idempotency.Key{Scope: "acme", Value: "k"}))
	}
	c.mute = true
	c.request("k")
	if result := lookUp(); !result.Accepted || result.Err != nil {
		t.Errorf("open: %+v", result)
	}
	c.mute = false
	c.complete(t, 0)
	if result := lookUp(); result.Outcome != idempotency.OutcomeReplayed || string(result.Answer.Body) != secretAnswer+secretOutput {
		t.Errorf("done: %+v", result)
	}
	c.Exec(t, "UPDATE idempotency_keys SET body = set_bit(body, 200, 1 - get_bit(body, 200))")
	if result := lookUp(); result.Reason != idempotency.ReasonRecordCorrupt || result.Answer != nil {
		t.Errorf("changed: %+v", result)
	}
	if result := idempotency.NewEngine(encrypted.New(memory.New(nil), oneKey), nil).LookUp(t.Context(), testservice.Request(idempotency.Key{Scope: "acme", Value: "k"})); !errors.Is(result.Err, idempotency.ErrNotKept) {
		t.Errorf("a store that keeps none open: %+v", result)
	}
}
