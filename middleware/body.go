package middleware

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"github.com/paidonce/idempotency"
)

// bodyBytesAhead is the maximum memory that is allocated for a body before it arrives. More is
// allocated as bytes arrive: a client that announces much and sends little must not cost much.
const bodyBytesAhead = 4 << 10

// These refuse a request although its body arrived: its fingerprint would match other bodies too.
var (
	errBodyTaken       = errors.New("body was taken before its fingerprint")
	errBodyUnannounced = errors.New("body is empty and its length was not announced, as that of a body which was read outside: send Content-Length, or mount what reads bodies inside")
)

// watchedBody counts the bytes that are read from a body.
type watchedBody struct {
	io.ReadCloser
	n int64
}

// Read implements io.Reader.
func (b *watchedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	b.n += int64(n)
	return n, err
}

// watch wraps the body before the service's functions, which might read it, see it.
func (run *run) watch() {
	if r := run.request; r.Body != nil && r.Body != http.NoBody {
		run.watched.ReadCloser = r.Body
		r.Body = &run.watched
	}
}

// readBody reads the body within its limit; over it the error is an *http.MaxBytesError. If
// Content-Length already exceeds the limit nothing is read, so that a client that waits for 100
// Continue does not send its body. The body of a keyed request must be complete, because it is
// fingerprinted.
func (run *run) readBody(w http.ResponseWriter, keyed bool) error {
	r, limit := run.request, run.m.options.BodyBytesMax
	tooLarge := func() error {
		w.Header().Set("Connection", "close") // the rest is not worth reading
		return &http.MaxBytesError{Limit: limit}
	}
	if r.ContentLength > limit {
		return tooLarge()
	}
	var buffer bytes.Buffer
	if r.Body != nil && r.Body != http.NoBody {
		if r.ContentLength > 0 {
			// With MinRead more, ReadFrom need not grow the buffer.
			buffer.Grow(int(min(r.ContentLength, bodyBytesAhead)) + bytes.MinRead)
		}
		run.reader = io.LimitedReader{R: r.Body, N: limit}
		if limit < math.MaxInt64 {
			run.reader.N++
		}
		if _, err := buffer.ReadFrom(&run.reader); err != nil {
			return fmt.Errorf("read body: %w", err)
		}
		if int64(buffer.Len()) > limit {
			return tooLarge()
		}
	}
	if r.Body == &run.watched {
		r.Body = run.watched.ReadCloser
	}
	run.body = buffer.Bytes()
	if !keyed {
		return nil
	}
	return run.whole()
}

// whole returns nil if the body that was read is all that the client sent. If the client's body
// ends early, reading net/http's own body returns an error. So a body that ends early without an
// error was read before, in part or whole, or was replaced by another.
func (run *run) whole() error {
	r, came := run.request, int64(len(run.body))
	switch {
	case run.watched.ReadCloser != nil && run.watched.n != came:
		return fmt.Errorf("%w: %d of %d bytes were left to it: a ScopeFunc, Route or TraceID must not read the body, or must put it back whole", errBodyTaken, came, run.watched.n)
	case came == 0 && (len(r.PostForm) > 0 || r.MultipartForm != nil):
		return fmt.Errorf("%w: its form was parsed outside: mount what does so inside", errBodyTaken)
	case came == 0 && r.ContentLength < 0:
		return errBodyUnannounced
	case came < r.ContentLength && (came == 0 || !replaced(r)):
		return fmt.Errorf("%w: %d bytes came of %d: mount what reads bodies inside; what replaces one, as a decompressor does, must set r.ContentLength to -1", errBodyTaken, came, r.ContentLength)
	}
	return nil
}

// replaced reports whether outer middleware replaced the client's body and left r.ContentLength as
// it was. It recognizes that by the Content-Length header, which is then missing or has another
// length.
func replaced(r *http.Request) bool {
	announced, err := strconv.ParseInt(r.Header.Get("Content-Length"), 10, 64)
	return err != nil || announced != r.ContentLength
}

// fingerprint returns the request's fingerprint by one of the functions.
func (run *run) fingerprint(f Fingerprinter) idempotency.Fingerprint {
	if f.Content == nil {
		escapedPath, rawQuery := target(run.request)
		return idempotency.NewFingerprintV1(run.request.Method, escapedPath, rawQuery, run.request.Header.Get("Content-Type"), run.body)
	}
	r := run.copied()
	defer run.removeForm(r)
	return idempotency.NewFingerprint(f.Version, f.Content(r, run.body))
}

// ofAnotherProtocol is a FingerprintAt for the records of gRPC calls. It returns a fingerprint that
// equals no other, so a key that was used by gRPC is a mismatch.
func ofAnotherProtocol(version int16) (idempotency.Fingerprint, bool) {
	return idempotency.Fingerprint{Version: version}, version == idempotency.FingerprintVersionRPC
}

// target returns the target as the client sent it: http.StripPrefix outside would make two routes
// one.
func target(r *http.Request) (escapedPath, rawQuery string) {
	escapedPath, rawQuery = r.URL.EscapedPath(), r.URL.RawQuery
	path, query, _ := strings.Cut(r.RequestURI, "?")
	if path == escapedPath && query == rawQuery && strings.HasPrefix(path, "/") {
		return path, query // nobody changed r.URL: no need to parse it again
	}
	if sent, err := url.ParseRequestURI(r.RequestURI); err == nil {
		return sent.EscapedPath(), sent.RawQuery
	}
	return escapedPath, rawQuery
}

// give sets a request's body to the bytes that were read.
func (run *run) give(r *http.Request, body *memoryBody) {
	body.Reset(run.body)
	r.Body = body
	r.ContentLength = int64(len(run.body))
	r.TransferEncoding = nil
	if len(run.body) == 0 {
		r.Body = http.NoBody
	}
}

// removeForm removes the temporary files of a form: net/http does so only for its own request, not
// for a copy.
func (run *run) removeForm(r *http.Request) {
	if r.MultipartForm != nil && run.request.MultipartForm == nil {
		_ = r.MultipartForm.RemoveAll()
	}
}

// copied returns a copy of the request with the body that was read, for a function of the service:
// the form that it parses belongs to the copy.
func (run *run) copied() *http.Request {
	r := run.request.WithContext(run.request.Context())
	run.give(r, new(memoryBody))
	return r
}

// authorize calls AuthorizeReplay.
func (run *run) authorize(record *idempotency.Record) error {
	r := run.copied()
	defer run.removeForm(r)
	return run.m.options.AuthorizeReplay(r, record)
}

// memoryBody is a request's body in memory.
type memoryBody struct{ bytes.Reader }

// Close implements io.Closer.
func (*memoryBody) Close() error { return nil }
