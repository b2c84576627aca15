package middleware

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"strconv"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/memory"
)

var benchBody = bytes.Repeat([]byte("x"), 200)

func BenchmarkKeyValue(b *testing.B) {
	for name, value := range map[string]string{
		"bare":   "0198f3c2-7f7a-7cc4-9d0e-5d7f4a1b2c3d",
		"quoted": `"0198f3c2-7f7a-7cc4-9d0e-5d7f4a1b2c3d"`,
	} {
		b.Run(name, func(b *testing.B) {
			header := http.Header{"Idempotency-Key": {value}}
			b.ReportAllocs()
			for b.Loop() {
				if _, err := keyValue(header, 1, idempotency.KeyBytesMax); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkFingerprint(b *testing.B) {
	for _, size := range []int{200, 64 << 10} {
		b.Run(strconv.Itoa(size)+"B", func(b *testing.B) {
			body := bytes.Repeat([]byte("x"), size)
			r := httptest.NewRequest("POST", "/transfers?dry=1", nil)
			r.Header.Set("Content-Type", "application/json")
			f, one := FingerprinterV1(), &run{request: r, body: body}
			b.ReportAllocs()
			b.SetBytes(int64(size))
			for b.Loop() {
				one.fingerprint(f)
			}
		})
	}
}

func BenchmarkRecorder(b *testing.B) {
	allowed := map[string]bool{"Content-Type": true, "Location": true}
	for _, writes := range []int{1, 20} {
		b.Run(strconv.Itoa(writes)+"writes", func(b *testing.B) {
			outer := http.Header{"X-Request-Id": {"1"}}
			b.ReportAllocs()
			for b.Loop() {
				w := newRecorder(outer, 1<<20)
				w.Header().Set("Content-Type", "application/json")
				w.Header().Set("Location", "/transfers/1")
				w.WriteHeader(http.StatusCreated)
				for range writes {
					_, _ = w.Write(benchBody)
				}
				if err := w.finish(outer, false); err != nil {
					b.Fatal(err)
				}
				recordable(w.sent, outer, allowed)
			}
		})
	}
}

// The middleware without the network, as net/http calls it. The figures include the memory store.
func BenchmarkMiddleware(b *testing.B) {
	handler := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		_, _ = w.Write(benchBody)
	})
	for _, c := range []struct {
		name, status string
		key          func(n int) string
	}{
		{"fresh", "executed", strconv.Itoa},
		{"replay", "replayed", func(int) string { return "k" }},
		{"mismatch", "mismatch", func(int) string { return "other" }},
	} {
		b.Run(c.name, func(b *testing.B) {
			idem := New(memory.New(nil), func(*http.Request) (string, error) { return "acme", nil }, nil).Handler(handler)
			request := func(key, path string) *http.Request {
				r, err := http.NewRequest("POST", path, bytes.NewReader(benchBody))
				if err != nil {
					b.Fatal(err)
				}
				r.RequestURI = path
				r.Header["Content-Type"] = []string{"application/json"}
				r.Header["Idempotency-Key"] = []string{key}
				return r
			}
			for key, path := range map[string]string{"k": "/transfers", "other": "/other"} {
				idem.ServeHTTP(&nowhere{}, request(key, path))
			}
			b.ReportAllocs()
			for n := 0; b.Loop(); n++ {
				w := &nowhere{}
				idem.ServeHTTP(w, request(c.key(n), "/transfers"))
				if status := w.Header().Get("Idempotency-Status"); status != c.status {
					b.Fatalf("%s, want %s", status, c.status)
				}
			}
		})
	}
}

// nowhere is a ResponseWriter that keeps only the header.
type nowhere struct{ header http.Header }

func (w *nowhere) Header() http.Header {
	if w.header == nil {
		w.header = make(http.Header)
	}
	return w.header
}

func (w *nowhere) WriteHeader(int) {}

func (w *nowhere) Write(p []byte) (int, error) { return len(p), nil }
