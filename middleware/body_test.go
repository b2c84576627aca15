package middleware_test

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"log/slog"
	"mime/multipart"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
	"github.com/paidonce/idempotency/storage/postgres"
)

// trickle is a body of which only one byte has arrived.
type trickle struct {
	asked   *sync.WaitGroup // done when that byte was read and the reader wants more
	release <-chan struct{}
	read    bool
}

func (t *trickle) Read(p []byte) (int, error) {
	if !t.read {
		t.read = true
		p[0] = '{'
		return 1, nil
	}
	t.asked.Done()
	<-t.release
	return 0, io.ErrUnexpectedEOF
}

func (*trickle) Close() error { return nil }

// Memory grows with the bytes that arrived. A client that announces the maximum and sends one byte
// costs as much as that byte.
func TestAnnouncedBodyTakesNoMemory(t *testing.T) {
	const conns, announced = 200, 8 << 20
	handler := middleware.New(memory.New(nil), byAccount, &middleware.Options{BodyBytesMax: announced}).Handler(http.NotFoundHandler())
	heap := func() int64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	release := make(chan struct{})
	var asked, served sync.WaitGroup
	asked.Add(conns)
	before := heap()
	for i := range conns {
		served.Go(func() {
			r := httptest.NewRequest(http.MethodPost, "/", &trickle{asked: &asked, release: release})
			r.ContentLength = announced
			r.Header.Set("Idempotency-Key", fmt.Sprint("k", i))
			r.Header.Set("Account", "acme")
			handler.ServeHTTP(httptest.NewRecorder(), r)
		})
	}
	asked.Wait()
	each := (heap() - before) / conns
	close(release)
	served.Wait()
	if each > 32<<10 {
		t.Errorf("a request that sent one byte takes %d kB", each>>10)
	}
}

// A body longer than the memory that is allocated ahead arrives whole.
func TestLongBodyIsReadWhole(t *testing.T) {
	t.Parallel()
	for _, length := range []int{4<<10 - 1, 4 << 10, 4<<10 + 1, 1 << 20} {
		body := strings.Repeat("x", length-1) + "y"
		handler := middleware.New(memory.New(nil), byAccount, nil).Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if got, err := io.ReadAll(r.Body); err != nil || string(got) != body || r.ContentLength != int64(length) {
				t.Errorf("%d of %d bytes, Content-Length %d, %v", len(got), length, r.ContentLength, err)
			}
			w.WriteHeader(http.StatusOK)
		}))
		r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader(body))
		r.Header.Set("Idempotency-Key", "k")
		r.Header.Set("Account", "acme")
		w := httptest.NewRecorder()
		if handler.ServeHTTP(w, r); w.Code != 200 {
			t.Errorf("%d bytes: %d", length, w.Code)
		}
	}
}

// reading serves a handler with service functions that read the body in some way, and counts its
// runs.
func reading(t *testing.T, logs io.Writer, options *middleware.Options, scope middleware.ScopeFunc) (url string, runs *int) {
	t.Helper()
	runs = new(int)
	options.Logger = slog.New(slog.NewTextHandler(logs, nil))
	server := httptest.NewServer(middleware.New(memory.New(nil), scope, options).Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		*runs++
		body, _ := io.ReadAll(r.Body)
		_, _ = fmt.Fprintf(w, "paid %q", body)
	})))
	t.Cleanup(server.Close)
	return server.URL, runs
}

// sendTo posts a body, with its length or chunked.
func sendTo(t *testing.T, url, body string, chunked bool) reply {
	t.Helper()
	var reader io.Reader = strings.NewReader(body)
	if chunked {
		reader = struct{ io.Reader }{reader}
	}
	r, err := http.NewRequest(http.MethodPost, url, reader)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Idempotency-Key", "k")
	r.Header.Set("Account", "acme")
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	return read(t, response)
}

// If a function of the service reads the body, or a part of it, before it is fingerprinted,
// different requests would look the same. The request is refused, chunked or not, and the answer
// does not blame the client.
func TestBodyReadByTheServiceIsRefused(t *testing.T) {
	t.Parallel()
	whole := func(r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) }
	part := func(r *http.Request) { _, _ = r.Body.Read(make([]byte, 5)) }
	backInPart := func(r *http.Request) { r.Body = io.NopCloser(io.LimitReader(r.Body, 5)) }
	for how, take := range map[string]func(*http.Request){"whole": whole, "a part": part, "put back in part": func(r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		r.Body = io.NopCloser(bytes.NewReader(body[:5]))
	}, "cut short": func(r *http.Request) { backInPart(r); whole(r) }} {
		for whose, set := range map[string]func(*middleware.Options) middleware.ScopeFunc{
			"ScopeFunc": func(*middleware.Options) middleware.ScopeFunc {
				return func(r *http.Request) (string, error) { take(r); return "acme", nil }
			},
			"Route": func(o *middleware.Options) middleware.ScopeFunc {
				o.Route = func(r *http.Request) string { take(r); return "" }
				return byAccount
			},
			"TraceID": func(o *middleware.Options) middleware.ScopeFunc {
				o.TraceID = func(r *http.Request) string { take(r); return "" }
				return byAccount
			},
		} {
			for _, chunked := range []bool{false, true} {
				var logs strings.Builder
				options := &middleware.Options{}
				scope := set(options)
				if whose == "Route" && how != "whole" && how != "a part" {
					continue // it is called again for the log, and takes more
				}
				url, runs := reading(t, &logs, options, scope)
				for _, body := range []string{"acme pays 10 to bob", "acme pays 9999 to mallory"} {
					got := sendTo(t, url, body, chunked)
					want(t, got, 500, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
				}
				if *runs != 0 || !strings.Contains(logs.String(), "ScopeFunc, Route or TraceID must not read the body") && !strings.Contains(logs.String(), "mount what reads bodies inside") {
					t.Errorf("%s reads %s, chunked %t: %d runs; logged %s", whose, how, chunked, *runs, logs.String())
				}
			}
		}
	}
}

// A function that reads the body to find its scope, and puts it back, does no harm.
func TestBodyPutBackWholeIsFine(t *testing.T) {
	t.Parallel()
	url, runs := reading(t, io.Discard, &middleware.Options{}, func(r *http.Request) (string, error) {
		body, err := io.ReadAll(r.Body)
		r.Body = io.NopCloser(bytes.NewReader(body))
		account, _, _ := bytes.Cut(body, []byte(" "))
		return string(account), err
	})
	for _, chunked := range []bool{true, false} {
		got := sendTo(t, url, "acme pays 10 to bob", chunked)
		if got.status != 200 || got.body != `paid "acme pays 10 to bob"` {
			t.Errorf("chunked %t: %d %s", chunked, got.status, got.body)
		}
		want(t, sendTo(t, url, "acme pays 9999 to mallory", chunked), 422, idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)
	}
	if *runs != 1 {
		t.Errorf("%d runs", *runs)
	}
}

// A body that was read outside and an empty chunked one look alike. So the client must send a
// length; without a key there is no fingerprint to be wrong.
func TestEmptyBodyNeedsALength(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{
		middleware: &middleware.Options{Optional: true},
		mount: func(idem *middleware.Middleware, handler http.Handler) http.Handler {
			inner := idem.Handler(handler)
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.URL.Path == "/signed" { // a signature of the body is checked outside
					_, _ = io.Copy(io.Discard, r.Body)
				}
				inner.ServeHTTP(w, r)
			})
		},
	}, transfer)
	const head = "POST /%s HTTP/1.1\r\nHost: x\r\nAccount: acme\r\n%sTransfer-Encoding: chunked\r\n\r\n%s0\r\n\r\n"
	for range 2 {
		got := b.raw(t, fmt.Sprintf(head, "", "Idempotency-Key: k\r\n", ""))
		want(t, got, 411, idempotency.OutcomeNotExecuted, idempotency.ReasonBodyUnread)
	}
	for _, body := range []string{"2\r\n{}\r\n", "3\r\n{1}\r\n"} {
		want(t, b.raw(t, fmt.Sprintf(head, "signed", "Idempotency-Key: k\r\n", body)), 411, idempotency.OutcomeNotExecuted, idempotency.ReasonBodyUnread)
	}
	if logged := b.logs.String(); strings.Count(logged, "level=WARN") != 1 || !strings.Contains(logged, "mount it inside") {
		t.Errorf("logged %s", logged)
	}
	want(t, b.raw(t, fmt.Sprintf(head, "", "", "")), 201, idempotency.OutcomeExecuted, "")
	want(t, b.raw(t, fmt.Sprintf(head, "", "Idempotency-Key: k\r\n", "2\r\n{}\r\n")), 201, idempotency.OutcomeExecuted, "")
	if b.effects(t) != 2 {
		t.Errorf("%d effects", b.effects(t))
	}
}

func zipped(t *testing.T, text string, modified time.Time) string {
	t.Helper()
	var buffer bytes.Buffer
	w := gzip.NewWriter(&buffer)
	w.ModTime = modified
	if _, err := io.WriteString(w, text); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buffer.String()
}

// decompress replaces the body, as decompressors do. Some keep the length of the compressed body,
// in r.ContentLength, or there and in the header.
func decompress(next http.Handler, leaveField, leaveHeader bool) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Content-Encoding") == "gzip" {
			z, err := gzip.NewReader(r.Body)
			if err != nil {
				http.Error(w, err.Error(), http.StatusBadRequest)
				return
			}
			r.Body = io.NopCloser(z)
			r.Header.Del("Content-Encoding")
			if !leaveHeader {
				r.Header.Del("Content-Length")
			}
			if !leaveField {
				r.ContentLength = -1
			}
		}
		next.ServeHTTP(w, r)
	})
}

// The length of a replaced body does not matter. But a body that is shorter than both the field and
// the header say may have been read in part: the log names the remedy, and the answer does not
// blame the client.
func TestBodyReplacedOutside(t *testing.T) {
	t.Parallel()
	short, long := `{"from":"alice","to":"bob","amount":1250}`, `{"note":"`+strings.Repeat("a", 500)+`"}`
	for _, c := range []struct {
		body                    string
		leaveField, leaveHeader bool
		status                  int
	}{
		{short, false, false, 201}, {short, false, true, 201}, {short, true, false, 201}, {short, true, true, 500},
		{long, false, false, 201}, {long, false, true, 201}, {long, true, false, 201}, {long, true, true, 201},
	} {
		t.Run(fmt.Sprintf("%d bytes, field left %t, header left %t", len(c.body), c.leaveField, c.leaveHeader), func(t *testing.T) {
			t.Parallel()
			var saw string
			b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, h http.Handler) http.Handler {
				return decompress(idem.Handler(h), c.leaveField, c.leaveHeader)
			}}, func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				saw = string(body)
				transfer(w, r)
			})
			// A retry that is compressed again is the same request: gzip, among others, may write
			// the time.
			for i, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
				got := b.post(t, "/", zipped(t, c.body, time.Unix(1_700_000_000+int64(i), 0)), "Idempotency-Key", "k", "Content-Encoding", "gzip")
				if c.status == 201 {
					want(t, got, 201, outcome, "")
				} else {
					want(t, got, 500, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
				}
			}
			if c.status == 201 && saw != c.body {
				t.Errorf("the handler saw %.60q", saw)
			}
			if logged := b.logs.String(); c.status == 500 && !strings.Contains(logged, "must set r.ContentLength to -1") {
				t.Errorf("the log names no remedy: %s", logged)
			}
		})
	}
}

// A function that parses the form of a request has a copy with its own body: fingerprints differ,
// and the handler finds the form as the client sent it.
func TestFunctionsOfTheServiceHaveABodyOfTheirOwn(t *testing.T) {
	t.Parallel()
	seen := ""
	b := setup(t, setupOptions{middleware: &middleware.Options{
		Fingerprinters:  []middleware.Fingerprinter{{Version: 100, Content: func(r *http.Request, _ []byte) []byte { return []byte(r.FormValue("amount")) }}},
		AuthorizeReplay: func(r *http.Request, _ *idempotency.Record) error { seen = r.FormValue("amount"); return nil },
	}}, func(w http.ResponseWriter, r *http.Request) {
		if got := r.FormValue("amount"); got != "10" {
			t.Errorf("the handler found amount %q", got)
		}
		transfer(w, r)
	})
	form := []string{"Idempotency-Key", "k", "Content-Type", "application/x-www-form-urlencoded"}
	want(t, b.post(t, "/", "amount=10", form...), 201, idempotency.OutcomeExecuted, "")
	want(t, b.post(t, "/", "amount=9999", form...), 422, idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)
	want(t, b.post(t, "/", "amount=10&note=again", form...), 201, idempotency.OutcomeReplayed, "")
	if seen != "10" {
		t.Errorf("AuthorizeReplay found amount %q", seen)
	}
}

// The trailers of a chunked body reach the handler.
func TestTrailerReachesTheHandler(t *testing.T) {
	t.Parallel()
	var trailer string
	b := setup(t, setupOptions{}, func(w http.ResponseWriter, r *http.Request) {
		trailer = r.Trailer.Get("X-Checksum")
		transfer(w, r)
	})
	const text = "POST / HTTP/1.1\r\nHost: x\r\nAccount: acme\r\nIdempotency-Key: k\r\nTransfer-Encoding: chunked\r\nTrailer: X-Checksum\r\n\r\n2\r\n{}\r\n0\r\nX-Checksum: abc\r\n\r\n"
	want(t, b.raw(t, text), 201, idempotency.OutcomeExecuted, "")
	want(t, b.raw(t, text), 201, idempotency.OutcomeReplayed, "")
	if trailer != "abc" {
		t.Errorf("trailer %q", trailer)
	}
}

// A body that ends early, or arrives at one byte a second, is given up, and holds no connection
// meanwhile.
func TestBodyThatDoesNotArrive(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{poolMax: 1, server: func(s *http.Server) { s.ReadTimeout = 300 * time.Millisecond }}, transfer)
	const head = "POST / HTTP/1.1\r\nHost: x\r\nAccount: acme\r\nIdempotency-Key: k\r\n"

	slow := b.dial(t)
	if _, err := io.WriteString(slow, head+"Content-Length: 10\r\n\r\n{"); err != nil {
		t.Fatal(err)
	}
	// The slow client does not hold the pool's only connection.
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "other"), 201, idempotency.OutcomeExecuted, "")
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

func TestBodyTooLarge(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{middleware: &middleware.Options{BodyBytesMax: 100}, poolMax: 1}, transfer)
	held, err := b.pool.Acquire(context.Background()) // nothing below may need a connection
	if err != nil {
		t.Fatal(err)
	}
	want(t, b.post(t, "/transfers", strings.Repeat("x", 101), "Idempotency-Key", "k"), 413, idempotency.OutcomeNotExecuted, idempotency.ReasonBodyTooLarge)
	want(t, b.send(t, "POST", "/transfers", io.MultiReader(strings.NewReader(strings.Repeat("x", 101))), "Idempotency-Key", "k"), 413, idempotency.OutcomeNotExecuted, idempotency.ReasonBodyTooLarge)
	// A client that waits for 100 Continue is answered 413 at once, and keeps its body.
	want(t, b.raw(t, "POST /transfers HTTP/1.1\r\nHost: x\r\nAccount: acme\r\nIdempotency-Key: k\r\nExpect: 100-continue\r\nContent-Length: 101\r\n\r\n"), 413, idempotency.OutcomeNotExecuted, idempotency.ReasonBodyTooLarge)
	held.Release()
	want(t, b.post(t, "/transfers", strings.Repeat("x", 100), "Idempotency-Key", "k"), 201, idempotency.OutcomeExecuted, "")
	want(t, b.send(t, "POST", "/transfers", io.MultiReader(strings.NewReader(strings.Repeat("x", 100))), "Idempotency-Key", "k"), 201, idempotency.OutcomeReplayed, "")
}

// A body that is refused unread is not read to its end.
func TestRefusedBodyClosesTheConnection(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{middleware: &middleware.Options{BodyBytesMax: 10}}, transfer)
	conn := b.dial(t)
	if _, err := io.WriteString(conn, "POST / HTTP/1.1\r\nHost: x\r\nAccount: acme\r\nIdempotency-Key: k\r\nContent-Length: 11\r\n\r\n12345678901"); err != nil {
		t.Fatal(err)
	}
	if err := conn.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(conn) // until the server closes
	if err != nil || !strings.Contains(string(answer), "\r\nConnection: close\r\n") {
		t.Errorf("%v: %s", err, answer)
	}
}

// The handler gets a body with a length, even if it was sent chunked.
func TestChunkedBodyHasALength(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength != 2 || len(r.TransferEncoding) != 0 {
			t.Errorf("Content-Length %d, Transfer-Encoding %q", r.ContentLength, r.TransferEncoding)
		}
		transfer(w, r)
	})
	want(t, b.send(t, "POST", "/", io.MultiReader(strings.NewReader("{}")), "Idempotency-Key", "k"), 201, idempotency.OutcomeExecuted, "")
}

// A body that outer code has read does not count as an empty body: two transfers would have one
// fingerprint.
func TestBodyReadOutsideIsRefused(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, handler http.Handler) http.Handler {
		inner := idem.Handler(handler)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_ = r.ParseForm()
			inner.ServeHTTP(w, r)
		})
	}}, transfer)
	for _, body := range []string{"amount=1", "amount=1000"} {
		got := b.post(t, "/", body, "Idempotency-Key", "k", "Content-Type", "application/x-www-form-urlencoded")
		want(t, got, 500, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
	}
	// The same holds if no length was announced.
	for _, body := range []string{"amount=1", "amount=1000"} {
		got := b.send(t, http.MethodPost, "/", io.MultiReader(strings.NewReader(body)), "Idempotency-Key", "chunked", "Content-Type", "application/x-www-form-urlencoded")
		want(t, got, 500, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
	}
	if b.runs.Load() != 0 {
		t.Error("the handler ran")
	}
	if logged := b.logs.String(); strings.Count(logged, "level=ERROR") != 4 || !strings.Contains(logged, "inside") {
		t.Errorf("the log names no remedy: %s", logged)
	}
}

// If outer code has read the body, all bodies would have one fingerprint.
func TestBodyThatIsGoneIsRefused(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, h http.Handler) http.Handler {
		inner := idem.Handler(h)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_ = r.FormValue("csrf")
			inner.ServeHTTP(w, r)
		})
	}}, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "paid "+r.PostFormValue("amount"))
	})
	for _, amount := range []string{"10", "9999"} {
		got := b.post(t, "/", "amount="+amount, "Idempotency-Key", "k", "Content-Type", "application/x-www-form-urlencoded")
		want(t, got, 500, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
	}
}

// net/http removes the files of a form from its own request, not from the handler's copy.
func TestFilesOfAFormAreRemoved(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	b := setup(t, setupOptions{}, func(w http.ResponseWriter, r *http.Request) {
		if err := r.ParseMultipartForm(1); err != nil {
			t.Error(err)
		}
		if files, _ := filepath.Glob(dir + "/multipart-*"); len(files) != 1 {
			t.Errorf("%d files", len(files))
		}
		w.WriteHeader(http.StatusOK)
	})
	var body bytes.Buffer
	form := multipart.NewWriter(&body)
	file, err := form.CreateFormFile("file", "x")
	if err != nil {
		t.Fatal(err)
	}
	_, _ = file.Write(make([]byte, 200<<10))
	_ = form.Close()
	want(t, b.post(t, "/", body.String(), "Idempotency-Key", "k", "Content-Type", form.FormDataContentType()), 200, idempotency.OutcomeExecuted, "")
	if files, _ := filepath.Glob(dir + "/multipart-*"); len(files) != 0 {
		t.Errorf("%d files are left", len(files))
	}
}

// Slowloris: 200 clients that send half a body hold nothing, and a pool of 2 serves the others.
func TestHalfSentBodiesHoldNoConnection(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{
		poolMax:    2,
		store:      &postgres.Options{AcquireTimeout: 20 * time.Second}, // duration does not matter here
		middleware: &middleware.Options{InFlightMax: 10},
		server:     func(s *http.Server) { s.ReadTimeout = time.Minute },
	}, transfer)
	const slow, others = 200, 40
	head := func(key string) string {
		return "POST / HTTP/1.1\r\nHost: x\r\nAccount: acme\r\nIdempotency-Key: " + key + "\r\nContent-Length: 10\r\n\r\n{\"a\""
	}
	before := b.pool.Stat().AcquireCount()
	var conns []net.Conn
	for i := range slow {
		conn := b.dial(t)
		if _, err := io.WriteString(conn, head(fmt.Sprint("slow-", i))); err != nil {
			t.Fatal(err)
		}
		conns = append(conns, conn)
	}
	answers := make(chan reply, others)
	var senders sync.WaitGroup
	for sender := range 4 {
		senders.Go(func() {
			for i := range others / 4 {
				answers <- b.post(t, "/", "{}", "Idempotency-Key", fmt.Sprint("other-", sender, "-", i))
			}
		})
	}
	senders.Wait()
	for range others {
		want(t, <-answers, 201, idempotency.OutcomeExecuted, "")
	}
	if acquired := b.pool.Stat().AcquireCount() - before; acquired != others || b.runs.Load() != others {
		t.Errorf("%d connections were taken and %d handlers ran, want %d of each: none for half a body", acquired, b.runs.Load(), others)
	}
	// They were connected all the time: one of them sends the rest.
	if _, err := io.WriteString(conns[0], ":true}"); err != nil {
		t.Fatal(err)
	}
	want(t, b.readFrom(t, conns[0]), 201, idempotency.OutcomeExecuted, "")
}

// An outer body limit that is lower than ours still applies.
func TestMaxBytesHandlerOutside(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, h http.Handler) http.Handler {
		return http.MaxBytesHandler(idem.Handler(h), 10)
	}}, transfer)
	want(t, b.post(t, "/", strings.Repeat("x", 11), "Idempotency-Key", "k"), 413, idempotency.OutcomeNotExecuted, idempotency.ReasonBodyTooLarge)
	want(t, b.post(t, "/", strings.Repeat("x", 10), "Idempotency-Key", "k"), 201, idempotency.OutcomeExecuted, "")
}

// A retry that is compressed again is another request if the handler unpacks it: the bytes count,
// and compressors write the time. Mounted outside, the decompressor makes them one
// (TestBodyReplacedOutside).
func TestBodyCompressedAnewIsAnotherRequestToAHandlerThatUnpacks(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, h http.Handler) http.Handler {
		return idem.Handler(decompress(h, false, false))
	}}, transfer)
	send := func(at int64) reply {
		return b.post(t, "/", zipped(t, `{"to":"bob"}`, time.Unix(at, 0)), "Idempotency-Key", "k", "Content-Encoding", "gzip")
	}
	want(t, send(1_700_000_000), 201, idempotency.OutcomeExecuted, "")
	want(t, send(1_700_000_000), 201, idempotency.OutcomeReplayed, "")
	want(t, send(1_700_000_030), 422, idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)
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
