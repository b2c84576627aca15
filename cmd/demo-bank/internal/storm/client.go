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
	// RequestTimeout is more than a bank lets any request take, its look for a lost COMMIT included.
	RequestTimeout = 40 * time.Second

	// Between two requests with one key a client pauses from BackoffFirst on, twice as long each time, up to BackoffMax.
	BackoffFirst = 10 * time.Millisecond
	BackoffMax   = 500 * time.Millisecond

	dialTimeout    = 2 * time.Second
	answerBytesMax = 1 << 20
	slowPause      = 40 * time.Millisecond // between the parts of a slow body
	contentType    = "application/json"
)

// Trouble is what a client does to a request of its own.
type Trouble uint8

// The kinds of trouble.
const (
	NoTrouble Trouble = iota
	Cut               // the connection is cut before the reply, by a reset or a goodbye
	HangUp            // the client stops waiting
	HalfSent          // the body ends in the middle
	Slow              // the body comes in parts
)

// Client is one connection of a client's. It sends a request once, and says what it saw: to ask again is its caller's
// decision. It is used by one goroutine at a time.
type Client struct {
	id       int
	clock    func() time.Duration
	cutAfter time.Duration
	http     http.Client
}

// NewClient returns a client that has the given number in a history. clock is the run's, and is never 0. A client that
// loses a reply on purpose goes away within cutAfter of the last byte of its request.
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

// Request is what a client asks for.
type Request struct {
	Asked         check.Operation // but for what the reply is
	URL           string
	Authorization string // the header's value; empty: none
	Body          []byte
}

// Send sends a request once. It returns the operation for the history and the body of the reply, which is nil if none
// came. It reports false if nothing that can be executed has left the client: then there was no operation.
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
	fill(&op, response.Header, body)
	return op, body, true
}

// fill takes what a reply says into an operation. It keeps one string of each kind: a run may have millions.
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
			_ = json.Unmarshal(body, &told) // an answer without an id is found by the checks
			op.ID = told.ID
		}
	}
}

// AnswerOf is the hash of all that a replay must repeat.
func AnswerOf(status int, contentType, location string, body []byte) [sha256.Size]byte {
	h := sha256.New()
	fmt.Fprintf(h, "%d\n%q\n%q\n", status, contentType, location)
	h.Write(body)
	var sum [sha256.Size]byte
	h.Sum(sum[:0])
	return sum
}

// problemOf is the end of a problem document's type.
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

// errUnsent means that nothing of a request left the client.
var errUnsent = errors.New("no connection")

func (q *Request) http(ctx context.Context, body io.Reader) (*http.Request, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, q.URL, body)
	if err != nil {
		return nil, err
	}
	// Without a GetBody Go's client can't send a request again by itself, which nobody would see.
	r.GetBody, r.ContentLength = nil, int64(len(q.Body))
	r.Header.Set("Content-Type", contentType)
	r.Header.Set("Idempotency-Key", q.Asked.Key)
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
		GotConn: func(httptrace.GotConnInfo) { connected = true }, // called by Do, before anything is sent
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
	defer func() { _ = response.Body.Close() }() // it was read to its end, or the connection is broken
	content, err := io.ReadAll(io.LimitReader(response.Body, answerBytesMax))
	return response, content, err
}

// slowReader is a body in parts.
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
	defer func() { _ = conn.Close() }() // closed below, but where writing failed
	if err := request.Write(conn); err != nil {
		return err
	}
	_ = deadline.Sleep(ctx, rand.N(c.cutAfter))
	if tcp, ok := conn.(*net.TCPConn); ok && rand.IntN(2) == 0 {
		_ = tcp.SetLinger(0) // a reset instead of a goodbye
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

// sendHalf sends a request whose body ends in the middle: it can't be executed, and nobody asks what became of it.
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

// Get reads JSON from a bank. The error is a [StatusError] if the bank answered otherwise than with 200.
func Get(ctx context.Context, client *http.Client, url string, into any) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	response, err := client.Do(r)
	if err != nil {
		return err
	}
	defer func() { _ = response.Body.Close() }() // it was read to its end, or is of no use
	if response.StatusCode != http.StatusOK {
		return StatusError(response.StatusCode)
	}
	return json.NewDecoder(io.LimitReader(response.Body, answerBytesMax)).Decode(into)
}
