package recipes

import (
	"compress/gzip"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzhttp"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/mwtest"
)

func compression(idem *middleware.Middleware, pay http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("POST /payments/{account}", idem.Handler(pay))
	return gzhttp.GzipHandler(mux)
}

func TestCompressionOutside(t *testing.T) {
	t.Parallel()
	mwtest.Run(t, noErrors, func(s *mwtest.Service) string {
		return s.Serve(payments(compression(s.Middleware, s.Handler)))
	})
}

var statement = strings.Repeat("paid ", 1000)

func writeStatement(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, statement) }

// The answer is recorded as the handler wrote it, and each client gets it in the coding it accepts.
func TestReplaysAreCompressedForTheirClient(t *testing.T) {
	t.Parallel()
	s := mwtest.New(t, nil)
	url := s.Serve(payments(compression(s.Middleware, http.HandlerFunc(writeStatement))))
	for n, coding := range []string{"gzip", "identity", "gzip"} {
		got := post(t, url+mwtest.Prefix+"acme", http.Header{"Idempotency-Key": {"key-1"}, "Accept-Encoding": {coding}})
		body, want := io.Reader(strings.NewReader(got.body)), ""
		if coding == "gzip" {
			var err error
			if body, err = gzip.NewReader(body); err != nil {
				t.Fatalf("answer %d: %v", n, err)
			}
			want = "gzip"
		}
		plain, err := io.ReadAll(body)
		if err != nil || string(plain) != statement || got.header.Get("Content-Encoding") != want {
			t.Errorf("answer %d: %d bytes with Content-Encoding %q, %v", n, len(plain), got.header.Get("Content-Encoding"), err)
		}
		if replayed := got.header.Get("Idempotency-Status") == string(idempotency.OutcomeReplayed); replayed != (n > 0) {
			t.Errorf("answer %d: Idempotency-Status %q", n, got.header.Get("Idempotency-Status"))
		}
	}
}

// Inside, the bytes that are recorded are compressed, and a client that can't read them gets them.
// If this test fails because that is refused or undone now, docs/stacks.md should say so.
func TestCompressionInside(t *testing.T) {
	t.Parallel()
	s := mwtest.New(t, nil)
	url := s.Serve(s.Middleware.Handler(gzhttp.GzipHandler(http.HandlerFunc(writeStatement))))
	var last reply
	for _, coding := range []string{"gzip", "identity"} {
		last = post(t, url+mwtest.Prefix+"acme", http.Header{"Idempotency-Key": {"key-1"}, "Accept-Encoding": {coding}})
	}
	if last.body == statement || last.header.Get("Content-Encoding") != "gzip" {
		t.Errorf("a client that accepts no coding got %d bytes with Content-Encoding %q", len(last.body), last.header.Get("Content-Encoding"))
	}
}
