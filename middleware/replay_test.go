package middleware_test

import (
	"bytes"
	"io"
	"mime/multipart"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
)

// A replay has the recorded headers of the first answer as they were: bytes, spellings, and what is not there.
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

// What could not be read back must not be recorded: each retry would be unknown for good.
func TestHeadersOverTheLimitFail(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, func(w http.ResponseWriter, _ *http.Request) {
		for range 20 {
			w.Header().Add("Link", strings.Repeat("x", 60_000))
		}
	})
	b.client.Transport.(*http.Transport).MaxResponseHeaderBytes = 4 << 20
	for range 2 {
		want(t, b.post(t, "/", "", "Idempotency-Key", "k"), 500, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
	}
}

// Where somebody outside has read the body all bodies would have one fingerprint.
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
