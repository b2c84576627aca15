package mwtest

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
)

// testCase guards one rule.
type testCase struct {
	name    string
	rule    string
	needs   need
	options func(o *middleware.Options)
	run     func(c *check)
}

// check is a running case.
type check struct {
	tester
	*Service
	features Features
	ctx      context.Context
	url      string
}

// Fatalf is the tester's.
func (c *check) Fatalf(format string, args ...any) {
	c.tester.Helper()
	c.tester.Fatalf(format, args...)
}

// Cleanup is the tester's.
func (c *check) Cleanup(f func()) { c.tester.Cleanup(f) }

// check runs the case. If it fails, check prints the broken rule.
func (one testCase) check(t tester, features Features, mount Mount, patience time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	s := newService(t, one.options)
	c := &check{tester: t, Service: s, features: features, ctx: ctx}
	c.url = mount(s)
	t.Cleanup(s.letGo) // before the server is closed
	defer func() {
		if t.Failed() {
			t.Logf("The rule: %s", one.rule)
		}
	}()
	one.run(c)
	c.letGo()
	if err := s.Store.awaitEnds(ctx, 0); err != nil {
		t.Errorf("a transaction did not end: %v", err)
	}
	if n := s.Store.changed(); n > 0 {
		t.Errorf("%d keys changed after they were claimed: clone the strings that the framework reuses (method, URI, host, headers)", n)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, fault := range slices.Compact(s.faults) {
		t.Errorf("%s", fault)
	}
}

// send sends a request with a body.
func (c *check) send(ctx context.Context, do, body string, keys ...string) (Reply, error) {
	return c.Service.send(ctx, c.url, do, strings.NewReader(body), keys...)
}

// post sends a request with a body that the handler has to see.
func (c *check) post(do string, keys ...string) Reply {
	c.Helper()
	c.expectBody("mwtest-1")
	got, err := c.send(c.ctx, do, content, keys...)
	if err != nil {
		c.Fatalf("POST %s: %v", do, err)
	}
	return got
}

// postLong is post with a body of n bytes.
func (c *check) postLong(n int, announced bool, key string) Reply {
	c.Helper()
	const begin, end = `{"amount":100,"padding":"`, `","token":"mwtest-1"}`
	c.expectBody("mwtest-1")
	var body io.Reader = strings.NewReader(begin + strings.Repeat("x", n-len(begin)-len(end)) + end)
	if !announced {
		body = struct{ io.Reader }{body}
	}
	got, err := c.Service.send(c.ctx, c.url, string(Answer), body, key)
	if err != nil {
		c.Fatalf("POST of %d bytes: %v", n, err)
	}
	return got
}

func (c *check) expectBody(token string) {
	c.Service.mu.Lock()
	defer c.Service.mu.Unlock()
	c.body = token
}

// begin sends a request that holds, and blocks until its handler runs. The result comes from the
// channel.
func (c *check) begin(ctx context.Context, key string) <-chan result {
	c.Helper()
	c.expectBody("mwtest-1")
	done := make(chan result, 1)
	go func() {
		got, err := c.send(ctx, doHold, content, key)
		done <- result{got, err}
	}()
	select {
	case <-c.entered:
	case early := <-done:
		c.Fatalf("the answer came before the handler ended: %v %v", early.reply, early.err)
	case <-c.ctx.Done():
		c.Fatalf("the handler did not run")
	}
	return done
}

type result struct {
	reply Reply
	err   error
}

// wait returns the answer of a request that began.
func (c *check) wait(done <-chan result) Reply {
	c.Helper()
	select {
	case got := <-done:
		if got.err != nil {
			c.Fatalf("%v", got.err)
		}
		return got.reply
	case <-c.ctx.Done():
		c.Fatalf("no answer came")
	}
	return Reply{}
}

// answered checks that an answer is that of the given run of the handler.
func (c *check) answered(got Reply, outcome idempotency.Outcome, run int) {
	c.Helper()
	id := fmt.Sprintf("run-%d", run)
	if got.Status/100 != 2 || got.Outcome != string(outcome) || !strings.Contains(got.Body, `"`+id+`"`) {
		c.Errorf("answer %v, want 2xx with %q, Idempotency-Status %q", got, id, outcome)
	}
	if location := got.Header.Get("Location"); !c.features.NoLocation && location != Prefix+"payments/"+id {
		c.Errorf("Location %q, want %q", location, Prefix+"payments/"+id)
	}
}

// refused checks that an answer is the middleware's own.
func (c *check) refused(got Reply, status int, outcome idempotency.Outcome, reason idempotency.Reason) {
	c.Helper()
	if got.Status != status || got.Outcome != string(outcome) || !strings.Contains(got.Body, "#"+string(reason)+`"`) {
		c.Errorf("answer %v, want %d, Idempotency-Status %q and the problem %s", got, status, outcome, reason)
	}
}

// replayed checks that a retry got the same answer.
func (c *check) replayed(got, first Reply) {
	c.Helper()
	if got.Outcome != string(idempotency.OutcomeReplayed) || got.Header.Get("Idempotent-Replayed") != "true" {
		c.Errorf("replay %v with Idempotent-Replayed %q, want Idempotency-Status %q and true", got, got.Header.Get("Idempotent-Replayed"), idempotency.OutcomeReplayed)
	}
	if got.Status != first.Status || got.Body != first.Body {
		c.Errorf("replay %v of the answer %v", got, first)
	}
	for _, name := range []string{"Content-Type", "Location"} {
		if !slices.Equal(got.Header[name], first.Header[name]) {
			c.Errorf("replay with %s %q, the first answer had %q", name, got.Header[name], first.Header[name])
		}
	}
}

// counted checks the number of runs, and of committed writes.
func (c *check) counted(runs, written int) {
	c.Helper()
	if got := c.Runs(); got != runs {
		c.Errorf("the handler ran %d times, want %d", got, runs)
	}
	if got := c.Store.Written(); got != written {
		c.Errorf("%d writes of the handler are committed, want %d", got, written)
	}
}

// ended blocks until as many transactions have ended, and checks how they did.
func (c *check) ended(want ...string) []End {
	c.Helper()
	if err := c.Store.awaitEnds(c.ctx, len(want)); err != nil {
		c.Fatalf("%v", err)
	}
	ends := c.Store.Ends()
	var got []string
	for _, end := range ends {
		got = append(got, end.String())
	}
	if !slices.Equal(got, want) {
		c.Fatalf("the transactions ended with %q, want %q", got, want)
	}
	return ends
}

// recorded checks that the last end recorded the answer as the client saw it.
func (c *check) recorded(ends []End, seen Reply) {
	c.Helper()
	answer := ends[len(ends)-1].Answer
	if answer == nil {
		c.Fatalf("nothing is recorded of the answer %v", seen)
	}
	if answer.Status != seen.Status || string(answer.Body) != seen.Body {
		c.Errorf("recorded %d %q, but the client saw %v", answer.Status, answer.Body, seen)
	}
	for _, name := range []string{"Content-Type", "Location"} {
		if !slices.Equal(answer.Header[name], seen.Header[name]) {
			c.Errorf("recorded with %s %q, but the client saw %q", name, answer.Header[name], seen.Header[name])
		}
	}
}
