package middleware

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"

	"github.com/paidonce/idempotency"
)

// errAnswerTooLarge fails a handler whose answer is over [Options.AnswerBytesMax].
var errAnswerTooLarge = errors.New("answer is over its limit")

// errNothingWritten fails a handler that returned without an answer, unless [Options.EmptyOK] is
// set.
var errNothingWritten = fmt.Errorf("%w: no WriteHeader, and no Write. "+
	"If a framework runs it (gin, echo, fiber, huma), its answer or error went around the middleware, perhaps to the client: use the adapter in contrib, or, if the framework is built on net/http, mount the middleware around the whole app; docs/stacks.md has each framework. "+
	"If it answers an empty 200, call WriteHeader(http.StatusOK), or set Options.EmptyOK", idempotency.ErrAnswerMissing)

// errAnsweredOutside fails a handler that answered on the writer outside.
var errAnsweredOutside = fmt.Errorf("%w: it answered on the writer outside of the middleware. The conn was closed, so that the client does not take that answer for the outcome. "+
	"Inside, the framework must use the writer that the middleware gives: docs/stacks.md has each framework", idempotency.ErrAnswerMissing)

// recorder is the handler's ResponseWriter. It keeps the answer in memory, so that nothing reaches
// the client before COMMIT has returned. It therefore has no Unwrap, and Flush, Hijack and
// deadlines fail with http.ErrNotSupported through http.ResponseController: with any of them a
// client could learn of a payment that does not happen.
type recorder struct {
	header   http.Header // the handler's; the answer has a copy from the first write on
	bytesMax int

	status  int // 0 until the handler gave one
	sent    http.Header
	body    []byte
	tooLong bool
	dropped []string // names of the middleware's headers that the handler set
}

func newRecorder(outer http.Header, bytesMax int) recorder {
	return recorder{header: outer.Clone(), bytesMax: bytesMax}
}

// Header implements http.ResponseWriter. It begins with the headers that middleware outside has
// set.
func (w *recorder) Header() http.Header {
	if w.header == nil {
		w.header = make(http.Header)
	}
	return w.header
}

// WriteHeader implements http.ResponseWriter. The first status stays; 1xx is dropped. Like
// net/http, it panics on an invalid status.
func (w *recorder) WriteHeader(status int) {
	if status < 100 || status > 999 || status == http.StatusSwitchingProtocols {
		panic(fmt.Sprintf("invalid WriteHeader code %d", status))
	}
	if status < 200 || w.status != 0 {
		return
	}
	w.status = status
	w.sent = w.Header().Clone()
}

// Write implements http.ResponseWriter.
func (w *recorder) Write(p []byte) (int, error) {
	w.WriteHeader(http.StatusOK)
	if w.status == http.StatusNoContent || w.status == http.StatusNotModified {
		return 0, http.ErrBodyNotAllowed
	}
	if len(p) > w.bytesMax-len(w.body) {
		w.tooLong = true
		return 0, errAnswerTooLarge
	}
	w.body = append(w.body, p...)
	return len(p), nil
}

// finish completes the answer as net/http would. outer are the headers that outer middleware set
// before the handler. If the handler sets a Content-Length, it becomes the answer's actual length;
// otherwise net/http decides. If the handler wrote nothing and emptyOK is false, it returns
// errNothingWritten.
func (w *recorder) finish(outer http.Header, emptyOK bool) error {
	if w.status == 0 && !emptyOK {
		return errNothingWritten
	}
	w.WriteHeader(http.StatusOK)
	if w.tooLong {
		return errAnswerTooLarge
	}
	if _, set := w.sent["Content-Type"]; !set && len(w.body) > 0 && w.sent.Get("Content-Encoding") == "" {
		w.sent.Set("Content-Type", http.DetectContentType(w.body))
	}
	announced := false
	for name, values := range w.sent {
		switch canonical := http.CanonicalHeaderKey(name); {
		case ours(canonical):
			delete(w.sent, name)
			if !slices.Equal(values, outer[name]) {
				w.dropped = append(w.dropped, canonical)
			}
		case canonical == "Content-Length":
			delete(w.sent, name)
			announced = announced || !slices.Equal(values, outer[name])
		}
	}
	if announced && w.status != http.StatusNoContent && w.status != http.StatusNotModified {
		w.sent.Set("Content-Length", strconv.Itoa(len(w.body)))
	}
	return nil
}
