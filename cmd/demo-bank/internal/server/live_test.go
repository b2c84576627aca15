package server

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"reflect"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/live"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/live/livetest"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// storm starts a storm through the page's form. changes are names and values in turn; a value may
// be several words.
func (b *bundle) storm(changes ...string) reply {
	b.t.Helper()
	form := url.Values{"mode": {"both"}, "keys": {"40"}, "copies": {"1"}, "clients": {"4"}, "share": {"50"}}
	for i := 0; i < len(changes); i += 2 {
		form[changes[i]] = strings.Fields(changes[i+1])
	}
	return b.send("POST", "/live/storm", form.Encode(), "Content-Type", "application/x-www-form-urlencoded", "Accept", "application/json")
}

// watch reads the page's stream until enough returns true, and returns the state.
func (b *bundle) watch(enough func(s *livetest.State) bool) *livetest.State {
	b.t.Helper()
	var s livetest.State
	b.read(func(e livetest.Event) bool {
		if err := s.Apply(e); err != nil {
			b.t.Error(err)
			return false
		}
		return !enough(&s)
	})
	if s.Epoch == "" {
		b.t.FailNow()
	}
	return &s
}

// read reads the page's stream while more returns true.
func (b *bundle) read(more func(e livetest.Event) bool) {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), watchMax)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, b.url+"/live/events", nil)
	if err != nil {
		b.t.Error(err)
		return
	}
	client := http.Client{Transport: b.http.Transport} // without its Timeout
	response, err := client.Do(r)
	if err != nil {
		b.t.Error(err)
		return
	}
	defer response.Body.Close()
	for e, err := range livetest.Events(response.Body) {
		if err != nil {
			b.t.Errorf("the stream broke: %v", err)
			return
		}
		if !more(e) {
			return
		}
	}
	b.t.Error("the stream ended")
}

// watchMax limits the wait for a storm's end. It is long because the machine may be loaded.
const watchMax = 3 * time.Minute

// over reports whether the storm has ended, is audited, and has a proof from after its end.
func over(s *livetest.State) bool {
	return s.Storm != nil && s.Storm.State != live.StormRunning && s.Storm.Audit != "" && s.Proof != nil && !s.Proof.InFlight && s.Proof.Run == s.Storm.Run && s.Proof.AtMS > s.Storm.EndedMS
}

// expectExact requires that the protected twin lost nothing and its proof holds.
func expectExact(t *testing.T, s *livetest.State, payments int64) {
	t.Helper()
	twin := s.Twin(live.Protected)
	if twin == nil {
		t.Fatal("there is no protected twin")
	}
	if twin.Payments != payments || twin.Transfers != payments || twin.Doubles != 0 || twin.LostMoney != 0 || s.Storm.Differing != 0 {
		t.Errorf("the protected twin is %+v", twin)
	}
	for _, check := range twin.Checks {
		if !check.OK {
			t.Errorf("%s: %d, want %d", check.Name, check.Got, check.Want)
		}
	}
	if s.Storm.State != live.StormEnded || s.Storm.Audit != "ok" || s.Storm.Answered != s.Storm.Copies {
		t.Errorf("the storm is %+v", s.Storm)
	}
}

// TestEachFaultBites shows the effect of each fault on either side. The protected twin is always
// exact.
func TestEachFaultBites(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, test := range []struct {
		fault   live.Fault
		doubles bool // of the unprotected twin
		bites   func(protected, unprotected live.Counts) bool
	}{
		{live.FaultRequestLost, false, func(p, u live.Counts) bool { return p.LostRequests > 5 && u.LostRequests > 5 && p.Replayed == 0 }},
		{live.FaultReplyLost, true, func(p, u live.Counts) bool {
			return p.LostReplies > 5 && u.LostReplies > 5 && p.Replayed >= 5 && u.Executed > p.Executed
		}},
		{live.FaultDuplicate, true, func(p, u live.Counts) bool { return p.Replayed+p.InProgress > 5 && u.Executed > 45 }},
		{live.FaultSlow, false, func(p, u live.Counts) bool { return p.Attempts == 40 && u.Attempts == 40 }},
		{live.FaultKilled, false, func(p, u live.Counts) bool { return p.Failed > 5 && u.Failed > 5 }},
		// The engine runs the handler again. Without it the client must retry.
		{live.FaultSerialization, false, func(p, u live.Counts) bool { return p.Attempts == 40 && p.Failed == 0 && u.Failed > 5 }},
	} {
		if r := b.storm("fault", string(test.fault)); r.status != http.StatusAccepted {
			t.Fatalf("%s: %d %s", test.fault, r.status, r.body)
		}
		s := b.watch(over)
		expectExact(t, s, 40)
		twin := s.Twin(live.Unprotected)
		if twin.Payments != 40 || test.doubles != (twin.Doubles > 0) || twin.LostMoney != twin.Doubles*s.Storm.Amount || twin.Transfers != 40+twin.Doubles {
			t.Errorf("%s: the unprotected twin is %+v", test.fault, twin)
		}
		if !test.bites(s.Counts[0], s.Counts[1]) || s.Counts[0].Executed != 40 {
			t.Errorf("%s: attempts came to %+v", test.fault, s.Counts)
		}
		if test.fault == live.FaultSlow {
			if took := s.Storm.EndedMS - s.Storm.StartedMS; took < 80 {
				t.Errorf("slow handlers took %d ms", took)
			}
		}
	}
	if audit := b.audit(); !audit.OK || audit.Accounts != 1002+6*4 {
		t.Errorf("audit is %+v", audit)
	}
}

// TestFiftyViewersOfAStorm: each viewer gets every update once, in order, with the same bytes as
// all others, and at least a tenth of a second after the previous one. Their sum is the state that
// a new viewer sees at the end. The bank's memory does not grow with the viewers' time.
func TestFiftyViewersOfAStorm(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const viewers = 50
	seen := make([]map[int64]string, viewers)
	atMS := regexp.MustCompile(`^{"at_ms":([0-9]+)`)
	last := make(chan struct{}) // closed when the first viewer has seen the end
	var end livetest.State
	var ready, group sync.WaitGroup
	ready.Add(viewers)
	for i := range viewers {
		seen[i] = map[int64]string{}
		group.Go(func() {
			opened := sync.OnceFunc(ready.Done)
			defer opened()
			sequence, before := int64(-1), int64(0)
			if i == 0 {
				defer close(last)
			}
			b.read(func(e livetest.Event) bool {
				opened()
				if sequence >= 0 && (e.Kind != "update" || e.Sequence() != sequence+1) {
					t.Errorf("viewer %d: after event %d comes %s %s", i, sequence, e.Kind, e.ID)
				}
				sequence = e.Sequence()
				if e.Kind == "update" {
					seen[i][sequence] = e.Data
					at, err := strconv.ParseInt(atMS.FindStringSubmatch(e.Data)[1], 10, 64)
					if err != nil || at-before < 99 { // milliseconds are truncated
						t.Errorf("viewer %d: an update %d ms after the one before", i, at-before)
					}
					before = at
				}
				if i > 0 {
					select {
					case <-last:
						return false
					default:
						return true
					}
				}
				if err := end.Apply(e); err != nil {
					t.Error(err)
					return false
				}
				return !over(&end)
			})
		})
	}
	ready.Wait()
	heap := func() int64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	before := heap()
	if r := b.storm("keys", "60", "copies", "2", "clients", "6", "share", "40", "fault", "reply-lost request-lost duplicate killed serialization"); r.status != http.StatusAccepted {
		t.Fatalf("%d %s", r.status, r.body)
	}
	group.Wait()
	// Other tests run in parallel, and this one keeps the events.
	if grown := heap() - before; grown > 32<<20 {
		t.Errorf("the heap grew by %d bytes", grown)
	}
	expectExact(t, &end, 60)
	if twin := end.Twin(live.Unprotected); twin == nil || twin.Doubles < 60 || twin.LostMoney != twin.Doubles*end.Storm.Amount {
		t.Errorf("the unprotected twin is %+v", twin)
	}
	for i, events := range seen {
		for sequence, data := range seen[0] {
			if other, ok := events[sequence]; ok && other != data {
				t.Errorf("viewer %d saw another event %d", i, sequence)
			}
		}
		if len(events) == 0 { // a storm on a fast machine has two
			t.Errorf("viewer %d saw no update", i)
		}
	}
	fresh := b.watch(over)
	end.AtMS, end.Proof.AtMS, end.Proof.TookMS = fresh.AtMS, fresh.Proof.AtMS, fresh.Proof.TookMS
	if !reflect.DeepEqual(&end, fresh) {
		t.Errorf("who watched sees\n%+v\nwho came later\n%+v", &end, fresh)
	}
}

// TestOneStormAtATime: only one storm runs. It can be stopped, and its attempts until then stay
// visible.
func TestOneStormAtATime(t *testing.T) {
	t.Parallel()
	b := setup(t)
	slow := []string{"keys", "2000", "clients", "2", "fault", "slow"}
	if r := b.storm(slow...); r.status != http.StatusAccepted {
		t.Fatalf("%d %s", r.status, r.body)
	}
	expectProblem(t, b.storm(slow...), http.StatusConflict, "storm-runs")
	b.watch(func(s *livetest.State) bool { return s.Storm != nil && s.Storm.Answered > 2 })
	if r := b.send("POST", "/live/storm/stop", "", "Accept", "application/json"); r.status != http.StatusAccepted {
		t.Errorf("stop: %d %s", r.status, r.body)
	}
	s := b.watch(over)
	if s.Storm.State != live.StormStopped || s.Storm.Audit != "ok" || s.Storm.Answered >= s.Storm.Copies {
		t.Errorf("the storm is %+v", s.Storm)
	}
	if twin := s.Twin(live.Protected); twin == nil || twin.Doubles != 0 || twin.Transfers == 0 {
		t.Errorf("the protected twin is %+v", twin)
	}
	if r := b.storm("keys", "1"); r.status != http.StatusAccepted {
		t.Errorf("after it: %d %s", r.status, r.body)
	}
}

// TestAStormIsNotStartedFromAnotherSite: a request from another site or an invalid form starts no
// storm. A browser without scripts is redirected to the page.
func TestAStormIsNotStartedFromAnotherSite(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const form = "mode=both&keys=1&copies=1&clients=1&share=0"
	const formType = "application/x-www-form-urlencoded"
	for _, headers := range [][]string{
		{"Sec-Fetch-Site", "cross-site"}, {"Sec-Fetch-Site", "same-site"}, {"Origin", "https://example.com"}, {"Origin", "null"},
	} {
		for _, path := range []string{"/live/storm", "/live/storm/stop", "/live/topup", "/live/statements"} {
			if r := b.send("POST", path, form, append(headers, "Content-Type", formType)...); r.status != http.StatusForbidden {
				t.Errorf("%s with %q: %d", path, headers, r.status)
			}
		}
	}
	expectProblem(t, b.storm("keys", "2001"), http.StatusBadRequest, "invalid-storm")
	expectProblem(t, b.send("POST", "/live/storm", form+"&x="+strings.Repeat("x", 5000), "Content-Type", formType), http.StatusBadRequest, "invalid-storm")
	expectProblem(t, b.send("GET", "/live/storm", ""), http.StatusMethodNotAllowed, "method-not-allowed")
	if s := b.watch(func(s *livetest.State) bool { return s.Proof != nil }); s.Storm != nil || s.Proof.Run != "" {
		t.Errorf("there was a storm: %+v", s.Storm)
	}
	client := *b.http
	client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, b.url+"/live/storm", strings.NewReader(form))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", formType)
	r.Header.Set("Origin", b.url)
	response, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusSeeOther || response.Header.Get("Location") != "/" {
		t.Errorf("the page's own form is answered %d", response.StatusCode)
	}
	expectExact(t, b.watch(over), 1)
}

// TestAForeignFaultIsIgnored: only the bank's own storm can break its handlers. A foreign request
// with the storm's header is served and shown like any other.
func TestAForeignFaultIsIgnored(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, value := range []string{"killed", " killed", "token killed", strings.Repeat("0", 64) + " killed", ""} {
		r := b.send("POST", "/v1/transfers", `{"from":"alice","to":"bob","amount":1}`, "Idempotency-Key", "key-"+fmt.Sprint(len(value)), "Demo-Bank-Storm", value)
		if r.status != http.StatusCreated || r.outcome() != "executed" {
			t.Errorf("%q: %d %s", value, r.status, r.outcome())
		}
	}
	s := b.watch(func(s *livetest.State) bool { return true })
	if s.Counts[0].Executed != 5 || len(s.Lanes) != 5 || s.Counts[1].Attempts != 0 {
		t.Errorf("the page saw %+v and %d lanes", s.Counts, len(s.Lanes))
	}
	for _, lane := range s.Lanes {
		if strings.Contains(lane.Label, "key") {
			t.Errorf("a lane shows its key: %q", lane.Label)
		}
	}
}

// TestStreamsDoNotHoldUpTheEnd: the bank stops at once even with a running storm and viewers, one
// of which does not read.
func TestStreamsDoNotHoldUpTheEnd(t *testing.T) {
	t.Parallel()
	s := New(Config{Addr: "127.0.0.1:0", DatabaseURL: pgtest.Database(t), PoolSize: 16})
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	select {
	case <-s.Serving():
	case err := <-ended:
		t.Fatal(err)
	}
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	b := &bundle{t: t, url: s.URL(), http: &http.Client{Transport: transport}}
	deaf, err := net.Dial("tcp", strings.TrimPrefix(b.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer deaf.Close()
	if _, err := io.WriteString(deaf, "GET /live/events HTTP/1.1\r\nHost: bank\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	reader := bufio.NewReader(deaf)
	if line, err := reader.ReadString('\n'); err != nil || !strings.Contains(line, "200") {
		t.Fatalf("the stream begins with %q, %v", line, err)
	}
	if r := b.storm("keys", "2000", "fault", "slow"); r.status != http.StatusAccepted {
		t.Fatalf("%d %s", r.status, r.body)
	}
	b.watch(func(s *livetest.State) bool { return s.Storm != nil && s.Storm.Answered > 0 })
	cancel()
	started := time.Now()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("the bank ended with %v", err)
		}
	case <-time.After(startTimeout):
		t.Fatal("the bank did not end")
	}
	// The gate lingers for a second on open connections. ShutdownTimeout is 30 seconds.
	if took := time.Since(started); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
	if _, err := io.Copy(io.Discard, reader); err != nil {
		t.Errorf("the stream of who did not read ended with %v", err)
	}
}

// TestTopUpWhoseProcessorLosesItsReplyIsShown: without effects the card is charged and nothing is
// posted; with them the completer posts the one charge, although the client has given up. The
// bank's own books stay right.
func TestTopUpWhoseProcessorLosesItsReplyIsShown(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for range 2 {
		if r := b.send("POST", "/live/topup", "", "Accept", "application/json"); r.status != http.StatusAccepted {
			t.Fatalf("%d %s", r.status, r.body)
		}
		b.expectTopUp()
	}
}

func (b *bundle) expectTopUp() {
	b.t.Helper()
	s := b.watch(func(s *livetest.State) bool { return s.TopUp != nil && s.TopUp.State != live.TopUpRunning })
	protected, unprotected := s.TopUp.Sides[0], s.TopUp.Sides[1]
	if s.TopUp.State != live.TopUpEnded || protected.Charges != 1 || protected.Postings != 1 || unprotected.Charges != 1 || unprotected.Postings != 0 {
		b.t.Errorf("%+v", s.TopUp)
	}
	for side, steps := range map[string][]string{"lost|undone|knows of nothing": unprotected.Steps, "lost|202 pending|runs again|completer has|201 replayed": protected.Steps} {
		for _, want := range strings.Split(side, "|") {
			if !strings.Contains(strings.Join(steps, " "), want) {
				b.t.Errorf("no step says %q: %q", want, steps)
			}
		}
	}
	if r := b.send("GET", "/v1/audit", ""); !strings.Contains(string(r.body), `"ok":true`) {
		b.t.Errorf("the audit says %s", r.body)
	}
}
