package psp

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestFaultsHaveDefaultsAndLimits checks GET /faults after PUT /faults, and both sides of each
// limit.
func TestFaultsHaveDefaultsAndLimits(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const defaults = `{"seed":1,"lose_request":0,"lose_reply":0,"error_after":0,"error_before":0,"slow_ms":0,"late":0,"late_ms":0,` +
		`"same_error":0,"down":false,"key_lifetime_s":86400,"keeps_declines":true,"lookup_lag_ms":0}` + "\n"
	const all = `{"seed":18446744073709551615,"lose_request":0.1,"lose_reply":0.2,"error_after":0.3,"error_before":0.4,"slow_ms":600000,"late":0.5,"late_ms":600000,` +
		`"same_error":1,"down":true,"key_lifetime_s":31622400,"keeps_declines":false,"lookup_lag_ms":600000}` + "\n"
	for _, test := range []struct{ put, get string }{
		{"", defaults}, {all, all}, {`{}`, defaults},
		{`{"key_lifetime_s":0.5}`, strings.Replace(defaults, "86400", "0.5", 1)},
	} {
		if test.put != "" {
			b.faults(test.put)
		}
		if r := b.do("GET", "/faults", "", ""); r.body != test.get {
			t.Errorf("after PUT %s they are %s", test.put, r.body)
		}
	}
	for _, refused := range []string{
		``, `[]`, `null`, `{"unknown":1}`, `{}{}`, `{"seed":-1}`, `{"seed":1.5}`, `{"down":1}`, `{"keeps_declines":"no"}`,
		`{"lose_request":1.01}`, `{"lose_request":-0.01}`, `{"lose_reply":2}`, `{"error_after":2}`, `{"error_before":2}`, `{"late":2}`, `{"same_error":2}`,
		`{"slow_ms":600001}`, `{"slow_ms":-1}`, `{"late_ms":600001}`, `{"lookup_lag_ms":600001}`,
		`{"key_lifetime_s":31622401}`, `{"key_lifetime_s":-1}`,
	} {
		if r := b.do("PUT", "/faults", "", refused); !r.is(400, `"invalid"`) {
			t.Errorf("PUT /faults %s: %+v", refused, r)
		}
	}
	if r := b.do("GET", "/faults", "", ""); !strings.Contains(r.body, `"key_lifetime_s":0.5`) {
		t.Errorf("refused faults changed them to %s", r.body)
	}
}

// TestEachFaultAndItsCounterpart: with a fault at probability 1 each service's request ends as the
// contract says, applied or not. Once it is off, the same request is applied once in all.
func TestEachFaultAndItsCounterpart(t *testing.T) {
	t.Parallel()
	const reset = 0
	for _, test := range []struct {
		fault, faults string
		status        int // or reset
		contains      string
		applied       int
		afterwards    int // status of the same request without faults; 0 for the service's own
	}{
		{"none", `{}`, 0, "", 1, 0},
		{"lose_request", `{"lose_request":1}`, reset, "", 0, 0},
		{"lose_reply", `{"lose_reply":1}`, reset, "", 1, 0},
		{"error_before", `{"error_before":1}`, 503, "unavailable", 0, 0},
		{"error_after", `{"error_after":1}`, 504, "timeout", 1, 0},
		{"same_error", `{"same_error":1}`, 500, "internal", 0, 500},
		{"down", `{"down":true}`, reset, "", 0, 0},
		{"at probability 0", `{"lose_request":0,"lose_reply":0,"error_before":0,"error_after":0,"late":0,"same_error":0,"late_ms":5000}`, 0, "", 1, 0},
	} {
		t.Run(test.fault, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			ch := b.do("POST", "/charges", "to refund", `{"card":"tok","amount":1}`).field("id")
			for _, service := range []struct {
				path, key, body string
				status          int
			}{
				{"/charges", "k", `{"card":"tok","amount":1}`, 201},
				{"/refunds", "k", `{"charge":"` + ch + `","amount":1}`, 201},
				{"/payouts", "k", `{"iban":"DE1","amount":1}`, 201},
				{"/mails", "", `{"to":"a","text":"t"}`, 202},
			} {
				mail := service.key == ""
				if test.fault == "same_error" && mail {
					continue // it needs a key
				}
				before := len(b.items(service.path))
				b.faults(test.faults)
				got := b.do("POST", service.path, service.key, service.body)
				if well := test.fault == "none" || test.fault == "at probability 0"; well && !got.is(service.status, "") {
					t.Errorf("%s: %+v", service.path, got)
				} else if !well && test.status == reset && !got.reset() {
					t.Errorf("%s: %+v, want a reset connection", service.path, got)
				} else if !well && test.status != reset && !got.is(test.status, test.contains) {
					t.Errorf("%s: %+v, want %d", service.path, got, test.status)
				}
				b.faults(`{}`)
				if applied := len(b.items(service.path)) - before; applied != test.applied {
					t.Errorf("%s: %d applied, want %d", service.path, applied, test.applied)
				}
				for range 2 {
					want := max(test.afterwards, service.status)
					if r := b.do("POST", service.path, service.key, service.body); !r.is(want, "") {
						t.Errorf("%s: without faults %+v, want %d", service.path, r, want)
					}
				}
				want := 1
				if mail {
					want = test.applied + 2 // each is sent
				} else if test.afterwards == 500 {
					want = 0
				}
				if applied := len(b.items(service.path)) - before; applied != want {
					t.Errorf("%s: %d in all, want %d", service.path, applied, want)
				}
			}
		})
	}
}

// TestAReplyIsLostOnReplaysToo: the faults of a reply meet the repeated answer as well.
func TestAReplyIsLostOnReplaysToo(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.charge("k")
	for faults, so := range map[string]func(reply) bool{
		`{"lose_reply":1}`:   reply.reset,
		`{"lose_request":1}`: reply.reset,
		`{"error_after":1}`:  func(r reply) bool { return r.is(504, "") },
		`{"error_before":1}`: func(r reply) bool { return r.is(503, "") },
		`{"same_error":1}`:   func(r reply) bool { return r.is(201, "") },
		`{"late":1}`:         func(r reply) bool { return r.is(201, "") },
	} {
		b.faults(faults)
		if r := b.charge("k"); !so(r) {
			t.Errorf("%s: %+v", faults, r)
		}
	}
	if n := len(b.items("/charges")); n != 1 {
		t.Errorf("%d charges", n)
	}
}

// TestALateRequestIsAppliedAfterItsCallerWasCutOff: until then its key is under way and its item
// not listed. A late decline is kept like any other.
func TestALateRequestIsAppliedAfterItsCallerWasCutOff(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const lateMS = 1500
	b.faults(fmt.Sprintf(`{"late":1,"late_ms":%d}`, lateMS))
	sent := time.Now()
	if r := b.charge("k"); !r.reset() {
		t.Errorf("%+v, want a reset connection", r)
	}
	if r := b.do("POST", "/charges", "no", `{"card":"0002","amount":1}`); !r.reset() {
		t.Errorf("%+v, want a reset connection", r)
	}
	if r := b.do("POST", "/mails", "", `{"to":"a","text":"t"}`); !r.reset() {
		t.Errorf("%+v, want a reset connection", r)
	}
	b.faults(`{}`)
	retry, other, items := b.charge("k"), b.do("POST", "/charges", "k", `{"card":"other","amount":1}`), b.items("/charges")
	if time.Since(sent) < lateMS*time.Millisecond { // else the machine was too slow to see it
		if !retry.is(409, "key_under_way") || !other.is(400, "key_reused") || len(items) != 0 {
			t.Errorf("meanwhile a retry got %+v, another body %+v, and the list is %v", retry, other, items)
		}
	}
	eventually(t, "the charge and the mail are applied", func() bool { return len(b.items("/charges")) == 1 && len(b.items("/mails")) == 1 })
	if waited := time.Since(sent); waited < lateMS*time.Millisecond {
		t.Errorf("it was applied after %v", waited)
	}
	if r := b.charge("k"); !r.is(201, "") || r.field("id") != b.items("/charges?key=k")[0]["id"] {
		t.Errorf("afterwards a retry got %+v", r)
	}
	eventually(t, "the decline is kept", func() bool {
		return b.do("POST", "/charges", "no", `{"card":"other","amount":1}`).is(400, "key_reused")
	})
}

// TestWhatIsLateEndsWithTheProcessor: it leaves nothing, as after a kill.
func TestWhatIsLateEndsWithTheProcessor(t *testing.T) {
	t.Parallel()
	file := t.TempDir() + "/psp"
	b := setup(t, func(c *Config) { c.File = file })
	b.faults(`{"late":1,"late_ms":600000}`)
	b.charge("k")
	b.stop()
	b = setup(t, func(c *Config) { c.File = file })
	b.faults(`{}`)
	if n := len(b.items("/charges")); n != 0 {
		t.Errorf("%d charges", n)
	}
	if r := b.charge("k"); !r.is(201, "") {
		t.Errorf("a retry got %+v", r)
	}
}

// TestAKeyLivesForItsLifetime: on one side of its end the answer is repeated, on the other the same
// key is a new one, whatever its body.
func TestAKeyLivesForItsLifetime(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		faults   string
		lifetime time.Duration
	}{
		{`{}`, 24 * time.Hour}, {`{"key_lifetime_s":1800}`, 30 * time.Minute}, {`{"key_lifetime_s":0.25}`, 250 * time.Millisecond},
	} {
		clock := newClock()
		b := setup(t, func(c *Config) { c.now = clock.now })
		b.faults(test.faults)
		first := b.charge("k")
		b.do("POST", "/charges", "no", `{"card":"0002","amount":1}`)
		clock.advance(test.lifetime - 1)
		if r := b.charge("k"); r.body != first.body {
			t.Errorf("%s: right before the end it answers %+v", test.faults, r)
		}
		if r := b.do("POST", "/charges", "no", `{"card":"tok","amount":1}`); !r.is(400, "key_reused") {
			t.Errorf("%s: right before the end a decline's key answers %+v", test.faults, r)
		}
		clock.advance(1)
		second := b.do("POST", "/charges", "k", `{"card":"another","amount":7}`)
		if !second.is(201, "another") || second.field("id") == first.field("id") {
			t.Errorf("%s: at the end it answers %+v", test.faults, second)
		}
		if r := b.do("POST", "/charges", "no", `{"card":"tok","amount":1}`); !r.is(201, "") {
			t.Errorf("%s: at the end a decline's key answers %+v", test.faults, r)
		}
		if n := len(b.items("/charges?key=k")); n != 2 {
			t.Errorf("%s: the key has %d charges", test.faults, n)
		}
		clock.advance(test.lifetime - 1)
		if r := b.do("POST", "/charges", "k", `{"card":"another","amount":7}`); r.body != second.body {
			t.Errorf("%s: the key's second life ended early: %+v", test.faults, r)
		}
	}
}

// TestAKeyUnderWayOutlivesItsLifetime: a lifetime of zero keeps no answer, but two at once are
// still one charge.
func TestAKeyUnderWayOutlivesItsLifetime(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.faults(`{"key_lifetime_s":0,"slow_ms":1000}`)
	replies := make(chan reply, 2)
	for range 2 {
		go func() { replies <- b.charge("k") }()
	}
	if one, other := <-replies, <-replies; one.status+other.status != 201+409 {
		t.Errorf("%+v and %+v", one, other)
	}
	b.faults(`{"key_lifetime_s":0}`)
	b.charge("k")
	if n := len(b.items("/charges")); n != 2 {
		t.Errorf("%d charges", n)
	}
}

// TestTheSameErrorIsForEver: other faults do not heal it, nor does a restart; the end of the key's
// lifetime does.
func TestTheSameErrorIsForEver(t *testing.T) {
	t.Parallel()
	clock, file := newClock(), t.TempDir()+"/psp"
	config := func(c *Config) { c.now, c.File = clock.now, file }
	b := setup(t, config)
	b.faults(`{"same_error":1}`)
	first := b.charge("k")
	b.faults(`{}`)
	clock.advance(24*time.Hour - 1)
	b.stop()
	b = setup(t, config)
	if r := b.charge("k"); !r.is(500, `{"error":"internal"}`) || r.body != first.body {
		t.Errorf("%+v, then %+v", first, r)
	}
	if r := b.do("POST", "/charges", "k", `{"card":"other","amount":1}`); !r.is(400, "key_reused") {
		t.Errorf("with another body: %+v", r)
	}
	clock.advance(1)
	if r := b.charge("k"); !r.is(201, "") {
		t.Errorf("after the key's lifetime: %+v", r)
	}
}

// TestDeclinesAreKeptOrNot: if they are not kept, the key is free for another body.
func TestDeclinesAreKeptOrNot(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, test := range []struct {
		path, refused, good string
		status              int
	}{
		{"/charges", `{"card":"0002","amount":1}`, `{"card":"tok","amount":1}`, 402},
		{"/payouts", `{"iban":"0002","amount":1}`, `{"iban":"DE1","amount":1}`, 422},
	} {
		for _, keeps := range []bool{true, false} {
			b.faults(fmt.Sprintf(`{"keeps_declines":%t}`, keeps))
			key := fmt.Sprint("keeps ", keeps)
			for range 2 {
				if r := b.do("POST", test.path, key, test.refused); !r.is(test.status, "") {
					t.Errorf("%s: %+v", test.path, r)
				}
			}
			want := 201
			if keeps {
				want = 400
			}
			if r := b.do("POST", test.path, key, test.good); r.status != want {
				t.Errorf("%s, keeps declines: %t: another body got %+v", test.path, keeps, r)
			}
		}
	}
}

// TestLookupsLag: by key an item is hidden while it is younger than the lag; the whole list is
// always fresh.
func TestLookupsLag(t *testing.T) {
	t.Parallel()
	clock := newClock()
	b := setup(t, func(c *Config) { c.now = clock.now })
	b.faults(`{"lookup_lag_ms":60000,"key_lifetime_s":1}`)
	b.charge("k")
	clock.advance(time.Minute - 1)
	b.charge("k")
	if fresh, lagging := b.items("/charges"), b.items("/charges?key=k"); len(fresh) != 2 || len(lagging) != 0 {
		t.Errorf("right before the lag's end %d are listed, %d by key", len(fresh), len(lagging))
	}
	clock.advance(1)
	if lagging := b.items("/charges?key=k"); len(lagging) != 1 {
		t.Errorf("at the lag's end %d are listed by key", len(lagging))
	}
	if items := b.items("/charges?key=other"); len(items) != 0 {
		t.Errorf("another key lists %v", items)
	}
	b.faults(`{}`)
	if items := b.items("/charges?key=k"); len(items) != 2 {
		t.Errorf("without a lag %d are listed by key", len(items))
	}
}

// TestASlowRequestIsAppliedThoughItsClientHungUp: a processor finishes the request.
func TestASlowRequestIsAppliedThoughItsClientHungUp(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.faults(`{"slow_ms":500}`)
	conn := b.dial()
	started := time.Now()
	conn.send(t, "k")
	b.underWay("k")
	if err := conn.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the charge is applied", func() bool { return len(b.items("/charges")) == 1 })
	if waited := time.Since(started); waited < 500*time.Millisecond {
		t.Errorf("it was applied after %v", waited)
	}
}

// rawConn is a connection without an HTTP client.
type rawConn struct{ net.Conn }

func (b *bundle) dial() rawConn {
	b.t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(b.server.URL(), "http://"))
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { _ = conn.Close() }) // it may be closed already
	if err := conn.SetDeadline(time.Now().Add(waitMax)); err != nil {
		b.t.Fatal(err)
	}
	return rawConn{conn}
}

func (c rawConn) send(t *testing.T, key string) {
	t.Helper()
	const body = `{"card":"tok","amount":1}`
	if _, err := fmt.Fprintf(c, "POST /charges HTTP/1.1\r\nHost: psp\r\nIdempotency-Key: %s\r\nContent-Length: %d\r\n\r\n%s", key, len(body), body); err != nil {
		t.Fatal(err)
	}
}

// TestALostConnectionIsReset: the client finds RST, not an orderly end that looks like an empty
// answer. It finds no byte of an answer before it, also on a connection that worked before.
func TestALostConnectionIsReset(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for name, faults := range map[string]string{
		"lose_request": `{"lose_request":1}`, "lose_reply": `{"lose_reply":1}`, "late": `{"late":1,"late_ms":1}`, "down": `{"down":true}`,
	} {
		for _, used := range []bool{false, true} {
			conn := b.dial()
			if used {
				b.faults(`{}`)
				conn.send(t, "works")
				response, err := http.ReadResponse(bufio.NewReader(conn), nil)
				if err != nil || response.StatusCode != 201 {
					t.Fatalf("%s: %v %v", name, response, err)
				}
				_, _ = io.Copy(io.Discard, response.Body) // the status is enough
			}
			b.faults(faults)
			conn.send(t, fmt.Sprint(name, used))
			if n, err := conn.Read(make([]byte, 1)); n != 0 || !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s, used: %t: %d bytes and %v, want a reset", name, used, n, err)
			}
		}
	}
}

// TestDownRefusesAllButItsEnd: every path is cut, and nothing is applied; a client can still read
// the faults and end them.
func TestDownRefusesAllButItsEnd(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.faults(`{"down":true}`)
	for _, path := range []string{"/charges", "/refunds", "/payouts", "/mails", "/instance", "/nothing"} {
		if r := b.do("GET", path, "", ""); !r.reset() {
			t.Errorf("GET %s: %+v", path, r)
		}
	}
	if r := b.charge("k"); !r.reset() {
		t.Errorf("POST /charges: %+v", r)
	}
	if r := b.do("GET", "/faults", "", ""); !r.is(200, `"down":true`) {
		t.Errorf("GET /faults: %+v", r)
	}
	b.faults(`{}`)
	if n := len(b.items("/charges")); n != 0 {
		t.Errorf("%d charges", n)
	}
	if r := b.charge("k"); !r.is(201, "") {
		t.Errorf("afterwards: %+v", r)
	}
}

// TestASeedRepeatsItsFaults: the faults of a key's requests depend on the seed, and not on other
// keys. PUT /faults restarts them. The share of requests that are hit is close to the probability.
func TestASeedRepeatsItsFaults(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const keys, each, probability = 40, 5, 0.4
	hits := func(seed, from int) (pattern string) {
		b.faults(fmt.Sprintf(`{"seed":%d,"error_after":%v}`, seed, probability))
		statuses := [keys][]byte{}
		for range each {
			for i := range keys {
				i = (i + from) % keys
				mark := byte('.')
				if b.charge(fmt.Sprint("k", i)).status == 504 {
					mark = 'x'
				}
				statuses[i] = append(statuses[i], mark)
			}
		}
		for _, s := range statuses {
			pattern += string(s)
		}
		return pattern
	}
	first := hits(7, 0)
	if again := hits(7, keys/2); again != first {
		t.Errorf("seed 7 gives %s, then %s", first, again)
	}
	if other := hits(8, 0); other == first {
		t.Errorf("seed 8 gives the same: %s", other)
	}
	share := float64(strings.Count(first, "x")) / (keys * each)
	if math.Abs(share-probability) > 0.15 {
		t.Errorf("%.2f are hit, want about %.2f", share, probability)
	}
}
