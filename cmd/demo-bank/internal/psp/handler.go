package psp

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/go-chi/chi/v5"
)

// BodyBytesMax is the maximum size of a request's body.
const BodyBytesMax = 64 << 10

// KeyBytesMax is the maximum length of a key.
const KeyBytesMax = 255

// InstanceHeader is a header that every answer has: the id of the processor's instance, which a
// caller can keep with its payment.
const InstanceHeader = "Processor-Instance"

// problem is an answer that refuses a request. Clients may branch on Error.
type problem struct {
	Error  string `json:"error"`
	Detail string `json:"detail,omitempty"`
}

// processor answers requests from a ledger.
type processor struct {
	ledger *ledger
	logger *slog.Logger

	stopping chan struct{}  // ends delays
	posts    sync.WaitGroup // requests in progress, also those without a connection by now
}

func newProcessor(l *ledger, logger *slog.Logger) *processor {
	return &processor{ledger: l, logger: logger, stopping: make(chan struct{})}
}

// close ends the delayed requests, which then leave nothing, and closes the file.
func (p *processor) close() error {
	close(p.stopping)
	p.posts.Wait()
	return p.ledger.journal.close()
}

// handler returns the handler of all routes.
func (p *processor) handler() http.Handler {
	r := chi.NewRouter()
	r.Use(p.identify)
	r.Get("/faults", func(w http.ResponseWriter, _ *http.Request) { writeJSON(w, http.StatusOK, p.ledger.getFaults()) })
	r.Put("/faults", p.putFaults)
	r.Group(func(r chi.Router) {
		r.Use(p.cutIfDown)
		r.Get("/instance", func(w http.ResponseWriter, _ *http.Request) {
			writeJSON(w, http.StatusOK, struct {
				Instance string `json:"instance"`
			}{p.ledger.instance})
		})
		for _, k := range []kind{charges, refunds, payouts, mails} {
			r.Post("/"+string(k), func(w http.ResponseWriter, r *http.Request) { p.post(w, r, k) })
			r.Get("/"+string(k), func(w http.ResponseWriter, r *http.Request) { p.list(w, r, k) })
		}
		r.NotFound(func(w http.ResponseWriter, _ *http.Request) {
			writeProblem(w, http.StatusNotFound, "not_found", "There is nothing at this path.")
		})
		r.MethodNotAllowed(func(w http.ResponseWriter, _ *http.Request) {
			writeProblem(w, http.StatusMethodNotAllowed, "method_not_allowed", "This path answers other methods.")
		})
	})
	return r
}

func (p *processor) identify(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set(InstanceHeader, p.ledger.instance)
		w.Header().Set("Cache-Control", "no-store")
		next.ServeHTTP(w, r)
	})
}

// cutIfDown resets the connection while the processor is down.
func (p *processor) cutIfDown(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if faults := p.ledger.getFaults(); faults.Down {
			cut(w)
			return
		}
		next.ServeHTTP(w, r)
	})
}

func (p *processor) putFaults(w http.ResponseWriter, r *http.Request) {
	body, ok := readBody(w, r)
	if !ok {
		return
	}
	faults, err := decodeFaults(body)
	if err != nil {
		writeProblem(w, http.StatusBadRequest, "invalid", err.Error())
		return
	}
	if err := p.ledger.setFaults(faults); err != nil {
		p.writeFailure(w, r, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// post decides one request and misbehaves as the faults say.
func (p *processor) post(w http.ResponseWriter, r *http.Request, k kind) {
	p.posts.Add(1)
	defer p.posts.Done()
	name, err := keyOf(r, k)
	if err != nil {
		writeProblem(w, http.StatusBadRequest, "invalid_key", err.Error())
		return
	}
	body, ok := readBody(w, r)
	if !ok {
		return
	}
	o := newOrder(k)
	if err := decodeObject(body, o); err != nil {
		writeProblem(w, http.StatusBadRequest, "invalid", err.Error())
		return
	}
	if err := o.validate(); err != nil {
		writeProblem(w, http.StatusBadRequest, "invalid", strings.ReplaceAll(err.Error(), "\n", "; "))
		return
	}

	met := p.ledger.draw(name)
	switch {
	case met.loseRequest:
		cut(w)
		return
	case met.errorBefore:
		writeProblem(w, http.StatusServiceUnavailable, "unavailable", "")
		return
	}
	c, kept, err := p.ledger.claim(name, o)
	if err != nil {
		writeRefusal(w, err)
		return
	}
	if c != nil && met.late {
		cut(w)
		p.applyLate(c, met)
		return
	}
	// From here on the client does not matter: its request is applied whether or not it hangs up.
	if !p.pause(met.slowFor) {
		if c != nil {
			p.ledger.abandon(c)
		}
		cut(w)
		return
	}
	if c != nil {
		if kept, err = p.ledger.finish(c, met.sameError); err != nil {
			p.writeFailure(w, r, err)
			return
		}
	}
	switch {
	case met.loseReply:
		cut(w)
	case met.errorAfter:
		writeProblem(w, http.StatusGatewayTimeout, "timeout", "")
	default:
		writeJSON(w, kept.Status, kept.answer())
	}
}

// applyLate applies a request after its caller was cut off.
func (p *processor) applyLate(c *claim, met draw) {
	if !p.pause(met.lateFor) {
		p.ledger.abandon(c)
		return
	}
	if _, err := p.ledger.finish(c, met.sameError); err != nil {
		p.logger.Error("a late request was not applied", "error", err)
	}
}

// pause blocks for the duration. It returns false if the processor stops before it has passed.
func (p *processor) pause(duration time.Duration) bool {
	if duration == 0 {
		return true
	}
	timer := time.NewTimer(duration)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-p.stopping:
		return false
	}
}

// list answers with the items of a kind, or with those of one key.
func (p *processor) list(w http.ResponseWriter, r *http.Request, k kind) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	for name := range query {
		if name != "key" {
			err = fmt.Errorf("the parameter %.64q is unknown", name)
		}
	}
	if err != nil {
		writeProblem(w, http.StatusBadRequest, "invalid", err.Error())
		return
	}
	var found []*entry
	if query.Has("key") {
		found = p.ledger.lookup(keyName{k, query.Get("key")})
	} else {
		found = p.ledger.list(k)
	}
	items := make([]json.RawMessage, len(found))
	for i, e := range found {
		items[i] = e.Item
	}
	writeJSON(w, http.StatusOK, struct {
		Items []json.RawMessage `json:"items"`
	}{items})
}

// keyOf returns the key of a request. A mail needs none.
func keyOf(r *http.Request, k kind) (keyName, error) {
	keys := r.Header.Values("Idempotency-Key")
	switch {
	case len(keys) > 1:
		return keyName{}, errors.New("the header Idempotency-Key is given twice")
	case len(keys) == 0 && k.keyed(), len(keys) == 1 && keys[0] == "":
		return keyName{}, errors.New("the header Idempotency-Key is missing or empty")
	case len(keys) == 0:
		return keyName{kind: k}, nil
	case len(keys[0]) > KeyBytesMax:
		return keyName{}, fmt.Errorf("the key is over %d bytes", KeyBytesMax)
	}
	for _, b := range []byte(keys[0]) {
		if b < ' ' || b > '~' {
			return keyName{}, errors.New("the key has characters that are not printable ASCII")
		}
	}
	return keyName{k, keys[0]}, nil
}

// readBody returns the body, or answers the request and returns false.
func readBody(w http.ResponseWriter, r *http.Request) (body []byte, ok bool) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, BodyBytesMax))
	switch {
	case errors.As(err, new(*http.MaxBytesError)):
		writeProblem(w, http.StatusRequestEntityTooLarge, "body_too_large", fmt.Sprintf("The body is over %d bytes.", BodyBytesMax))
	case err != nil:
		writeProblem(w, http.StatusBadRequest, "body_unread", "The body could not be read.")
	}
	return body, err == nil
}

// cut resets the connection: the client finds an error instead of an orderly end.
func cut(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler) // the next best: not HTTP/1, and the stream is reset
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // fails if the connection is gone already
	}
	_ = conn.Close()
}

// writeRefusal answers with an error of [ledger.claim].
func writeRefusal(w http.ResponseWriter, err error) {
	switch {
	case errors.Is(err, errKeyUnderWay):
		writeProblem(w, http.StatusConflict, "key_under_way", "")
	case errors.Is(err, errKeyReused):
		writeProblem(w, http.StatusBadRequest, "key_reused", "")
	default:
		writeProblem(w, http.StatusInsufficientStorage, "full", "The processor keeps no more: start it with a new file.")
	}
}

// writeFailure answers a request if its outcome could not be written. It may or may not be on disk.
func (p *processor) writeFailure(w http.ResponseWriter, r *http.Request, err error) {
	p.logger.ErrorContext(r.Context(), "request failed", "error", err)
	writeProblem(w, http.StatusInternalServerError, "internal", "")
}

func writeProblem(w http.ResponseWriter, status int, code, detail string) {
	writeJSON(w, status, problem{code, detail})
}

// writeJSON answers with value as JSON. It panics if value can't be encoded.
func writeJSON(w http.ResponseWriter, status int, value any) {
	body, err := json.Marshal(value)
	if err != nil { // only our own types are passed
		panic(err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(append(body, '\n')) // ignored: the client may be gone
}
