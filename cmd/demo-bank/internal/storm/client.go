package storm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"strings"
	"time"
	"unique"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/check"
	"github.com/paidonce/idempotency/internal/deadline"
)

const (
	// RequestTimeout is longer than a bank lets any request take, including its look-up of a lost
	// COMMIT.
	RequestTimeout = 40 * time.Second

	// Before a client repeats a request with the same key it pauses: first for BackoffFirst, then
	// twice as long each time, up to BackoffMax.
	BackoffFirst = 10 * time.Millisecond
	BackoffMax   = 500 * time.Millisecond

	dialTimeout    = 2 * time.Second
	answerBytesMax = 1 << 20
	slowPause      = 40 * time.Millisecond // between the parts of a slow body
	contentType    = "application/json"
)

// Trouble is a fault that a client causes in its own request.
type Trouble uint8

// The kinds of trouble.
const (
	NoTrouble Trouble = iota
	Cut               // closes the connection before the reply, by a RST or a FIN
	HangUp            // stops waiting for the reply
	HalfSent          // sends half of the body
	Slow              // sends the body in parts
)

// Client is a client with one connection. It sends a request once and returns the result. Its
// caller decides about retries. It is used by one goroutine at a time.
type Client struct {
	id       int
	clock    func() time.Duration
	cutAfter time.Duration
	http     http.Client
}

// NewClient returns a client with the given number in the history. clock is the run's clock, and
// never returns 0. A client that loses a reply on purpose hangs up within cutAfter of the last byte
// of its request.
func NewClient(id int, clock func() time.Duration, cutAfter time.Duration) *Client {
	return &Client{id: id, clock: clock, cutAfter: cutAfter, http: http.Client{
		Timeout: RequestTimeout,
		Transport: &http.Transport{
			DialContext:         (&net.Dialer{Timeout: dialTimeout}).DialContext,
			MaxIdleConnsPerHost: 1, DisableCompression: true,
		},
	}}
}

// Close closes the connection. The client can still be used.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Request is a request to send.
type Request struct {
	Asked         check.Operation // without the fields of the reply
	URL           string
	Authorization string // the header's value; empty for none
	Body          []byte
	Async         bool // Prefer: respond-async
	OnReply       func(http.Header)
}

// Send sends a request once. It returns the operation for the history and the body of the reply,
// nil if there was no reply. sent is false if no executable request left the client: then there was
// no operation.
func (c *Client) Send(ctx context.Context, q *Request, t Trouble) (op check.Operation, body []byte, sent bool) {
	op = q.Asked
	op.Client = c.id
	if t == HalfSent {
		c.sendHalf(ctx, q)
		return op, nil, false
	}
	op.Sent = c.clock()
	var response *http.Response
	var err error
	if t == Cut {
		err = c.cut(ctx, q)
	} else {
		response, body, err = c.exchange(ctx, q, t)
	}
	returned := c.clock()
	switch {
	case errors.Is(err, errUnsent):
		return op, nil, false
	case err != nil:
		return op, nil, true
	}
	op.Returned, op.Status = returned, response.StatusCode
	if q.OnReply != nil {
		q.OnReply(response.Header)
	}
	fill(&op, response.Header, body)
	return op, body, true
}

// fill copies a reply into an operation. It shares equal strings, because a run may have millions
// of operations.
func fill(op *check.Operation, header http.Header, body []byte) {
	op.Outcome = unique.Make(header.Get("Idempotency-Status")).Value()
	kind := header.Get("Content-Type")
	if strings.HasPrefix(kind, "application/problem+json") {
		op.Problem = unique.Make(problemOf(body)).Value()
	}
	switch op.Outcome {
	case "executed", "replayed", "":
		op.Answer = AnswerOf(op.Status, kind, header.Get("Location"), body)
		if op.Status >= 200 && op.Status <= 299 {
			var told struct {
				ID string `json:"id"`
			}
			_ = json.Unmarshal(body, &told) // the checks find an answer without an id
			op.ID = told.ID
		}
	}
}

// AnswerOf returns the hash of everything that a replay must repeat.
func AnswerOf(status int, contentType, location string, body []byte) [sha256.Size]byte {
	h := sha256.New()
	fmt.Fprintf(h, "%d\n%q\n%q\n", status, contentType, location)
	h.Write(body)
	var sum [sha256.Size]byte
	h.Sum(sum[:0])
	return sum
}

// problemOf returns the end of a problem document's type.
func problemOf(body []byte) string {
	var document struct {
		Type string `json:"type"`
	}
	if json.Unmarshal(body, &document) != nil {
		return "unreadable"
	}
	_, slug, _ := strings.Cut(document.Type, "#")
	return slug
}

// errUnsent means that no byte of a request left the client.
var errUnsent = errors.New("no connection")

func (q *Request) http(ctx context.Context, body io.Reader) (*http.Request, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, q.URL, body)
	if err != nil {
		return nil, err
	}
	// Without GetBody Go's client can't silently send a request twice.
	r.GetBody, r.ContentLength = nil, int64(len(q.Body))
	r.Header.Set("Content-Type", contentType)
	r.Header.Set("Idempotency-Key", q.Asked.Key)
	if q.Async {
		r.Header.Set("Prefer", "respond-async")
	}
	if q.Authorization != "" {
		r.Header.Set("Authorization", q.Authorization)
	}
	return r, nil
}

// exchange sends a request and reads its reply to the end.
func (c *Client) exchange(ctx context.Context, q *Request, t Trouble) (*http.Response, []byte, error) {
	var body io.Reader = bytes.NewReader(q.Body)
	switch t {
	case Slow:
		body = &slowReader{ctx: ctx, rest: q.Body}
	case HangUp:
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Millisecond+rand.N(c.cutAfter))
		defer cancel()
	}
	connected := false
	request, err := q.http(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		// Do calls this before it sends anything.
		GotConn: func(httptrace.GotConnInfo) { connected = true },
	}), body)
	if err != nil {
		return nil, nil, err
	}
	response, err := c.http.Do(request)
	if err != nil {
		if !connected {
			return nil, nil, fmt.Errorf("%w: %w", errUnsent, err)
		}
		return nil, nil, err
	}
	// Read to its end, or the connection is broken.
	defer func() { _ = response.Body.Close() }()
	content, err := io.ReadAll(io.LimitReader(response.Body, answerBytesMax))
	return response, content, err
}

// slowReader returns a body in parts.
type slowReader struct {
	ctx  context.Context
	rest []byte
}

func (r *slowReader) Read(p []byte) (int, error) {
	if len(r.rest) == 0 {
		return 0, io.EOF
	}
	if err := deadline.Sleep(r.ctx, slowPause); err != nil {
		return 0, err
	}
	n := copy(p, r.rest[:min(len(r.rest), 16)])
	r.rest = r.rest[n:]
	return n, nil
}

var errCut = errors.New("cut")

// cut sends a request and closes the connection before its reply. It always returns an error.
func (c *Client) cut(ctx context.Context, q *Request) error {
	request, err := q.http(ctx, bytes.NewReader(q.Body))
	if err != nil {
		return err
	}
	conn, err := dial(ctx, request)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }() // a no-op unless writing failed
	if err := request.Write(conn); err != nil {
		return err
	}
	_ = deadline.Sleep(ctx, rand.N(c.cutAfter))
	if tcp, ok := conn.(*net.TCPConn); ok && rand.IntN(2) == 0 {
		_ = tcp.SetLinger(0) // a RST instead of a FIN
	}
	return errors.Join(errCut, conn.Close())
}

func dial(ctx context.Context, r *http.Request) (net.Conn, error) {
	address := r.URL.Host
	if r.URL.Port() == "" {
		address = net.JoinHostPort(r.URL.Hostname(), "80")
	}
	dialer := net.Dialer{Timeout: dialTimeout}
	conn, err := dialer.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUnsent, err)
	}
	return conn, nil
}

// sendHalf sends a request but stops in the middle of its body. It can't be executed and is never
// retried.
func (c *Client) sendHalf(ctx context.Context, q *Request) {
	request, err := q.http(ctx, bytes.NewReader(q.Body))
	if err != nil {
		return
	}
	var whole bytes.Buffer
	if err := request.Write(&whole); err != nil {
		return
	}
	conn, err := dial(ctx, request)
	if err != nil {
		return
	}
	defer func() { _ = conn.Close() }() // it has no reply
	_, _ = conn.Write(whole.Bytes()[:whole.Len()-len(q.Body)/2])
	_ = deadline.Sleep(ctx, rand.N(c.cutAfter))
}

// StatusError is a reply to a GET that is not 200.
type StatusError int

func (e StatusError) Error() string { return fmt.Sprintf("status %d", int(e)) }

// Get reads JSON from a bank. The error is a [StatusError] if the status is not 200.
func Get(ctx context.Context, client *http.Client, url string, into any) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	response, err := client.Do(r)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }() // read to its end, or useless
	if response.StatusCode != http.StatusOK {
		return StatusError(response.StatusCode)
	}
	return json.NewDecoder(io.LimitReader(response.Body, answerBytesMax)).Decode(into)
}
