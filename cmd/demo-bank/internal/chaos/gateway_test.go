package chaos

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// gatewayOf returns a run with a gateway for one bank. The processor behind it answers the path
// /NNN with status NNN, and counts its answers.
func gatewayOf(t *testing.T) (r *run, answered *atomic.Int64) {
	t.Helper()
	answered = new(atomic.Int64)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		answered.Add(1)
		var status int
		if _, err := fmt.Sscanf(r.URL.Path, "/%d", &status); err != nil {
			panic(http.ErrAbortHandler)
		}
		w.Header().Set(processorHeader, "psp_1")
		w.WriteHeader(status)
		_, _ = fmt.Fprintf(w, "%s %s %s", r.Method, r.Header.Get("Idempotency-Key"), body)
	}))
	t.Cleanup(server.Close)
	r = &run{config: Config{Banks: 1}, started: time.Now(), tally: newTally()}
	r.keys = newRing(1, shares{topUp: 1000}, "aaaaaaaa")
	r.processor = newProcessor(r)
	r.processor.address = strings.TrimPrefix(server.URL, "http://")
	r.gateway = newGateway(r)
	if err := r.gateway.start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.gateway.close)
	return r, answered
}

// through sends a call, and returns its answer, or "cut".
func through(t *testing.T, r *run, method, path, key, body string) string {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), method, r.gateway.urls[0]+path, bytes.NewReader([]byte(body)))
	if err != nil {
		t.Fatal(err)
	}
	request.GetBody = nil
	request.Header.Set("Idempotency-Key", key)
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return "cut"
	}
	defer func() { _ = response.Body.Close() }()
	answer, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(response.StatusCode, " ", response.Header.Get(processorHeader), " ", string(answer))
}

// TestGatewayPassesWhatItShould: calls, look-ups and cuts pass as they are, and are known
// afterwards.
func TestGatewayPassesWhatItShould(t *testing.T) {
	t.Parallel()
	r, answered := gatewayOf(t)
	for _, test := range []struct{ method, path, want string }{
		{"POST", "/201", "201 psp_1 POST k {}"}, {"POST", "/402", "402 psp_1 POST k {}"}, {"GET", "/200?key=k", "200 psp_1 GET k "}, {"POST", "/cut", "cut"},
	} {
		got := through(t, r, test.method, test.path, "k", "{}")
		if got != test.want {
			t.Errorf("%s %s: %q, want %q", test.method, test.path, got, test.want)
		}
	}
	through(t, r, "POST", "/500", "for ever", "{}")
	through(t, r, "POST", "/503", "once", "{}")
	through(t, r, "POST", "/503", "once", "{ }")
	if !r.gateway.seen(callName{"/500", "for ever"}).forEver || r.gateway.seen(callName{"/503", "once"}).forEver {
		t.Error("it does not know what the processor repeats for ever")
	}
	if inputs := r.gateway.seen(callName{"/503", "once"}).inputs; !slices.Equal(inputs, []string{"{}", "{ }"}) {
		t.Errorf("the inputs are %q", inputs)
	}
	if r.gateway.posts.Load() != 6 || r.gateway.lookups.Load() != 1 || answered.Load() != 7 {
		t.Errorf("%d calls, %d look-ups, %d arrived", r.gateway.posts.Load(), r.gateway.lookups.Load(), answered.Load())
	}
}

// TestGatewayDoesWhatAScriptSays: a call of the script's key can be held, answered, or lost in
// either direction; others pass.
func TestGatewayDoesWhatAScriptSays(t *testing.T) {
	t.Parallel()
	r, answered := gatewayOf(t)
	k, other := r.keys.script(askTopUp, "-1"), r.keys.script(askTopUp, "-1")
	came, hold := make(chan struct{}), make(chan struct{})
	var before, after atomic.Int64
	verdicts := []verdict{
		{lose: true, before: func() { before.Add(1) }}, {cut: true, after: func() { after.Add(1) }},
		{answer: 402, body: "no"}, {hold: hold, before: func() { close(came) }},
	}
	r.gateway.hook(k, func(c *call) verdict { return verdicts[c.nth-1] })
	body := func(k *key) string {
		var order struct {
			Card string `json:"card"`
		}
		if err := json.Unmarshal(k.body(false), &order); err != nil {
			t.Fatal(err)
		}
		return order.Card
	}
	for i, want := range []struct {
		answer  string
		arrived int64
	}{{"cut", 0}, {"cut", 1}, {"402  no", 1}} {
		if got := through(t, r, "POST", "/201", "k", body(k)); got != want.answer || answered.Load() != want.arrived {
			t.Errorf("%d: %q, and %d arrived, want %+v", i, got, answered.Load(), want)
		}
	}
	if before.Load() != 1 || after.Load() != 1 {
		t.Errorf("called %d times before, %d after", before.Load(), after.Load())
	}
	held := make(chan string)
	go func() { held <- through(t, r, "POST", "/201", "k", body(k)) }()
	<-came
	for n := range int64(10) { // while the first one is held
		if got := through(t, r, "POST", "/201", "other", body(other)); !strings.HasPrefix(got, "201") || answered.Load() != n+2 {
			t.Errorf("another key: %q, and %d arrived", got, answered.Load())
		}
	}
	close(hold)
	if got := <-held; !strings.HasPrefix(got, "201") || answered.Load() != 12 {
		t.Errorf("held: %q, and %d arrived", got, answered.Load())
	}
}

// TestEachFaultOfTheProcessorIsOne: each kind makes the processor worse than a good one, and none
// makes it forget its keys while its look-up lags.
func TestEachFaultOfTheProcessorIsOne(t *testing.T) {
	t.Parallel()
	for seed := range uint64(50) {
		for _, e := range newSchedule((&Config{Profile: "smoke", Operations: 4000, Effects: true}).profile(), seed, 2).events {
			if !e.kind.ofProcessor() || e.kind == crashProcessor {
				continue
			}
			f := e.faults()
			good := goodProcessor()
			good.Seed = f.Seed
			if f == good || e.length <= 0 {
				t.Errorf("%+v is %+v", e, f)
			}
			if f.LookupLagMS > 0 && f.KeyLifetimeS < good.KeyLifetimeS {
				t.Errorf("%+v pays twice", e)
			}
		}
	}
}

// TestCommitsOfOpenRequestsAreKnown: by the statements that travel with them.
func TestCommitsOfOpenRequestsAreKnown(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]openCommit{
		"INSERT INTO transfers": "", `INSERT INTO "s"."idempotency_effects" (sent_first_at, epoch`: intentCommit,
		"WITH settled AS (UPDATE x": resultCommit, "), closed AS (DELETE FROM x": answerCommit,
	} {
		if got := openCommitOf([]byte(text)); got != want {
			t.Errorf("%s: %q, want %q", text, got, want)
		}
	}
}
