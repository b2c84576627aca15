package recipes

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"go.uber.org/goleak"

	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/middleware/mwtest"
)

// fasthttp's servers leave goroutines that sleep.
func TestMain(m *testing.M) {
	pgtest.Main(m, goleak.IgnoreAnyFunction("github.com/valyala/fasthttp.(*workerPool).Start.func2"), goleak.IgnoreAnyFunction("github.com/valyala/fasthttp.updateServerDate.func1"))
}

// noErrors are the features of handlers of net/http.
var noErrors = mwtest.Features{NoReturnedErrors: true}

// typed are the features of frameworks that make the answer from a value that the handler returns.
var typed = mwtest.Features{NoStream: true, NoHijack: true}

// payments serves a handler with a route POST /payments/{account} at the suite's route.
func payments(handler http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r = r.WithContext(r.Context())
		u := *r.URL
		u.Path = "/payments/" + strings.TrimPrefix(u.Path, mwtest.Prefix)
		r.URL = &u
		handler.ServeHTTP(w, r)
	})
}

// wantParameter calls the suite's handler, and panics if the router's parameter is not there, as it
// would be if a second run had lost the router's state.
func wantParameter(s *mwtest.Service, parameter func(r *http.Request) string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if want := strings.TrimPrefix(r.URL.Path, "/payments/"); parameter(r) != want {
			panic("the router's parameter is " + parameter(r) + ", want " + want)
		}
		s.Handler.ServeHTTP(w, r)
	})
}

// reply is an answer as it came over the wire.
type reply struct {
	status int
	header http.Header
	body   string
}

// post sends a request with these headers, and no body.
func post(t *testing.T, url string, header http.Header) reply {
	t.Helper()
	return send(t, http.MethodPost, url, header)
}

func send(t *testing.T, method, url string, header http.Header) reply {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	r.Header = header
	transport := &http.Transport{DisableCompression: true}
	defer transport.CloseIdleConnections()
	response, err := transport.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = response.Body.Close() }()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return reply{response.StatusCode, response.Header, string(body)}
}
