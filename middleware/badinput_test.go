package middleware_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
)

// Keys that are refused, each as the bytes of its header lines.
func TestKeyInvalid(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, transfer)
	for name, lines := range map[string]string{
		"empty":                      "Idempotency-Key:",
		"spaces":                     "Idempotency-Key:   ",
		"empty string":               `Idempotency-Key: ""`,
		"two headers":                "Idempotency-Key: a\r\nIdempotency-Key: b",
		"two equal headers":          "Idempotency-Key: a\r\nIdempotency-Key: a",
		"a list":                     "Idempotency-Key: a, b",
		"a list of strings":          `Idempotency-Key: "a", "b"`,
		"256 characters":             "Idempotency-Key: " + strings.Repeat("k", 256),
		"256 characters quoted":      `Idempotency-Key: "` + strings.Repeat("k", 256) + `"`,
		"byte 0x80":                  "Idempotency-Key: a\x80",
		"UTF-8":                      "Idempotency-Key: schlüssel",
		"UTF-8 quoted":               `Idempotency-Key: "schlüssel"`,
		"inner tab":                  "Idempotency-Key: a\tb",
		"inner space":                "Idempotency-Key: a b",
		"inner space, quoted":        `Idempotency-Key: "a b"`,
		"folded":                     "Idempotency-Key: a\r\n b",
		"comma":                      "Idempotency-Key: a,b",
		"comma, quoted":              `Idempotency-Key: "a,b"`,
		"quote inside":               `Idempotency-Key: a"b`,
		"quote inside, quoted":       `Idempotency-Key: "a\"b"`,
		"unterminated quote":         `Idempotency-Key: "a`,
		"only a quote":               `Idempotency-Key: "`,
		"quote at the end":           `Idempotency-Key: a"`,
		"parameters":                 `Idempotency-Key: "a";version=1`,
		"something after the string": `Idempotency-Key: "a"b`,
	} {
		t.Run(name, func(t *testing.T) {
			got := b.raw(t, "POST / HTTP/1.1\r\nHost: x\r\nAccount: acme\r\n"+lines+"\r\nContent-Length: 2\r\n\r\n{}")
			want(t, got, 400, idempotency.OutcomeNotExecuted, idempotency.ReasonKeyInvalid)
		})
	}
	// net/http refuses these itself, before any handler.
	for name, key := range map[string]string{"NUL": "a\x00b", "DEL": "a\x7fb", "ESC": "a\x1bb", "bare CR": "a\rb", "900 KB": strings.Repeat("k", 900_000)} {
		t.Run(name, func(t *testing.T) {
			conn := b.dial(t)
			_, _ = io.WriteString(conn, "POST / HTTP/1.1\r\nHost: x\r\nAccount: acme\r\nIdempotency-Key: "+key+"\r\nContent-Length: 2\r\n\r\n{}")
			response, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				return // cut off before it was read to the end
			}
			_ = response.Body.Close()
			if response.StatusCode != 400 && response.StatusCode != 431 {
				t.Errorf("status %d", response.StatusCode)
			}
		})
	}
	if b.runs.Load() != 0 || b.records(t) != 0 {
		t.Errorf("%d runs, %d records", b.runs.Load(), b.records(t))
	}
}

func TestKeysThatAreFine(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, transfer)
	for i, spellings := range [][]string{
		{"k", `"k"`, "  k  ", "\t\"k\" "},
		{"8e03978e-40d5-43e8-bc93-6894a57f9324", `"8e03978e-40d5-43e8-bc93-6894a57f9324"`},
		{strings.Repeat("k", 255), `"` + strings.Repeat("k", 255) + `"`},
		{"';DROP-TABLE-idempotency_keys;--", `"';DROP-TABLE-idempotency_keys;--"`},
		{`a\b`, `"a\\b"`},
		{"!#$%&'()*+-./:;<=>?@[]^_`{|}~", "\"!#$%&'()*+-./:;<=>?@[]^_`{|}~\""},
	} {
		for n, spelling := range spellings {
			outcome := idempotency.OutcomeReplayed
			if n == 0 {
				outcome = idempotency.OutcomeExecuted
			}
			got := b.raw(t, "POST / HTTP/1.1\r\nHost: x\r\nAccount: acme\r\nIdempotency-Key:"+spelling+"\r\nContent-Length: 2\r\n\r\n{}")
			want(t, got, 201, outcome, "")
		}
		if b.records(t) != i+1 {
			t.Errorf("%d records after %q", b.records(t), spellings)
		}
	}
}

func TestKeyLengthLimitsOfARoute(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{middleware: &middleware.Options{KeyBytesMin: 8, KeyBytesMax: 10}}, transfer)
	for length, status := range map[int]int{7: 400, 8: 201, 10: 201, 11: 400} {
		if got := b.post(t, "/", "{}", "Idempotency-Key", `"`+strings.Repeat("k", length)+`"`); got.status != status {
			t.Errorf("%d characters: %d, want %d", length, got.status, status)
		}
	}
}

// A body that ends early or comes a byte a second is given up, and holds no connection meanwhile.
func TestBodyThatDoesNotArrive(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{poolMax: 1, server: func(s *http.Server) { s.ReadTimeout = 300 * time.Millisecond }}, transfer)
	const head = "POST / HTTP/1.1\r\nHost: x\r\nAccount: acme\r\nIdempotency-Key: k\r\n"

	slow := b.dial(t)
	if _, err := io.WriteString(slow, head+"Content-Length: 10\r\n\r\n{"); err != nil {
		t.Fatal(err)
	}
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "other"), 201, idempotency.OutcomeExecuted, "") // with the pool's only connection
	response, err := http.ReadResponse(bufio.NewReader(slow), nil)
	if err != nil {
		t.Fatal(err)
	}
	want(t, read(t, response), 408, idempotency.OutcomeNotExecuted, idempotency.ReasonBodyUnread)

	short := b.dial(t)
	if _, err := io.WriteString(short, head+"Content-Length: 10\r\n\r\n{"); err != nil {
		t.Fatal(err)
	}
	if err := short.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	response, err = http.ReadResponse(bufio.NewReader(short), nil)
	if err != nil {
		t.Fatal(err)
	}
	want(t, read(t, response), 400, idempotency.OutcomeNotExecuted, idempotency.ReasonBodyUnread)
	if b.runs.Load() != 1 {
		t.Errorf("%d runs, want 1", b.runs.Load())
	}
}

func TestBodiesThatAreFine(t *testing.T) {
	t.Parallel()
	var seen string
	b := setup(t, setupOptions{}, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		seen = string(body)
		transfer(w, r)
	})
	want(t, b.post(t, "/", "", "Idempotency-Key", "empty"), 201, idempotency.OutcomeExecuted, "")
	want(t, b.post(t, "/", "", "Idempotency-Key", "empty"), 201, idempotency.OutcomeReplayed, "")
	bomb := "\x1f\x8b\x08\x00 not inflated by anybody"
	want(t, b.post(t, "/", bomb, "Idempotency-Key", "gzip", "Content-Encoding", "gzip"), 201, idempotency.OutcomeExecuted, "")
	if seen != bomb {
		t.Errorf("the handler saw %q", seen)
	}
}

func TestAnswersAsNetHTTPWouldGiveThem(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		handler http.HandlerFunc
		status  int
		body    string
		header  map[string]string
	}{
		"103 is dropped": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusEarlyHints)
			w.WriteHeader(http.StatusAccepted)
		}, 202, "", nil},
		"the second status loses": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusAccepted)
			w.WriteHeader(http.StatusOK)
		}, 202, "", nil},
		"headers after the status are too late": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusAccepted)
			w.Header().Set("Location", "late")
		}, 202, "", map[string]string{"Location": ""}},
		"204 has no body": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusNoContent)
			if _, err := w.Write([]byte("x")); err != http.ErrBodyNotAllowed {
				t.Error(err)
			}
		}, 204, "", map[string]string{"Content-Length": ""}},
		"Content-Length is recomputed": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "99")
			_, _ = io.WriteString(w, "four")
		}, 200, "four", map[string]string{"Content-Length": "4"}},
		"the type is guessed": {func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, "<html>")
		}, 200, "<html>", map[string]string{"Content-Type": "text/html; charset=utf-8"}},
		"nothing at all is 200": {func(http.ResponseWriter, *http.Request) {}, 200, "", nil},
		"a redirect":            {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/there", http.StatusSeeOther) }, 303, "", map[string]string{"Location": "/there"}},
		"nothing goes out early": {func(w http.ResponseWriter, _ *http.Request) {
			controller := http.NewResponseController(w)
			if err := controller.Flush(); err == nil {
				t.Error("Flush works")
			}
			if _, _, err := controller.Hijack(); err == nil {
				t.Error("Hijack works")
			}
			if err := controller.SetWriteDeadline(time.Time{}); err == nil {
				t.Error("SetWriteDeadline works")
			}
			if _, ok := w.(interface{ Unwrap() http.ResponseWriter }); ok {
				t.Error("Unwrap leads around the recorder")
			}
		}, 200, "", nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, setupOptions{}, c.handler)
			for _, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
				got := b.post(t, "/", "{}", "Idempotency-Key", "k")
				want(t, got, c.status, outcome, "")
				if got.body != c.body {
					t.Errorf("%s: body %q, want %q", outcome, got.body, c.body)
				}
				for header, value := range c.header {
					if got.header.Get(header) != value {
						t.Errorf("%s: %s %q, want %q", outcome, header, got.header.Get(header), value)
					}
				}
			}
		})
	}
}

// F26: a client that hangs up, in whatever phase, finds its request executed once when it asks again.
func TestClientThatHangsUp(t *testing.T) {
	t.Parallel()
	entered := make(chan context.Context)
	release := make(chan struct{})
	b := setup(t, setupOptions{}, func(w http.ResponseWriter, r *http.Request) {
		entered <- r.Context()
		<-release
		transfer(w, r)
	})
	head := func(key string) string {
		return "POST / HTTP/1.1\r\nHost: x\r\nAccount: acme\r\nContent-Type: application/json\r\nIdempotency-Key: " + key + "\r\nContent-Length: 2\r\n\r\n"
	}
	hang := func(text string) {
		conn := b.dial(t)
		if _, err := io.WriteString(conn, text); err != nil {
			t.Fatal(err)
		}
		if err := conn.(*net.TCPConn).SetLinger(0); err != nil { // a reset
			t.Fatal(err)
		}
		_ = conn.Close()
	}
	hang(head("in-the-head")[:40])
	hang(head("in-the-body") + "{")

	// While the handler runs: its context lives on.
	conn := b.dial(t)
	if _, err := io.WriteString(conn, head("in-the-handler")+"{}"); err != nil {
		t.Fatal(err)
	}
	ctx := <-entered
	if err := conn.(*net.TCPConn).SetLinger(0); err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "in-the-handler"), 409, idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
	if ctx.Err() != nil {
		t.Errorf("the handler's context ended with its client: %v", ctx.Err())
	}
	close(release)
	go func() {
		for range entered { // later handlers need not wait
		}
	}()
	t.Cleanup(func() { close(entered) })
	want(t, b.settle(t, "in-the-handler"), 201, idempotency.OutcomeReplayed, "")
	hang(head("before-the-answer") + "{}")
	for _, key := range []string{"in-the-head", "in-the-body", "before-the-answer"} {
		if got := b.settle(t, key); got.status != 201 {
			t.Errorf("%s: %d %s", key, got.status, got.body)
		}
	}
	if b.effects(t) != 4 || b.records(t) != 4 {
		t.Errorf("%d effects, %d records; want 4 of each", b.effects(t), b.records(t))
	}
}

// F27: 200 duplicates at once are one run.
func TestDuplicatesAtOnce(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, transfer)
	const copies = 200
	start := make(chan struct{})
	answers := make(chan reply, copies)
	for range copies {
		go func() {
			<-start
			answers <- b.post(t, "/", "{}", "Idempotency-Key", "k")
		}()
	}
	close(start)
	seen := map[string]int{}
	bodies := map[string]bool{}
	for range copies {
		got := <-answers
		seen[fmt.Sprint(got.status, " ", got.outcome)]++
		if got.status == 201 {
			bodies[got.body] = true
		}
	}
	if seen["201 executed"] != 1 || seen["201 executed"]+seen["201 replayed"]+seen["409 in-progress"]+seen["503 not-executed"] != copies || len(bodies) != 1 {
		t.Errorf("answers %v, bodies %v", seen, bodies)
	}
	if b.runs.Load() != 1 || b.effects(t) != 1 {
		t.Errorf("%d runs, %d effects", b.runs.Load(), b.effects(t))
	}
}

// F28: outside an http.TimeoutHandler the client gets its 503, the work is finished, and the retry is a replay.
func TestTimeoutHandlerOutside(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, handler http.Handler) http.Handler {
		return http.TimeoutHandler(idem.Handler(handler), 50*time.Millisecond, "too slow")
	}}, func(w http.ResponseWriter, r *http.Request) {
		<-release
		transfer(w, r)
	})
	if got := b.post(t, "/", "{}", "Idempotency-Key", "k"); got.status != 503 || got.outcome != "" {
		t.Errorf("%d %q", got.status, got.outcome)
	}
	close(release)
	want(t, b.settle(t, "k"), 201, idempotency.OutcomeReplayed, "")
	if b.runs.Load() != 1 || b.effects(t) != 1 {
		t.Errorf("%d runs, %d effects", b.runs.Load(), b.effects(t))
	}
}

// F28: a handler that takes longer than it may.
func TestHandlerTimeout(t *testing.T) {
	t.Parallel()
	slow := true
	b := setup(t, setupOptions{middleware: &middleware.Options{Timeouts: idempotency.Timeouts{Handler: 200 * time.Millisecond}}}, func(w http.ResponseWriter, r *http.Request) {
		if slow {
			<-r.Context().Done()
		}
		transfer(w, r)
	})
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 503, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
	slow = false
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 201, idempotency.OutcomeExecuted, "")
}
