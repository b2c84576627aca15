package middleware

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"github.com/go-chi/chi/v5"
	"pgregory.net/rapid"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/memory"
)

// FuzzKeyValue: each result is a valid key that survives quoting, and anything invalid is an error.
func FuzzKeyValue(f *testing.F) {
	for _, seed := range []string{"k", `"k"`, "", `""`, `"a\"b"`, "a b", "a,b", `"a";v=1`, "ü", `"\\"`, " k "} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, header string) {
		value, err := keyValue(http.Header{"Idempotency-Key": {header}}, 1, idempotency.KeyBytesMax)
		if err != nil {
			if value != "" {
				t.Errorf("%q: %q with %v", header, value, err)
			}
			if len(header) < 256 && idempotency.ValidateKeyValue(header) == nil {
				t.Errorf("%q is refused: %v", header, err)
			}
			return
		}
		if err := idempotency.ValidateKeyValue(value); err != nil {
			t.Errorf("%q was read as %q: %v", header, value, err)
		}
		quoted := `"` + strings.ReplaceAll(value, `\`, `\\`) + `"`
		again, err := keyValue(http.Header{"Idempotency-Key": {quoted}}, 1, idempotency.KeyBytesMax)
		if err != nil || again != value {
			t.Errorf("%q quoted is %q, %v", value, again, err)
		}
	})
}

// FuzzTarget: the fast path to the target gives the same result as parsing it, even if outer code
// changed r.URL.
func FuzzTarget(f *testing.F) {
	for _, uri := range []string{"/transfers", "/a%2Fb?x=1", "/a b", "/ü", "/a#b", "//host/path", "*", "foo:bar", "", "?", "/?", "/a??b", "http://host/a?b", "/%zz", "/a%20b?%zz"} {
		f.Add(uri, "/a", "x=1")
	}
	f.Fuzz(func(t *testing.T, uri, path, query string) {
		parsed, err := url.ParseRequestURI(uri)
		changed := &url.URL{Path: path, RawQuery: query}
		urls := []*url.URL{changed, {Path: uri}, {Opaque: uri}}
		if before, after, found := strings.Cut(uri, "?"); found {
			urls = append(urls, &url.URL{Path: before, RawQuery: after}, &url.URL{Path: path, RawPath: before, RawQuery: after})
		}
		if err == nil {
			stripped := *parsed
			stripped.Path, stripped.RawPath = strings.TrimPrefix(parsed.Path, "/"), strings.TrimPrefix(parsed.RawPath, "/")
			urls = append(urls, parsed, &stripped)
		}
		for _, u := range urls {
			want := u
			if err == nil {
				want = parsed
			}
			escapedPath, rawQuery := target(&http.Request{URL: u, RequestURI: uri})
			if escapedPath != want.EscapedPath() || rawQuery != want.RawQuery {
				t.Errorf("%q with %#v: %q and %q, want %q and %q", uri, u, escapedPath, rawQuery, want.EscapedPath(), want.RawQuery)
			}
		}
	})
}

// Whatever headers a handler sets, only those of the allow-list are recorded: no credential,
// nothing of the connection, and nothing that could end a header line.
func TestOnlyTheAllowListIsRecorded(t *testing.T) {
	t.Parallel()
	names := append(RecordedHeaders(), "Set-Cookie", "Authorization", "Connection", "Www-Authenticate", "Idempotency-Status",
		"Transfer-Encoding", "Content-Length", "Date", "X-Own", "Keep-Alive", "Upgrade", "Trailer:X", "Proxy-Authorization", "Access-Control-Allow-Origin")
	m := New(stubStore{}, func(*http.Request) (string, error) { return "", nil }, &Options{RecordHeaders: []string{"x-own"}})
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.OneOf(rapid.SampledFrom(names), rapid.StringMatching(`[A-Z][a-z]{0,8}(-[A-Z][a-z]{0,8})?`))
		value := rapid.OneOf(rapid.StringN(0, 20, 40), rapid.Just("a\r\nSet-Cookie: b"), rapid.SampledFrom(names))
		header := http.Header(rapid.MapOf(name, rapid.SliceOfN(value, 1, 3)).Draw(t, "header"))
		outer := http.Header(rapid.MapOf(name, rapid.SliceOfN(value, 1, 3)).Draw(t, "outer"))
		recorded := recordable(header, outer, m.headers)
		for name, values := range recorded {
			if !m.headers[name] || neverRecorded(name) {
				t.Fatalf("%s is recorded", name)
			}
			for _, connection := range header["Connection"] {
				if strings.EqualFold(connection, name) {
					t.Fatalf("%s is recorded although Connection names it", name)
				}
			}
			if len(values) != len(header[name]) {
				t.Fatalf("%s: %q became %q", name, header[name], values)
			}
			if strings.ContainsAny(strings.Join(values, ""), "\r\n\x00") {
				t.Fatalf("%s: %q", name, values)
			}
		}
		for _, name := range RecordedHeaders() {
			if _, kept := recorded[name]; !kept && header[name] != nil && header["Connection"] == nil && (name != "Content-Encoding" || outer[name] == nil) {
				t.Fatalf("%s is not recorded", name)
			}
		}
	})
}

type stubStore struct{ idempotency.Store }

func TestOptionsThatCannotWorkPanic(t *testing.T) {
	t.Parallel()
	scope := func(*http.Request) (string, error) { return "", nil }
	panics := func(do func()) (text string) {
		defer func() { text, _ = recover().(string) }()
		do()
		return ""
	}
	own := func(*http.Request, []byte) []byte { return nil }
	for _, opts := range []*Options{
		{KeyBytesMin: 9, KeyBytesMax: 8}, {KeyBytesMin: -1}, {KeyBytesMax: 256}, {BodyBytesMax: -1}, {AnswerBytesMax: -1}, {RetryAfter: -1},
		{RecordHeaders: []string{"set-cookie"}}, {RecordHeaders: []string{"connection"}}, {RecordHeaders: []string{"Idempotency-Status"}},
		{RecordHeaders: []string{"access-control-allow-origin"}}, {RecordHeaders: []string{"www-authenticate"}},
		{Fingerprinters: []Fingerprinter{{Version: 99, Content: own}}}, {Fingerprinters: []Fingerprinter{{Version: 100}}}, {Fingerprinters: []Fingerprinter{{Version: 1, Content: own}}},
		{Fingerprinters: []Fingerprinter{FingerprinterV1(), FingerprinterV1()}},
		{TTL: 1}, {Timeouts: idempotency.Timeouts{Handler: -1}},
	} {
		if text := panics(func() { New(stubStore{}, scope, opts) }); !strings.HasPrefix(text, "idempotency") {
			t.Errorf("%+v: %q", opts, text)
		}
	}
	for _, opts := range []*Options{nil, {KeyBytesMin: 8, KeyBytesMax: 8}, {KeyBytesMax: 255}, {Fingerprinters: []Fingerprinter{{Version: 100, Content: own}}}, {RecordHeaders: []string{"x-own"}}} {
		if text := panics(func() { New(stubStore{}, scope, opts) }); text != "" {
			t.Errorf("%+v: %q", opts, text)
		}
	}
	if text := panics(func() { New(stubStore{}, nil, nil) }); !strings.Contains(text, "ScopeFunc") {
		t.Errorf("without a scope function: %q", text)
	}
	if text := panics(func() { New(nil, scope, nil) }); !strings.Contains(text, "Store") {
		t.Errorf("without a store: %q", text)
	}
}

func TestTraceID(t *testing.T) {
	t.Parallel()
	for header, want := range map[string]string{
		"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01": "4bf92f3577b34da6a3ce929d0e0e4736",
		"": "", "00-4bf9": "", "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01": "",
		"00-4bf92f3577b34da6a3ce929d0e0e4736x00f067aa0ba902b7-01": "",
	} {
		r := httptest.NewRequest("POST", "/", nil)
		r.Header.Set("Traceparent", header)
		if got := traceID(r); got != want {
			t.Errorf("%q: %q, want %q", header, got, want)
		}
	}
}

// A problem's type leads to its description.
func TestEveryProblemIsDescribed(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile("../docs/problems.md")
	if err != nil {
		t.Fatal(err)
	}
	for reason, text := range texts {
		if !strings.Contains(string(doc), "\n## "+string(reason)+"\n"+strconv.Itoa(text.status)) {
			t.Errorf("docs/problems.md has no %s with status %d", reason, text.status)
		}
	}
	if headings := strings.Count(string(doc), "\n## "); headings != len(texts) {
		t.Errorf("docs/problems.md describes %d problems, and there are %d", headings, len(texts))
	}
}

// The tracer gets the route as the outer router names it, and never the path.
func TestRouteIsTheRouters(t *testing.T) {
	t.Parallel()
	heard := &routes{}
	idem := New(memory.New(nil), func(*http.Request) (string, error) { return "acme", nil }, &Options{Tracer: heard})
	answer := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) })
	mux := http.NewServeMux()
	mux.Handle("POST /transfers/{id}", idem.Handler(answer))
	router := chi.NewRouter()
	router.Route("/v1", func(r chi.Router) { r.With(idem.Handler).Post("/orders/{id}", answer) })
	own := idem.With(func(o *Options) { o.Route = func(r *http.Request) string { return "all of " + r.Method } })
	for _, test := range []struct {
		handler http.Handler
		path    string
		want    string
	}{
		{mux, "/transfers/7", "POST /transfers/{id}"}, {router, "/v1/orders/7", "/v1/orders/{id}"},
		{idem.Handler(answer), "/outside/7", ""}, {own.Handler(answer), "/7", "all of POST"},
	} {
		for _, key := range []string{"k" + test.path[1:2], ""} { // one that runs, and one that is refused
			heard.all = nil
			r := httptest.NewRequest(http.MethodPost, test.path, nil)
			r.Header.Set("Idempotency-Key", key)
			test.handler.ServeHTTP(httptest.NewRecorder(), r)
			for _, got := range heard.all {
				if got != test.want {
					t.Errorf("%s: %q, want %q", test.path, heard.all, test.want)
				}
			}
			if want := map[bool]int{true: 2, false: 1}[key != ""]; len(heard.all) != want {
				t.Errorf("%s: heard %d times, want %d", test.path, len(heard.all), want)
			}
		}
	}
}

// routes is a tracer that keeps the routes.
type routes struct{ all []string }

func (h *routes) TraceRequestStart(ctx context.Context, data idempotency.RequestStart) context.Context {
	h.all = append(h.all, data.Route)
	return ctx
}
func (*routes) TraceStep(context.Context, idempotency.StepEnd) {}
func (h *routes) TraceRequestEnd(_ context.Context, data idempotency.RequestEnd) {
	h.all = append(h.all, data.Route)
}
func (h *routes) TraceRefused(_ context.Context, data idempotency.Refused) {
	h.all = append(h.all, data.Route)
}

// The record has an answer's headers on the allow-list, whoever set them, except those that
// Connection names, those that are never recorded, and the encoding of a compressor outside.
func TestRecordable(t *testing.T) {
	t.Parallel()
	allowed := map[string]bool{"Etag": true, "Vary": true, "Location": true, "Set-Cookie": true, "Content-Encoding": true, "Www-Authenticate": true, "Access-Control-Allow-Origin": true}
	for name, c := range map[string]struct {
		header, outer http.Header
		want          map[string][]string
	}{
		"the allow-list alone":         {http.Header{"Location": {"/a"}, "X-Own": {"x"}}, nil, map[string][]string{"Location": {"/a"}}},
		"never, though it is allowed":  {http.Header{"Set-Cookie": {"session=secret"}, "Www-Authenticate": {"Bearer"}, "access-control-allow-origin": {"*"}}, nil, map[string][]string{}},
		"named by Connection":          {http.Header{"Connection": {"close, etag ,VARY"}, "Etag": {"x"}, "Vary": {"y"}, "Location": {"/a"}}, nil, map[string][]string{"Location": {"/a"}}},
		"named by a second Connection": {http.Header{"Connection": {"close", "etag"}, "Etag": {"x"}}, nil, map[string][]string{}},
		"set outside and left alone":   {http.Header{"Vary": {"Origin"}, "Etag": {"x"}}, http.Header{"Vary": {"Origin"}}, map[string][]string{"Etag": {"x"}, "Vary": {"Origin"}}},
		"encoded outside":              {http.Header{"Content-Encoding": {"gzip"}}, http.Header{"Content-Encoding": {"gzip"}}, map[string][]string{}},
		"encoded inside":               {http.Header{"Content-Encoding": {"br"}}, http.Header{"Content-Encoding": {"gzip"}}, map[string][]string{"Content-Encoding": {"br"}}},
		"set outside and added to":     {http.Header{"Vary": {"Origin", "Accept"}}, http.Header{"Vary": {"Origin"}}, map[string][]string{"Vary": {"Origin", "Accept"}}},
	} {
		if got := recordable(c.header, c.outer, allowed); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: recorded %v, want %v", name, got, c.want)
		}
	}
}

// On a replay recorded headers replace those set outside, in any spelling; Vary is the union of
// both.
func TestReplayReplaces(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		outside  http.Header
		recorded map[string][]string
		want     http.Header
	}{
		"what is outside alone stays": {http.Header{"X-Frame-Options": {"DENY"}, "Cache-Control": {"no-store"}}, map[string][]string{"Content-Type": {"a/b"}},
			http.Header{"X-Frame-Options": {"DENY"}, "Cache-Control": {"no-store"}, "Content-Type": {"a/b"}}},
		"replaced":                 {http.Header{"Content-Type": {"a/b"}, "ETag": {"1"}}, map[string][]string{"Content-Type": {"c/d"}, "Etag": {"2"}}, http.Header{"Content-Type": {"c/d"}, "Etag": {"2"}}},
		"no type was recorded":     {http.Header{"Content-Type": {"a/b"}}, nil, http.Header{"Content-Type": nil}},
		"a length outside":         {http.Header{"Content-Length": {"9"}}, map[string][]string{"Content-Type": {"c/d"}}, http.Header{"Content-Type": {"c/d"}}},
		"Vary of both":             {http.Header{"Vary": {"Origin"}, "vary": {"Cookie"}}, map[string][]string{"Content-Type": {"c/d"}, "Vary": {"ORIGIN", "Accept"}}, http.Header{"Content-Type": {"c/d"}, "Vary": {"Origin", "Cookie", "Accept"}}},
		"Vary, a list in a value":  {http.Header{"Vary": {"Origin, Accept"}}, map[string][]string{"Content-Type": {"c/d"}, "Vary": {"accept , origin", "Accept, Cookie"}}, http.Header{"Content-Type": {"c/d"}, "Vary": {"Origin, Accept", "Accept, Cookie"}}},
		"Vary of the record alone": {http.Header{}, map[string][]string{"Content-Type": {"c/d"}, "Vary": {"Accept"}}, http.Header{"Content-Type": {"c/d"}, "Vary": {"Accept"}}},
		"recorded by a release before": {http.Header{"Access-Control-Allow-Origin": {"https://b"}}, map[string][]string{"Content-Type": {"c/d"}, "Access-Control-Allow-Origin": {"https://a"}},
			http.Header{"Content-Type": {"c/d"}, "Access-Control-Allow-Origin": {"https://b"}}},
	} {
		if replay(c.outside, c.recorded); !reflect.DeepEqual(c.outside, c.want) {
			t.Errorf("%s: %v, want %v", name, c.outside, c.want)
		}
	}
}

// The status of a scope function counts if it is a refusal; any other becomes 401.
func TestStatusOfAScopeError(t *testing.T) {
	t.Parallel()
	for status, want := range map[int]int{0: 401, 200: 401, 399: 401, 400: 400, 429: 429, 599: 599, 600: 401} {
		m := New(stubStore{}, func(*http.Request) (string, error) { return "", &StatusError{Status: status} }, nil)
		w, r := httptest.NewRecorder(), httptest.NewRequest("POST", "/", nil)
		r.Header.Set("Idempotency-Key", "k")
		m.Handler(http.NotFoundHandler()).ServeHTTP(w, r)
		if w.Code != want {
			t.Errorf("status %d became %d, want %d", status, w.Code, want)
		}
	}
}
