package middleware_test

import (
	"bufio"
	"compress/gzip"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
)

// Middleware outside changes an answer's headers and its length, and may change them differently
// for a retry.

// outside returns a mount with outer middleware that sets headers.
func outside(set func(h http.Header, r *http.Request)) func(*middleware.Middleware, http.Handler) http.Handler {
	return func(idem *middleware.Middleware, handler http.Handler) http.Handler {
		inner := idem.Handler(handler)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			set(w.Header(), r)
			inner.ServeHTTP(w, r)
		})
	}
}

// A deployment between a request and its retry changes the headers that are set outside: the retry
// gets those that the first client got.
func TestReplayOutlivesADeployment(t *testing.T) {
	t.Parallel()
	defaults := map[string]string{"Content-Type": "application/json", "Cache-Control": "no-store", "Content-Language": "de", "X-Request-Id": "1"}
	now := defaults
	b := setup(t, setupOptions{mount: outside(func(h http.Header, _ *http.Request) {
		for name, value := range now {
			h.Set(name, value)
		}
	})}, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, `{"id":1}`) })
	first := b.post(t, "/", "{}", "Idempotency-Key", "k")
	want(t, first, 200, idempotency.OutcomeExecuted, "")
	for _, now = range []map[string]string{
		{}, defaults, {"Content-Type": "text/html", "Cache-Control": "max-age=60", "Content-Language": "en", "X-Request-Id": "2", "X-Frame-Options": "DENY"},
	} {
		replay := b.post(t, "/", "{}", "Idempotency-Key", "k")
		want(t, replay, 200, idempotency.OutcomeReplayed, "")
		for _, name := range []string{"Content-Type", "Cache-Control", "Content-Language"} {
			if got := replay.header.Values(name); !slices.Equal(got, first.header.Values(name)) {
				t.Errorf("%s %q, want %q", name, got, first.header.Values(name))
			}
		}
		for _, name := range []string{"X-Request-Id", "X-Frame-Options"} { // of this answer, not of the record
			if replay.header.Get(name) != now[name] {
				t.Errorf("%s %q, want %q", name, replay.header.Get(name), now[name])
			}
		}
	}
}

// squeeze is the compressor of many tutorials: it leaves Content-Length as it is, because handlers
// set none.
type squeeze struct {
	io.Writer
	http.ResponseWriter
}

func (s squeeze) Write(p []byte) (int, error) { return s.Writer.Write(p) }

func squeezing(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Accept-Encoding") == "" {
			next.ServeHTTP(w, r)
			return
		}
		w.Header().Set("Content-Encoding", "gzip")
		z := gzip.NewWriter(w)
		defer func() { _ = z.Close() }()
		next.ServeHTTP(squeeze{z, w}, r)
	})
}

// Middleware outside may change the length of an answer: the first one, a replay, and a refusal.
// Its encoding is not recorded: a retry that does not accept gzip gets none.
func TestOutsideMayChangeTheLengthOfAnswers(t *testing.T) {
	t.Parallel()
	for name, body := range map[string]string{"short": `{"id":1}`, "long": `{"id":"` + strings.Repeat("1", 10_000) + `"}`, "empty": ""} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, handler http.Handler) http.Handler {
				return squeezing(idem.Handler(handler))
			}}, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(http.StatusCreated)
				_, _ = io.WriteString(w, body)
			})
			for _, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
				got := b.post(t, "/", "{}", "Idempotency-Key", "k") // Go's client asks for gzip, and takes it off
				want(t, got, 201, outcome, "")
				if got.body != body {
					t.Errorf("%s: %d bytes, want %d", outcome, len(got.body), len(body))
				}
			}
			want(t, b.post(t, "/other", "{}", "Idempotency-Key", "k"), 422, idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)
			want(t, b.post(t, "/", "{}"), 400, idempotency.OutcomeNotExecuted, idempotency.ReasonKeyMissing)
			plain := b.raw(t, "POST / HTTP/1.1\r\nHost: x\r\nAccount: acme\r\nIdempotency-Key: k\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}")
			want(t, plain, 201, idempotency.OutcomeReplayed, "")
			if plain.body != body || plain.header.Get("Content-Encoding") != "" {
				t.Errorf("without gzip: %d bytes, Content-Encoding %q", len(plain.body), plain.header.Get("Content-Encoding"))
			}
		})
	}
}

// net/http sets an answer's length, as for a bare handler: a short one has a length, and a long one
// is chunked or, for an HTTP/1.0 client, ends with its connection. If a handler sets the true
// length, it stays.
func TestLengthOfAnswersIsNetHTTPs(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 100_000)
	bodies := map[string]string{"/short": `{"id":1}`, "/long": long, "/said": long, "/wrong": long, "/empty": ""}
	b := setup(t, setupOptions{}, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/said":
			w.Header().Set("Content-Length", "100000")
		case "/wrong":
			w.Header()["content-length"] = []string{"7"}
		case "/304":
			w.WriteHeader(http.StatusNotModified)
			if _, err := io.WriteString(w, "x"); err != http.ErrBodyNotAllowed {
				t.Errorf("304 with a body: %v", err)
			}
		}
		_, _ = io.WriteString(w, bodies[r.URL.Path])
	})
	for path, lengths := range map[string][2]string{ // of the first answer and of a replay
		"/short": {"8", "8"}, "/empty": {"0", "0"}, "/long": {"", ""}, "/said": {"100000", ""}, "/wrong": {"100000", ""},
	} {
		for i, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
			got := b.post(t, path, "{}", "Idempotency-Key", path)
			want(t, got, 200, outcome, "")
			if got.body != bodies[path] || got.header.Get("Content-Length") != lengths[i] {
				t.Errorf("%s %s: %d bytes, Content-Length %q; want %q", outcome, path, len(got.body), got.header.Get("Content-Length"), lengths[i])
			}
		}
	}
	for _, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
		want(t, b.post(t, "/304", "{}", "Idempotency-Key", "none"), 304, outcome, "")
	}
	conn := b.dial(t)
	if _, err := io.WriteString(conn, "POST /long HTTP/1.0\r\nHost: x\r\nAccount: acme\r\nIdempotency-Key: old\r\nContent-Length: 2\r\n\r\n{}"); err != nil {
		t.Fatal(err)
	}
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := read(t, response); got.body != long || got.outcome != "executed" {
		t.Errorf("HTTP/1.0: %d bytes, %q", len(got.body), got.outcome)
	}
}

// cors does the same as CORS middleware. Mounted outside, its headers are on every answer; a
// preflight carries no key and passes.
func cors(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Add("Vary", "Origin")
		w.Header().Set("Access-Control-Allow-Origin", r.Header.Get("Origin"))
		w.Header().Set("Access-Control-Expose-Headers", "Idempotency-Status")
		if r.Method == http.MethodOptions {
			w.Header().Set("Access-Control-Allow-Headers", "Idempotency-Key, Content-Type")
			w.WriteHeader(http.StatusNoContent)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// A page can read every answer, whatever the outcome, and also a replay of another page's request:
// the CORS headers belong to the request that is answered.
func TestPagesOfTwoOriginsReadTheirAnswers(t *testing.T) {
	t.Parallel()
	entered, release := make(chan struct{}), make(chan struct{})
	b := setup(t, setupOptions{
		mount: func(idem *middleware.Middleware, h http.Handler) http.Handler { return cors(idem.Handler(h)) },
	}, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			close(entered)
			<-release
		}
		transfer(w, r)
	})
	readable := func(got reply, origin string) {
		t.Helper()
		if got.header.Get("Access-Control-Allow-Origin") != origin || len(got.header.Values("Access-Control-Allow-Origin")) != 1 || !slices.Equal(got.header.Values("Vary"), []string{"Origin"}) {
			t.Errorf("%d %s: Access-Control-Allow-Origin %q, Vary %q", got.status, got.outcome, got.header.Values("Access-Control-Allow-Origin"), got.header.Values("Vary"))
		}
	}
	for _, origin := range []string{"https://shop.example", "https://app.example"} {
		preflight := b.send(t, http.MethodOptions, "/", nil, "Origin", origin, "Access-Control-Request-Headers", "idempotency-key")
		if preflight.status != 204 || preflight.outcome != "" {
			t.Errorf("preflight: %d %q", preflight.status, preflight.outcome)
		}
		// Executed, then replayed.
		readable(b.post(t, "/", "{}", "Idempotency-Key", "k", "Origin", origin), origin)
		readable(b.post(t, "/", "{1}", "Idempotency-Key", "k", "Origin", origin), origin)
		readable(b.post(t, "/", "{}", "Origin", origin), origin)
	}
	first := make(chan reply)
	go func() { first <- b.post(t, "/slow", "{}", "Idempotency-Key", "slow", "Origin", "https://shop.example") }()
	<-entered
	conflict := b.post(t, "/slow", "{}", "Idempotency-Key", "slow", "Origin", "https://app.example")
	want(t, conflict, 409, idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
	readable(conflict, "https://app.example")
	close(release)
	readable(<-first, "https://shop.example")
	if b.effects(t) != 2 {
		t.Errorf("%d effects", b.effects(t))
	}
}

// The media type is compared byte by byte: if a proxy may rewrite it, it must always do so, or
// Options.Fingerprinters must leave it out.
func TestMediaTypesAreComparedByteByByte(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, transfer)
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "k", "Content-Type", "application/json"), 201, idempotency.OutcomeExecuted, "")
	for _, kind := range []string{"Application/JSON", "application/json; charset=utf-8", "application/json;charset=UTF-8"} {
		want(t, b.post(t, "/", "{}", "Idempotency-Key", "k", "Content-Type", kind), 422, idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)
	}
}

// A canceled call proves nothing about the request, so its answer is not final. A 423 or 424 is,
// unless the policy says otherwise.
func TestCanceledCallIsNoAnswerForGood(t *testing.T) {
	t.Parallel()
	for status, kept := range map[int]bool{408: false, 499: false, 423: true, 424: true} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			t.Parallel()
			first := true
			b := setup(t, setupOptions{}, func(w http.ResponseWriter, r *http.Request) {
				if first {
					first = false
					w.WriteHeader(status)
					return
				}
				transfer(w, r)
			})
			outcome := map[bool]idempotency.Outcome{true: idempotency.OutcomeExecuted, false: idempotency.OutcomeNotExecuted}[kept]
			want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), status, outcome, "")
			if kept {
				want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), status, idempotency.OutcomeReplayed, "")
			} else {
				want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 201, idempotency.OutcomeExecuted, "")
			}
		})
	}
}
