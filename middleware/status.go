package middleware

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"mime"
	"net/http"
	"net/url"
	"path"
	"strings"
	"sync"
	"unicode/utf8"

	"github.com/paidonce/idempotency"
)

// StatusSecretBytesMin is the minimum length of a secret of [NewStatus].
const StatusSecretBytesMin = 32

// Status is the status resource of requests that were answered 202 pending: see [Options.Accepted].
// It is an [http.Handler] for GET that the service mounts at the address that it was made with. The
// id in the address is the encrypted route, scope, key and fingerprint of the request: it is the
// same for each retry, can't be guessed, and reveals nothing.
//
// It answers 200 with an [Operation] in JSON if the ScopeFunc of the request's route returns the
// request's scope for the caller; 404 if the id does not belong to that scope, or if its record is
// gone; 403 if the route's AuthorizeReplay refuses the answer; 503 if the store is not available.
// Its answers are not cached, and have no Idempotency-Status, because they are about the operation
// and not about a request with a key.
//
// Several routes may share one. It is safe for concurrent use.
type Status struct {
	location string
	ciphers  []statusCipher // the first seals

	mu     sync.Mutex
	routes map[string]*Middleware // by Options.Resumable
}

// Operation is the state of a request, as the status resource shows it.
type Operation struct {
	ID     string          `json:"id"`
	Status OperationStatus `json:"status"`

	// Answer is the recorded answer. It is set only if the operation is done.
	Answer *OperationAnswer `json:"answer,omitempty"`
}

// OperationStatus is the status of an [Operation].
type OperationStatus string

// The statuses of an operation.
const (
	OperationPending        OperationStatus = "pending"         // it will end without the client
	OperationNeedsAttention OperationStatus = "needs-attention" // only a person can end it
	OperationDone           OperationStatus = "done"            // a retry of the request gets the answer too
)

// OperationAnswer is the recorded answer of a request, without its headers. A retry of the request
// with its key gets the headers, and the body byte by byte.
type OperationAnswer struct {
	Status int `json:"status"`

	// Body is the body itself if it is valid JSON with a Content-Type of JSON, else a JSON string of
	// it.
	Body json.RawMessage `json:"body"`

	// Encoding is "base64" if the body is not UTF-8, because Body then has it in base64; else empty.
	Encoding string `json:"encoding,omitempty"`
}

// NewStatus returns a status resource at a URL or path that ends with a slash, such as
// "/v1/operations/"; the id is appended. The first secret makes ids, and all of them read ids: to
// change it, first add the new one behind the old one in all replicas, then put it in front. A
// secret is at least 32 bytes ([StatusSecretBytesMin]) from a source of randomness, the same in all
// replicas, and used for nothing else. NewStatus panics if the address or a secret can't work.
func NewStatus(location string, secrets ...[]byte) *Status {
	address, err := url.Parse(location)
	if err != nil || !strings.HasSuffix(location, "/") || address.RawQuery != "" || address.Fragment != "" ||
		strings.HasPrefix(location, "//") || !strings.HasPrefix(location, "/") && (address.Host == "" || address.Scheme != "https" && address.Scheme != "http") {
		panic("idempotency/middleware: NewStatus needs a path or URL that ends with a slash, such as /v1/operations/")
	}
	if len(secrets) == 0 {
		panic(fmt.Sprintf("idempotency/middleware: NewStatus needs a secret of at least %d bytes from crypto/rand, the same in all replicas: without one anybody could guess the id of an operation", StatusSecretBytesMin))
	}
	s := &Status{location: location, routes: map[string]*Middleware{}}
	for _, secret := range secrets {
		if len(secret) < StatusSecretBytesMin || len(bytes.Trim(secret, "\x00")) == 0 {
			panic(fmt.Sprintf("idempotency/middleware: a secret of NewStatus has %d bytes, or is all zero: draw at least %d from crypto/rand", len(secret), StatusSecretBytesMin))
		}
		s.ciphers = append(s.ciphers, newStatusCipher(secret))
	}
	return s
}

// Format keeps the secrets out of every verb of fmt. It drops the error, for which fmt has no use.
func (s *Status) Format(f fmt.State, _ rune) { _, _ = fmt.Fprint(f, "status resource at "+s.location) }

// register lets the operations of a route be shown.
func (s *Status) register(m *Middleware) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.routes[m.options.Resumable] != nil {
		panic("idempotency/middleware: two routes of one Status with the Resumable name " + m.options.Resumable)
	}
	s.routes[m.options.Resumable] = m
}

// operation is the content of an id. With the fingerprint an id can't show another request with the
// same key, after the first one's record has expired.
type operation struct {
	route       string // Options.Resumable
	key         idempotency.Key
	fingerprint idempotency.Fingerprint
}

// writePending answers an open request that prefers not to wait with the state of its operation.
func (s *Status) writePending(w http.ResponseWriter, run *run, result idempotency.Result) {
	m := run.m
	id := s.seal(operation{m.options.Resumable, run.key, run.fingerprint(m.options.Fingerprinters[0])})
	h := w.Header()
	h.Set("Idempotency-Status", string(idempotency.OutcomePending))
	h.Set("Preference-Applied", respondAsync)
	h.Set("Location", s.location+id)
	h.Set("Retry-After", retryAfter(max(result.RetryAfter, m.options.RetryAfter)))
	h.Del("Content-Length") // net/http sets it, after outer middleware
	writeOperation(w, http.StatusAccepted, Operation{ID: id, Status: statusOf(result)})
}

func statusOf(result idempotency.Result) OperationStatus {
	if result.Reason == idempotency.ReasonNeedsAttention {
		return OperationNeedsAttention
	}
	return OperationPending
}

func writeOperation(w http.ResponseWriter, status int, operation Operation) {
	var body bytes.Buffer
	encoder := json.NewEncoder(&body)
	encoder.SetEscapeHTML(false)                      // the answer's own JSON stays as readable as it was
	if err := encoder.Encode(operation); err != nil { // strings, and JSON that was checked
		panic(err)
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(body.Bytes()) // a client that is gone asks again
}

// ServeHTTP implements [http.Handler]. The id is the last segment of the path.
func (s *Status) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		writePlainProblem(w, http.StatusMethodNotAllowed)
		return
	}
	id := path.Base(r.URL.Path)
	operation, ok := s.open(id)
	s.mu.Lock()
	m := s.routes[operation.route]
	s.mu.Unlock()
	if !ok || m == nil {
		writePlainProblem(w, http.StatusNotFound)
		return
	}
	scope, err := m.scope(r)
	if err != nil {
		m.refuseOperation(w, r, idempotency.ReasonScope, &serviceError{err})
		return
	}
	if scope != operation.key.Scope {
		writePlainProblem(w, http.StatusNotFound)
		return
	}
	result := m.engine.LookUp(r.Context(), idempotency.Request{Key: operation.key, Fingerprint: operation.fingerprint})
	if result.Record != nil {
		if err := vet(result.Answer); err != nil {
			result = idempotency.Result{Reason: idempotency.ReasonRecordCorrupt, Err: err}
		}
	}
	switch {
	case errors.Is(result.Err, idempotency.ErrNotFound),
		result.Err == nil && result.Record == nil && !result.Accepted: // the record of another request with the key
		writePlainProblem(w, http.StatusNotFound)
	case result.Err != nil:
		m.logOperation(r.Context(), operation.key, result)
		m.writeDocument(w, textOf(result.Reason, nil), problem{Type: m.options.ProblemBase + string(result.Reason)}, "", nil, m.options.RetryAfter)
	case result.Accepted:
		status := statusOf(result)
		if status == OperationPending {
			w.Header().Set("Retry-After", retryAfter(max(result.RetryAfter, m.options.RetryAfter)))
		}
		writeOperation(w, http.StatusOK, Operation{ID: id, Status: status})
	default:
		if m.options.AuthorizeReplay != nil {
			if err := m.options.AuthorizeReplay(r, result.Record); err != nil {
				m.refuseOperation(w, r, idempotency.ReasonReplayDenied, &serviceError{err})
				return
			}
		}
		writeOperation(w, http.StatusOK, Operation{ID: id, Status: OperationDone, Answer: operationAnswer(result.Answer)})
	}
}

// refuseOperation answers a caller who may not see an operation.
func (m *Middleware) refuseOperation(w http.ResponseWriter, r *http.Request, reason idempotency.Reason, err error) {
	var status *StatusError
	if reason == idempotency.ReasonScope {
		errors.As(err, &status)
	}
	m.traceRefused(r, reason, err, status)
	m.writeDocument(w, textOf(reason, status), problem{Type: m.options.ProblemBase + string(reason)}, "", status, m.options.RetryAfter)
}

func (m *Middleware) logOperation(ctx context.Context, key idempotency.Key, result idempotency.Result) {
	level := slog.LevelWarn
	if result.Reason == idempotency.ReasonRecordCorrupt {
		level = slog.LevelError
	}
	m.options.Logger.LogAttrs(ctx, level, "idempotency: operation could not be looked up",
		slog.String("reason", string(result.Reason)), slog.Any("key", key), slog.Any("error", result.Err))
}

// writePlainProblem answers with a problem document that says no more than its status.
func writePlainProblem(w http.ResponseWriter, status int) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = fmt.Fprintf(w, `{"type":"about:blank","title":%q,"status":%d}`, http.StatusText(status), status)
}

func operationAnswer(answer *idempotency.Answer) *OperationAnswer {
	shown := &OperationAnswer{Status: answer.Status}
	contentType := ""
	if values := answer.Header["Content-Type"]; len(values) > 0 {
		contentType, _, _ = mime.ParseMediaType(values[0])
	}
	isJSON := contentType == "application/json" || strings.HasSuffix(contentType, "+json")
	if isJSON && json.Valid(answer.Body) && utf8.Valid(answer.Body) {
		shown.Body = answer.Body
		return shown
	}
	text := string(answer.Body)
	if !utf8.Valid(answer.Body) {
		shown.Encoding, text = "base64", base64.StdEncoding.EncodeToString(answer.Body)
	}
	shown.Body, _ = json.Marshal(text) // a string can be encoded
	return shown
}

// An id is base64url of AES-256-GCM over the operation. The nonce is a MAC of the operation, so
// that equal operations have equal ids, and no nonce is used for two.

// statusIDVersion is the first byte that is encrypted.
const statusIDVersion = 1

// statusIDBytesMax is the length of the longest id, in characters: 4 for each 3 bytes of the nonce
// and the tag, the version, the fingerprint, and three fields with their lengths.
const statusIDBytesMax = (12 + 16 + 1 + 2 + sha256.Size + 1 + idempotency.ResumableBytesMax + 2 + idempotency.ScopeBytesMax + 2 + idempotency.KeyBytesMax) * 4 / 3

type statusCipher struct {
	aead cipher.AEAD
	mac  []byte // the key of the MAC
}

func newStatusCipher(secret []byte) statusCipher {
	derive := func(info string) []byte {
		key, err := hkdf.Key(sha256.New, secret, nil, "paidonce status id "+info, 32)
		if err != nil { // only a wrong length fails
			panic(err)
		}
		return key
	}
	block, err := aes.NewCipher(derive("encryption"))
	if err != nil { // only a wrong length fails
		panic(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil { // only a block that is not AES fails
		panic(err)
	}
	return statusCipher{aead, derive("nonce")}
}

// nonce returns the nonce of an encoded operation.
func (c statusCipher) nonce(plain []byte) []byte {
	mac := hmac.New(sha256.New, c.mac)
	mac.Write(plain)
	return mac.Sum(nil)[:c.aead.NonceSize()]
}

// seal returns the id of an operation.
func (s *Status) seal(o operation) string {
	plain := binary.BigEndian.AppendUint16([]byte{statusIDVersion}, uint16(o.fingerprint.Version))
	plain = append(plain, o.fingerprint.Sum[:]...)
	for _, field := range []string{o.route, o.key.Scope, o.key.Value} {
		plain = append(binary.AppendUvarint(plain, uint64(len(field))), field...)
	}
	nonce := s.ciphers[0].nonce(plain)
	return base64.RawURLEncoding.EncodeToString(s.ciphers[0].aead.Seal(nonce, nonce, plain, nil))
}

// open returns the operation of an id, and whether it is an id of this service.
func (s *Status) open(id string) (operation, bool) {
	if len(id) > statusIDBytesMax {
		return operation{}, false
	}
	sealed, err := base64.RawURLEncoding.Strict().DecodeString(id)
	if err != nil {
		return operation{}, false
	}
	for _, c := range s.ciphers {
		size := c.aead.NonceSize()
		if len(sealed) < size {
			return operation{}, false
		}
		plain, err := c.aead.Open(nil, sealed[:size], sealed[size:], nil)
		if err == nil {
			return parseOperation(plain)
		}
	}
	return operation{}, false
}

func parseOperation(plain []byte) (o operation, ok bool) {
	const head = 1 + 2 + sha256.Size
	if len(plain) < head || plain[0] != statusIDVersion {
		return operation{}, false
	}
	o.fingerprint.Version = int16(binary.BigEndian.Uint16(plain[1:]))
	copy(o.fingerprint.Sum[:], plain[3:])
	rest := plain[head:]
	for _, field := range []*string{&o.route, &o.key.Scope, &o.key.Value} {
		length, n := binary.Uvarint(rest)
		if n <= 0 || length > uint64(len(rest)-n) {
			return operation{}, false
		}
		*field, rest = string(rest[n:n+int(length)]), rest[n+int(length):]
	}
	return o, len(rest) == 0 && o.key.Validate() == nil
}
