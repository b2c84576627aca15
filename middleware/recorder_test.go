package middleware_test

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
	"github.com/paidonce/idempotency/storage/postgres"
)

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
		"a redirect": {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/there", http.StatusSeeOther) }, 303, "", map[string]string{"Location": "/there"}},
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
			w.WriteHeader(http.StatusOK)
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

// An answer may be exactly as long as its limit.
func TestAnswerAtItsLimit(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{middleware: &middleware.Options{AnswerBytesMax: 100}}, func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write(make([]byte, 60))
		_, _ = w.Write(make([]byte, 40))
	})
	for _, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
		got := b.post(t, "/", "{}", "Idempotency-Key", "k")
		want(t, got, 200, outcome, "")
		if len(got.body) != 100 {
			t.Errorf("%s: %d bytes, want 100", outcome, len(got.body))
		}
	}
}

// The handler decides about its headers: an encoded body gets no guessed type, and outer headers
// that the handler removed stay removed.
func TestHeadersOfTheAnswerAreTheHandlers(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, handler http.Handler) http.Handler {
		inner := idem.Handler(handler)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Outside", "set")
			w.Header().Set("X-Kept", "set")
			inner.ServeHTTP(w, r)
		})
	}}, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Del("X-Outside")
		w.Header().Set("Content-Encoding", "gzip")
		_, _ = io.WriteString(w, "\x1f\x8b\x08")
	})
	r, err := http.NewRequest("POST", b.server.URL, strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	// Without Accept-Encoding the transport would decode the body.
	r.Header = http.Header{"Account": {"acme"}, "Idempotency-Key": {"k"}, "Accept-Encoding": {"gzip"}}
	response, err := b.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	got := read(t, response)
	want(t, got, 200, idempotency.OutcomeExecuted, "")
	if _, set := got.header["Content-Type"]; set || got.header.Get("X-Outside") != "" || got.header.Get("X-Kept") != "set" {
		t.Errorf("header %v", got.header)
	}
}

// Whatever headers a handler sets, in any spelling, the record and the replay have only those of
// the allow-list and the service's own. They have none that Connection names, no credential, and no
// value that ends its line. The first client gets all of them but the middleware's own.
func TestReplayHoldsTheAllowListAndNothingElse(t *testing.T) {
	t.Parallel()
	own := []string{"X-Own", "x-request-cost"}
	allowed := []string{
		"cache-control", "content-disposition", "content-encoding", "content-language", "content-type", "etag", "link", "location",
		"retry-after", "vary", "x-own", "x-request-cost",
	}
	names := slices.Concat(allowed, allowed, neverOnTheWire, []string{
		"x-authorization", "x-api-key", "x-amz-security-token", "authorization-info", "set-cookie3", "cookie2", "x-forwarded-authorization",
		"idempotency-status", "idempotent-replayed", "idempotency-key", "location2", "server", "strict-transport-security", "refresh",
		"access-control-allow-origin", "access-control-expose-headers",
	})
	spelled := rapid.OneOf(
		rapid.Custom(func(t *rapid.T) string {
			return rapid.SampledFrom(spellings(rapid.SampledFrom(names).Draw(t, "name"))).Draw(t, "spelling")
		}),
		rapid.StringMatching(`[A-Za-z!#$%&'*+.^_|~-]{1,12}`), // any token
	)
	value := rapid.OneOf(rapid.String(), rapid.SampledFrom([]string{
		"", "x", "session=secret", "a\r\nSet-Cookie: b", "a\nb", "\x00", "close", "close, etag", "Location ,\tVARY", " x-own", "ü",
	}))
	rapid.Check(t, func(t *rapid.T) {
		set := rapid.MapOfN(spelled, rapid.SliceOfN(value, 0, 3), 0, 6).Draw(t, "headers")
		if rapid.Bool().Draw(t, "Connection names one of them") && len(set) > 0 {
			token := rapid.SampledFrom(slices.Sorted(maps.Keys(set))).Draw(t, "which")
			set[rapid.SampledFrom(spellings("Connection")).Draw(t, "spelling")] = []string{"close", "x , " + rapid.SampledFrom(spellings(token)).Draw(t, "token")}
		}
		store := memory.New(nil)
		scope := func(*http.Request) (string, error) { return "acme", nil }
		handler := middleware.New(store, scope, &middleware.Options{RecordHeaders: own, Logger: slog.New(slog.DiscardHandler)}).Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			for name, values := range set {
				w.Header()[name] = values
			}
			w.WriteHeader(http.StatusCreated)
		}))
		send := func() http.Header {
			r := httptest.NewRequest(http.MethodPost, "/", nil)
			r.Header.Set("Idempotency-Key", "k")
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, r)
			if w.Code != http.StatusCreated {
				t.Fatalf("%d %s", w.Code, w.Body)
			}
			return w.Header()
		}
		first, again := send(), send()
		if first.Get("Idempotency-Status") != "executed" || again.Get("Idempotency-Status") != "replayed" {
			t.Fatalf("%v, then %v", first, again)
		}
		var named []string // by Connection
		for name, values := range set {
			if strings.EqualFold(name, "Connection") {
				for _, token := range strings.Split(strings.Join(values, ","), ",") {
					named = append(named, strings.ToLower(strings.TrimSpace(token)))
				}
			}
		}
		ours := []string{"idempotency-status", "idempotent-replayed", "idempotency-created-at", "idempotency-expires-at", "content-length"}
		recorded := store.Records()[idempotency.Key{Scope: "acme", Value: "k"}].Answer.Header
		for where, header := range map[string]map[string][]string{"the record": recorded, "the replay": again} {
			for name, values := range header {
				lower := strings.ToLower(name)
				if where == "the replay" && slices.Contains(ours, lower) {
					continue
				}
				// So that net/http guesses none.
				if where == "the replay" && name == "Content-Type" && values == nil {
					continue
				}
				if !slices.Contains(allowed, lower) || slices.Contains(neverOnTheWire, lower) || slices.Contains(named, lower) {
					t.Fatalf("%s holds %s", where, name)
				}
				if strings.ContainsAny(strings.Join(values, ""), "\r\n\x00") {
					t.Fatalf("%s holds %s: %q", where, name, values)
				}
			}
		}
		if status := again.Values("Idempotency-Status"); len(status) != 1 || len(again.Values("Idempotent-Replayed")) != 1 {
			t.Fatalf("Idempotency-Status %q", status)
		}
		// And nothing of the allow-list is lost.
		for name, values := range set {
			lower := strings.ToLower(name)
			if slices.Contains(allowed, lower) && !slices.Contains(named, lower) && len(values) > 0 && len(recorded[http.CanonicalHeaderKey(name)]) < len(values) {
				t.Fatalf("%s: %q is recorded as %q", name, values, recorded[http.CanonicalHeaderKey(name)])
			}
		}
	})
}

// If a handler wants no Content-Type, the first answer and the replays have none.
func TestReplayGuessesNoType(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, func(w http.ResponseWriter, _ *http.Request) {
		w.Header()["Content-Type"] = nil
		_, _ = io.WriteString(w, "<html>")
	})
	for _, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
		got := b.post(t, "/", "{}", "Idempotency-Key", "k")
		want(t, got, 200, outcome, "")
		if types := got.header["Content-Type"]; types != nil {
			t.Errorf("%s: Content-Type %q", outcome, types)
		}
	}
}

// A replay has the recorded headers of the first answer unchanged: the same bytes and spellings,
// and no header more.
func TestReplayHasTheHeadersOfTheFirstAnswer(t *testing.T) {
	t.Parallel()
	for name, set := range map[string]func(h http.Header){
		"bytes":       func(h http.Header) { h.Set("Content-Disposition", "attachment; filename=\"caf\xe9\"") },
		"spelling":    func(h http.Header) { h["ETag"] = []string{`"v1"`} },
		"no sniffing": func(h http.Header) { h["Content-Type"] = nil },
	} {
		b := setup(t, setupOptions{}, func(w http.ResponseWriter, _ *http.Request) {
			set(w.Header())
			_, _ = io.WriteString(w, "<html>")
		})
		first := b.post(t, "/", "", "Idempotency-Key", "k")
		replay := b.post(t, "/", "", "Idempotency-Key", "k")
		want(t, replay, 200, idempotency.OutcomeReplayed, "")
		for _, header := range middleware.RecordedHeaders() {
			if !slices.Equal(first.header.Values(header), replay.header.Values(header)) {
				t.Errorf("%s: %s is %q, then %q", name, header, first.header.Values(header), replay.header.Values(header))
			}
		}
	}
}

// Headers that could not be read back must not be recorded: each retry would be unknown until the
// record expires.
func TestHeadersOverTheLimitFail(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, func(w http.ResponseWriter, _ *http.Request) {
		for range 20 {
			w.Header().Add("Link", strings.Repeat("x", 60_000))
		}
		w.WriteHeader(http.StatusOK)
	})
	b.client.Transport.(*http.Transport).MaxResponseHeaderBytes = 4 << 20
	for range 2 {
		want(t, b.post(t, "/", "", "Idempotency-Key", "k"), 500, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
	}
}

// Outer code chooses the type by the Accept header. A retry with another one gets the first
// answer's bytes, and so its type.
func TestReplayHasTheTypeOfItsBytes(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{mount: outside(func(h http.Header, r *http.Request) {
		h.Set("Content-Type", r.Header.Get("Accept"))
		h.Add("Vary", "Accept")
	})}, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Add("Vary", "Account")
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, "in "+w.Header().Get("Content-Type"))
	})
	first := b.post(t, "/", "{}", "Idempotency-Key", "k", "Accept", "application/json")
	replay := b.post(t, "/", "{}", "Idempotency-Key", "k", "Accept", "application/xml")
	want(t, replay, 201, idempotency.OutcomeReplayed, "")
	for _, got := range []reply{first, replay} {
		if got.body != "in application/json" || got.header.Get("Content-Type") != "application/json" || !slices.Equal(got.header.Values("Vary"), []string{"Accept", "Account"}) {
			t.Errorf("%s, Content-Type %q, Vary %q", got.body, got.header.Values("Content-Type"), got.header.Values("Vary"))
		}
	}
}

// A record with a planted header that is never recorded is not replayed.
func TestPlantedHeaderIsNeverReplayed(t *testing.T) {
	t.Parallel()
	told := &tracer{}
	b := setup(t, setupOptions{middleware: &middleware.Options{Tracer: told}}, transfer)
	for i, name := range []string{
		"Set-Cookie", "set-cookie", "SET-COOKIE2", "Authorization", "Www-Authenticate", "Proxy-Authenticate", "Transfer-Encoding",
		"transfer-encoding", "Content-Length", "Connection", "Keep-Alive", "Upgrade", "Trailer", "Te", "Date", "Idempotency-Status",
		"idempotent-replayed",
	} {
		key := fmt.Sprint("k", i)
		want(t, b.post(t, "/", "{}", "Idempotency-Key", key), 201, idempotency.OutcomeExecuted, "")
		b.plant(t, key, encodeRecorded(name, "planted"))
		got := b.post(t, "/", "{}", "Idempotency-Key", key)
		t.Log(name)
		want(t, got, 500, idempotency.OutcomeUnknown, idempotency.ReasonRecordCorrupt)
		if strings.Contains(fmt.Sprint(got.header), "planted") || got.header.Get("Idempotent-Replayed") != "" {
			t.Errorf("header %v", got.header)
		}
		if len(told.refused) != i+1 || told.refused[i].Reason != idempotency.ReasonRecordCorrupt || told.refused[i].Status != 500 {
			t.Fatalf("told %+v", told.refused)
		}
	}
	// Earlier releases recorded Access-Control headers if RecordHeaders listed them: they are left
	// out of a replay.
	for _, name := range []string{"Access-Control-Allow-Origin", "access-control-allow-credentials"} {
		want(t, b.post(t, "/", "{}", "Idempotency-Key", name), 201, idempotency.OutcomeExecuted, "")
		b.plant(t, name, encodeRecorded(name, "planted"))
		got := b.post(t, "/", "{}", "Idempotency-Key", name)
		want(t, got, 201, idempotency.OutcomeReplayed, "")
		if got.header.Get(name) != "" {
			t.Errorf("%s is replayed", name)
		}
	}
	if logged := b.logs.String(); !strings.Contains(logged, "level=ERROR") || !strings.Contains(logged, "reason=record-corrupt") || strings.Contains(logged, "planted") {
		t.Errorf("logged %s", logged)
	}
	if b.effects(t) != b.records(t) {
		t.Errorf("%d effects of %d keys", b.effects(t), b.records(t))
	}
}

// Other parts of a service's chain: proxies, timeouts, limits and clients.

// A gateway mounts a reverse proxy as the handler. The upstream may stream, send 1xx, speak the
// same protocol, or break off: an answer that broke off is not recorded, and its writes are undone.
func TestReverseProxyAsHandler(t *testing.T) {
	t.Parallel()
	upstream := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		flush := http.NewResponseController(w).Flush
		switch r.Header.Get("Mode") {
		case "break":
			w.Header().Set("Content-Length", "100")
			w.WriteHeader(http.StatusCreated)
			_, _ = io.WriteString(w, "half")
			_ = flush()
			panic(http.ErrAbortHandler)
		case "hints":
			w.Header().Set("Link", "</a.css>; rel=preload")
			w.WriteHeader(http.StatusEarlyHints)
		case "stream":
			w.WriteHeader(http.StatusCreated)
			for range 3 {
				_, _ = io.WriteString(w, "x")
				_ = flush()
			}
			return
		}
		w.Header().Set("Idempotency-Status", "replayed")
		w.Header().Set("Idempotent-Replayed", "true")
		w.WriteHeader(http.StatusCreated)
		_, _ = io.WriteString(w, "key "+r.Header.Get("Idempotency-Key"))
	}))
	t.Cleanup(upstream.Close)
	target, err := url.Parse(upstream.URL)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(target)
	proxy.FlushInterval = -1
	proxy.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	b := setup(t, setupOptions{}, func(w http.ResponseWriter, r *http.Request) {
		if _, err := postgres.Tx(r.Context()).Exec(r.Context(), "INSERT INTO effects DEFAULT VALUES"); err != nil {
			t.Error(err)
		}
		proxy.ServeHTTP(w, r)
	})
	for mode, body := range map[string]string{"plain": "key plain", "hints": "key hints", "stream": "xxx"} {
		for _, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
			got := b.post(t, "/", "{}", "Idempotency-Key", mode, "Mode", mode)
			want(t, got, 201, outcome, "")
			if got.body != body {
				t.Errorf("%s: %q, want %q", mode, got.body, body)
			}
		}
	}
	before := b.effects(t)
	for range 2 {
		r, err := http.NewRequest(http.MethodPost, b.server.URL, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		r.Header = http.Header{"Account": {"acme"}, "Idempotency-Key": {"break"}, "Mode": {"break"}}
		response, err := b.client.Do(r)
		if err == nil {
			_, err = io.ReadAll(response.Body)
			_ = response.Body.Close()
		}
		if err == nil {
			t.Error("the client got an answer")
		}
	}
	if n := b.effects(t); n != before || b.records(t) != 3 {
		t.Errorf("%d effects of an answer that broke off, %d records", n-before, b.records(t))
	}
}

// A handler of server-sent events finds that it can't stream, and its answer says so.
func TestServerSentEventsAreRefused(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, func(w http.ResponseWriter, _ *http.Request) {
		if _, ok := w.(http.Flusher); !ok {
			http.Error(w, "streaming is not supported", http.StatusInternalServerError)
		}
	})
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 500, idempotency.OutcomeNotExecuted, "")
}

// Only the status decides, not the body: an error within a 200, as in GraphQL, is a final answer,
// and its writes are committed.
func TestErrorWithinA200IsAnAnswer(t *testing.T) {
	t.Parallel()
	const failed = `{"data":null,"errors":[{"message":"upstream timed out"}]}`
	b := setup(t, setupOptions{}, func(w http.ResponseWriter, r *http.Request) {
		if _, err := postgres.Tx(r.Context()).Exec(r.Context(), "INSERT INTO effects DEFAULT VALUES"); err != nil {
			t.Error(err)
		}
		_, _ = io.WriteString(w, failed)
	})
	for _, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
		got := b.post(t, "/graphql", `{"query":"mutation{pay}"}`, "Idempotency-Key", "k")
		want(t, got, 200, outcome, "")
		if got.body != failed {
			t.Errorf("%s: %s", outcome, got.body)
		}
	}
	if n := b.effects(t); n != 1 {
		t.Errorf("%d effects", n)
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
				// Go's client asks for gzip, and takes it off
				got := b.post(t, "/", "{}", "Idempotency-Key", "k")
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

// encodeRecorded returns headers in the stored form, without any checks: a version byte, the number
// of pairs, then names and values, each after its length.
func encodeRecorded(pairs ...string) []byte {
	out := binary.AppendUvarint([]byte{1}, uint64(len(pairs)/2))
	for _, part := range pairs {
		out = append(binary.AppendUvarint(out, uint64(len(part))), part...)
	}
	return out
}

// decodeRecorded reads the stored form. ok is false if no release could have written it.
func decodeRecorded(stored []byte) (pairs []string, ok bool) {
	if len(stored) < 2 || stored[0] != 1 {
		return nil, false
	}
	rest := stored[1:]
	count, n := binary.Uvarint(rest)
	if n <= 0 {
		return nil, false
	}
	for rest = rest[n:]; len(rest) > 0; {
		length, n := binary.Uvarint(rest)
		if n <= 0 || length > uint64(len(rest)-n) {
			return nil, false
		}
		pairs = append(pairs, string(rest[n:n+int(length)]))
		rest = rest[n+int(length):]
	}
	if uint64(len(pairs)) != 2*count || !bytes.Equal(encodeRecorded(pairs...), stored) {
		return nil, false
	}
	for i := 2; i < len(pairs); i += 2 {
		if pairs[i] < pairs[i-2] {
			return nil, false
		}
	}
	return pairs, true
}

// neverOnTheWire are the headers that no replay may carry.
var neverOnTheWire = []string{
	"authorization", "cookie", "set-cookie", "set-cookie2", "proxy-authorization", "proxy-authenticate", "proxy-authentication-info",
	"authentication-info", "www-authenticate", "connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding",
	"upgrade", "content-length", "date",
}

// mayBeReplayed reports whether headers may be sent: names are tokens, values have no line breaks
// and no other control characters, and none is in neverOnTheWire or one of the middleware's own.
func mayBeReplayed(pairs []string) bool {
	size := 0
	for i := 0; i < len(pairs); i += 2 {
		name, value := strings.ToLower(pairs[i]), pairs[i+1]
		size += len(name) + len(value)
		if name == "" || strings.Trim(name, "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz") != "" || slices.Contains(neverOnTheWire, name) ||
			strings.HasPrefix(name, "idempotency-") || strings.HasPrefix(name, "idempotent-") || strings.HasPrefix(name, "trailer:") {
			return false
		}
		if strings.ContainsFunc(value, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }) {
			return false
		}
	}
	return size <= idempotency.HeaderBytesMax
}

// FuzzRecordChangedInTheTable: whatever a record's status and headers are overwritten with, a
// replay carries exactly the recorded ones, and only if they could have been recorded; otherwise
// the outcome is unknown. No header ends its line early.
func FuzzRecordChangedInTheTable(f *testing.F) {
	for _, pairs := range [][]string{
		{}, {"Etag", "x"}, {"Content-Type", "text/plain", "Location", "/1"}, {"Link", "<a>", "Link", "<b>"},
		{"Location", "/1\r\nX-Injected: 1"}, {"Location", "/1\nX-Injected: 1"}, {"Location", "/1\r\n\r\n<script>"}, {"X-A\r\nX-Injected", "1"},
		{"X-A: 1\r\nX-Injected", "1"}, {"Set-Cookie", "s=1"}, {"Transfer-Encoding", "chunked"}, {"Content-Length", "0"}, {"Connection", "close"},
		{"", "x"}, {"A", "\x00"}, {"A b", "x"}, {"Idempotency-Status", "executed"}, {"Trailer:Etag", "x"}, {"Etag", "ü\xff\ttab"},
		{"Access-Control-Allow-Origin", "*", "access-control-allow-credentials", "true", "Vary", "Origin"},
	} {
		f.Add(int16(201), encodeRecorded(pairs...))
	}
	f.Add(int16(204), encodeRecorded("Etag", "x"))
	f.Add(int16(101), encodeRecorded())
	f.Add(int16(-1), encodeRecorded())
	f.Add(int16(999), encodeRecorded("Etag", "x"))
	f.Add(int16(201), []byte{2, 0})
	f.Add(int16(201), []byte{1, 1, 4, 'E', 't', 'a', 'g', 200})
	b := setup(f, setupOptions{}, transfer)
	const request = "POST / HTTP/1.1\r\nHost: x\r\nAccount: acme\r\nContent-Type: application/json\r\nIdempotency-Key: k\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
	f.Fuzz(func(t *testing.T, status int16, headers []byte) {
		if b.raw(t, request).outcome == "" {
			t.Fatal("no outcome")
		}
		if _, err := b.pool.Exec(context.Background(), "UPDATE idempotency_keys SET status = $1, headers = $2", status, headers); err != nil {
			t.Fatal(err)
		}
		got := b.raw(t, request)
		pairs, ok := decodeRecorded(headers)
		if !ok || !mayBeReplayed(pairs) || status < idempotency.StatusMin || status > idempotency.StatusMax {
			if got.outcome != string(idempotency.OutcomeUnknown) || got.status != 503 && got.status != 500 {
				t.Fatalf("status %d, headers %q are answered with %d %q %v", status, headers, got.status, got.outcome, got.header)
			}
			pairs = nil
		} else if got.outcome != string(idempotency.OutcomeReplayed) || got.status != int(status) {
			t.Fatalf("status %d, headers %q are answered with %d %q", status, headers, got.status, got.outcome)
		}
		recorded := http.Header{}
		for i := 0; i < len(pairs); i += 2 {
			// These belong to the origin of the request, and are left out.
			if strings.HasPrefix(strings.ToLower(pairs[i]), "access-control-") {
				continue
			}
			recorded.Add(pairs[i], strings.Trim(pairs[i+1], " \t"))
		}
		for name, values := range got.header {
			switch name {
			case "Idempotency-Status", "Idempotent-Replayed", "Idempotency-Created-At", "Idempotency-Expires-At", "Date", "Content-Length", "Connection":
				continue
			case "Content-Type", "Link", "Cache-Control", "Retry-After":
				// They are the problem document's.
				if pairs == nil && got.outcome == string(idempotency.OutcomeUnknown) {
					continue
				}
			}
			sent, kept := slices.Sorted(slices.Values(values)), slices.Sorted(slices.Values(recorded[name]))
			if fmt.Sprintf("%q", sent) != fmt.Sprintf("%q", kept) {
				t.Fatalf("header %s is sent as %q, and recorded as %q", name, sent, kept)
			}
			delete(recorded, name)
		}
		if len(recorded) > 0 {
			t.Fatalf("recorded and not sent: %q of %v", recorded, got.header)
		}
	})
}
