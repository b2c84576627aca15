package chaos

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/check"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/storm"
	"github.com/paidonce/idempotency/internal/pgfault"
)

// bankOf answers requests one after another from its list: a status and an outcome each, or "cut".
// After the last one it answers executed.
type bankOf struct {
	mu      sync.Mutex
	answers []string
	bodies  []string
	keys    []string
	begun   int
}

func (b *bankOf) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b.mu.Lock()
	b.begun++
	b.mu.Unlock()
	body, err := io.ReadAll(r.Body)
	b.mu.Lock()
	defer b.mu.Unlock()
	if err != nil {
		return
	}
	n := len(b.bodies)
	b.bodies, b.keys = append(b.bodies, string(body)), append(b.keys, r.Header.Get("Idempotency-Key"))
	next := "201 executed"
	if n < len(b.answers) {
		next = b.answers[n]
	}
	if next == "cut" {
		panic(http.ErrAbortHandler)
	}
	var status int
	var outcome string
	_, _ = fmt.Sscanf(next, "%d %s", &status, &outcome) // without an outcome there is none
	if outcome != "" {
		w.Header().Set("Idempotency-Status", outcome)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = fmt.Fprint(w, `{"id":"77"}`)
}

// clientOf returns a run without faults that has b as its one bank, and a lane to it.
func clientOf(t *testing.T, b http.Handler, giveUp float64) (*run, *lane) {
	t.Helper()
	server := httptest.NewServer(b)
	t.Cleanup(server.Close)
	r := &run{config: Config{Banks: 1, Seed: 1}, profile: profile{giveUp: giveUp, shares: allShares}, started: time.Now(), tally: newTally()}
	r.keys = newRing(1, allShares, "aaaaaaaa")
	r.banks = newBanks(r)
	r.banks.slots = []*slot{{run: r, address: strings.TrimPrefix(server.URL, "http://")}}
	l := newLane(r, 0)
	t.Cleanup(l.Close)
	return r, l
}

// diaryOf gives a run its diary.
func diaryOf(t *testing.T, r *run) {
	t.Helper()
	file, err := os.Create(filepath.Join(t.TempDir(), "chaos.log"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = file.Close() })
	r.diary = file
}

func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	for until := time.Now().Add(30 * time.Second); !so(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(until) {
			t.Fatalf("it never came true: %s", what)
		}
	}
}

func aTransfer() *key {
	return &key{text: "chaos-aaaaaaaa-00000000", from: "acct-0001", to: "acct-0002", amount: 3}
}

// TestAClientDoesWhatTheGuaranteesSay: a client retries with the same key and bytes until it has
// its answer, whatever came before, and gives up if it may.
func TestAClientDoesWhatTheGuaranteesSay(t *testing.T) {
	t.Parallel()
	for name, one := range map[string]struct {
		answers []string
		asks    int
		givenUp bool
	}{
		"executed":                     {[]string{"201 executed"}, 1, false},
		"replayed":                     {[]string{"201 replayed"}, 1, false},
		"declined":                     {[]string{"402 executed"}, 1, false},
		"in progress":                  {[]string{"409 in-progress", "409 in-progress"}, 3, false},
		"unknown":                      {[]string{"503 unknown"}, 2, false},
		"the reply is lost":            {[]string{"cut", "cut"}, 3, false},
		"not-executed":                 {[]string{"503 not-executed"}, 1, true},
		"unknown, then not-executed":   {[]string{"503 unknown", "503 not-executed", "500 not-executed"}, 4, false},
		"lost, then not-executed":      {[]string{"cut", "503 not-executed"}, 3, false},
		"in progress, then not":        {[]string{"409 in-progress", "503 not-executed"}, 3, false},
		"an answer that says nothing":  {[]string{"503"}, 2, false},
		"an outcome that is not known": {[]string{"200 perhaps"}, 2, false},
	} {
		b := &bankOf{answers: one.answers}
		r, l := clientOf(t, b, 1)
		k := aTransfer()
		l.ask(t.Context(), k, false, storm.NoTrouble)
		if len(b.bodies) != one.asks || k.abandoned() != one.givenUp || k.settled == one.givenUp {
			t.Errorf("%s: it asked %d times, gave up: %t, has its answer: %t", name, len(b.bodies), k.givenUp, k.settled)
		}
		for i := range b.bodies {
			if b.bodies[i] != string(k.body(false)) || b.keys[i] != k.text {
				t.Errorf("%s: it sent %s under %s", name, b.bodies[i], b.keys[i])
			}
		}
		if len(l.ops) != one.asks || r.tally.finished.Load() != int64(one.asks) {
			t.Errorf("%s: of %d requests %d are in the history, %d counted", name, one.asks, len(l.ops), r.tally.finished.Load())
		}
		if strange := strings.Contains(name, "an "); strange != (r.unexpected.count > 0) {
			t.Errorf("%s: unexpected: %v", name, r.unexpected.examples)
		}
	}
}

// TestWhatAClientSaw: the history has the requests and their replies, including lost replies.
func TestWhatAClientSaw(t *testing.T) {
	t.Parallel()
	_, l := clientOf(t, &bankOf{answers: []string{"cut"}}, 0)
	k := aTransfer()
	l.ask(t.Context(), k, false, storm.NoTrouble)
	lost, answered := l.ops[0], l.ops[1]
	if lost.Returned != 0 || lost.Outcome != "" || lost.Status != 0 || lost.Answer != [32]byte{} || lost.Sent == 0 {
		t.Errorf("a lost reply is %+v", lost)
	}
	if answered.Returned <= answered.Sent || answered.Outcome != "executed" || answered.Status != 201 || answered.ID != "77" ||
		answered.Answer == [32]byte{} || answered.From != k.from || answered.To != k.to || answered.Amount != k.amount || answered.Scope != "public" {
		t.Errorf("an answer is %+v", answered)
	}
	if lost.Request != answered.Request {
		t.Error("a retry is another request")
	}
	for _, result := range check.History(append(l.ops, final(answered)), []check.Expectation{{Scope: "public", Key: k.text}}) {
		if !result.OK() {
			t.Errorf("the history is not one of a good bank: %+v", result)
		}
	}
}

func final(op check.Operation) check.Operation {
	op.Final, op.Outcome, op.Sent, op.Returned = true, "replayed", op.Returned+1, op.Returned+2
	return op
}

// TestAChangedBodyMustBeAMismatch: a changed body must get a mismatch, and the key's own body must
// not.
func TestAChangedBodyMustBeAMismatch(t *testing.T) {
	t.Parallel()
	for answer, one := range map[string]struct{ changed, wrong bool }{
		"422 mismatch": {true, false}, "201 replayed": {true, true}, "201 executed": {true, true},
		"422 mismatch ": {false, true},
	} {
		r, l := clientOf(t, &bankOf{answers: []string{answer}}, 0)
		l.ask(t.Context(), aTransfer(), one.changed, storm.NoTrouble)
		if got := r.unexpected.count > 0; got != one.wrong {
			t.Errorf("%s to a changed body (%t) is wrong: %t", answer, one.changed, got)
		}
		if changed := l.ops[0].Request%2 == 1; changed != one.changed {
			t.Errorf("the history does not tell bodies apart: %+v", l.ops[0])
		}
	}
}

// TestTroubleIsMade: each kind of trouble does what its name says, and is followed by the request
// itself.
func TestTroubleIsMade(t *testing.T) {
	t.Parallel()
	for _, one := range []struct {
		storm.Trouble
		lost, whole int // replies that are missed; bodies that arrive
	}{{storm.Cut, 1, 2}, {storm.HangUp, 1, 2}, {storm.HalfSent, 0, 1}, {storm.Slow, 0, 1}} {
		b := &bankOf{}
		r, l := clientOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			b.mu.Lock()
			first := b.begun == 0
			b.mu.Unlock()
			if first && one.lost > 0 { // otherwise its reply might come in time
				_, _ = io.Copy(io.Discard, r.Body)
				b.mu.Lock()
				b.begun, b.bodies, b.keys = b.begun+1, append(b.bodies, ""), append(b.keys, "")
				b.mu.Unlock()
				select {
				case <-r.Context().Done():
				case <-time.After(time.Second): // the first one never came, and this is the second
				}
				panic(http.ErrAbortHandler)
			}
			b.ServeHTTP(w, r)
		}), 0)
		k := aTransfer()
		started := time.Now()
		l.ask(t.Context(), k, false, one.Trouble)
		lost := 0
		for _, op := range l.ops {
			if op.Returned == 0 {
				lost++
			}
		}
		if lost != one.lost || len(b.bodies) != one.whole || !k.settled || r.unexpected.count > 0 {
			t.Errorf("trouble %d: %d replies were lost, %d bodies arrived: %q", one.Trouble, lost, len(b.bodies), b.bodies)
		}
		if one.Trouble == storm.Slow && time.Since(started) < 100*time.Millisecond {
			t.Error("a slow body was quick")
		}
		if one.Trouble == storm.HalfSent && b.begun != 2 {
			t.Errorf("the half-sent body did not come: %d requests", b.begun)
		}
	}
}

// TestAHalfSentBodyForbidsNothing: it cannot have been executed, so a client may give up after it.
func TestAHalfSentBodyForbidsNothing(t *testing.T) {
	t.Parallel()
	_, l := clientOf(t, &bankOf{answers: []string{"503 not-executed"}}, 1)
	k := aTransfer()
	l.ask(t.Context(), k, false, storm.HalfSent)
	if !k.abandoned() || len(l.ops) != 1 {
		t.Errorf("it was given up: %t; %d operations", k.abandoned(), len(l.ops))
	}
}

// TestAHangUpAtCommitReachesTheClient: every client of either tenant that waits for the key hangs
// up, and no other does.
func TestAHangUpAtCommitReachesTheClient(t *testing.T) {
	t.Parallel()
	arrived := make(chan struct{}, 2)
	r, l := clientOf(t, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		arrived <- struct{}{}
		<-r.Context().Done()
	}), 0)
	k, twin, other := r.keys.next(), r.keys.next(), r.keys.next()
	twin.text = k.text
	var group sync.WaitGroup
	for n, one := range []*key{k, twin} {
		group.Go(func() {
			lane := newLane(r, n+1)
			defer lane.Close()
			if what := lane.send(t.Context(), one, false, false, storm.NoTrouble); what != resultLost || len(lane.ops) != 1 {
				t.Errorf("a client that was hung up makes of it %d, %d operations", what, len(lane.ops))
			}
		})
	}
	_, hangUp := context.WithCancel(t.Context())
	defer hangUp()
	spared := true
	other.waits(l, func() { spared = false })
	<-arrived
	<-arrived
	r.keys.hangUp(k)
	group.Wait()
	if !spared || k.hangUps != nil {
		t.Errorf("another key's client was spared: %t; still waiting: %v", spared, k.hangUps)
	}
}

// TestNobodyThere: a request that found no bank is no operation, and its client may still give up.
func TestNobodyThere(t *testing.T) {
	t.Parallel()
	address, err := freeAddress()
	if err != nil {
		t.Fatal(err)
	}
	r, l := clientOf(t, &bankOf{}, 1)
	r.banks.slots[0].address = address
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	k := aTransfer()
	l.ask(ctx, k, false, storm.NoTrouble)
	if len(l.ops) != 0 || r.tally.unsent.Load() == 0 || r.tally.finished.Load() != 0 || k.tainted {
		t.Errorf("%d operations, %d unsent, %d finished, tainted: %t", len(l.ops), r.tally.unsent.Load(), r.tally.finished.Load(), k.tainted)
	}
}

// TestSettledAfterTheLastFault: the reported time is that from the last fault to the last first
// answer of a key. Copies and scripts don't count. If all keys had their answers before the fault,
// it is 0.
func TestSettledAfterTheLastFault(t *testing.T) {
	t.Parallel()
	r, l := clientOf(t, &bankOf{}, 0)
	ask := func(k *key) { l.ask(t.Context(), k, false, storm.NoTrouble) }
	early, late, script := aTransfer(), aTransfer(), aTransfer()
	script.scripted = true
	ask(early)
	r.noteFault()
	ask(early)
	ask(script)
	if after := r.settledAfter(); after != 0 {
		t.Errorf("all keys had their answers before the fault, and %v are reported", after)
	}
	ask(late)
	after := r.settledAfter()
	if after <= 0 {
		t.Error("a key got its answer after the fault, and 0 is reported")
	}
	ask(late)
	ask(script)
	if again := r.settledAfter(); again != after {
		t.Errorf("a copy and a script made %v of %v", again, after)
	}
}

// TestFaultsOfCommits: each fault meets a COMMIT that carries a key, at its number or at the first
// later one to which it can apply. Other COMMITs meet none.
func TestFaultsOfCommits(t *testing.T) {
	t.Parallel()
	r, _ := clientOf(t, &bankOf{}, 0)
	diaryOf(t, r)
	r.schedule.commits = []commitFault{{1, cutBefore, 0}, {2, halfOpen, 0}, {3, cutAfter, 0}, {4, lateCommit, time.Second}, {9, silence, 0}}
	r.commits = newCommits(r)
	plain, hot := r.keys.next(), r.keys.next()
	plain.text, hot.text = string(r.keys.prefix)+"00000000", string(r.keys.prefix)+"00000001"
	plain.hot, hot.hot = false, true
	fault := func(k *key) pgfault.Kind {
		return r.commits.fault(0, pgfault.Commit{Messages: []byte("INSERT " + k.text + " COMMIT")}).Kind
	}
	if kind := r.commits.fault(0, pgfault.Commit{Messages: []byte("COMMIT")}).Kind; kind != pgfault.Forward || r.commits.seen.Load() != 0 {
		t.Errorf("a COMMIT without a key met %v", kind)
	}
	for n, one := range []struct {
		key  *key
		want pgfault.Kind
	}{
		{hot, pgfault.CutBefore}, {hot, pgfault.Forward}, {hot, pgfault.CutAfter}, {hot, pgfault.LateCommit},
		{hot, pgfault.Forward}, {plain, pgfault.HalfOpen}, {plain, pgfault.Forward}, {plain, pgfault.Forward}, {plain, pgfault.Silence},
	} {
		if got := fault(one.key); got != one.want {
			t.Errorf("COMMIT %d met %v, want %v", n+1, got, one.want)
		}
	}
	if !r.commits.exhausted() || r.tally.commitFaults.total() != 5 || !hot.exempt || !plain.exempt {
		t.Errorf("%d faults are left, %d counted; exempt: %t, %t", len(r.commits.left), r.tally.commitFaults.total(), hot.exempt, plain.exempt)
	}
	r.commits.left = []commitFault{{1, cutBefore, 0}}
	r.healed.Store(true)
	if got := fault(plain); got != pgfault.Forward {
		t.Errorf("after all was healed a COMMIT met %v", got)
	}
}
