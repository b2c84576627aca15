package chaos

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

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/check"
)

const (
	requestTimeout = 34 * time.Second // more than a bank lets any request take, its resolving included
	dialTimeout    = 2 * time.Second
	answerBytesMax = 1 << 20
	cutDelayMax    = 30 * time.Millisecond // from the last byte of a request to the end of its connection
	slowPause      = 40 * time.Millisecond // between the parts of a slow body
)

// trouble is what a client does to a request of its own.
type trouble uint8

const (
	noTrouble       trouble = iota
	troubleCut              // the connection is cut before the reply, by a reset or a goodbye
	troubleHangUp           // the client stops waiting
	troubleHalfSent         // the body ends in the middle
	troubleSlow             // the body comes in parts
)

// lane is one connection of a client's, for one request at a time.
type lane struct {
	run    *run
	id     int
	http   http.Client
	choice *rand.Rand // of what no seed has to repeat: pauses, which bank, whether to give up
	bank   int
	ops    []check.Operation
}

func newLane(r *run, id int) *lane {
	return &lane{run: r, id: id, choice: rand.New(rand.NewPCG(r.config.Seed, uint64(id)<<32|0x1a9e)), http: http.Client{
		Timeout: requestTimeout,
		Transport: &http.Transport{
			DialContext:         (&net.Dialer{Timeout: dialTimeout}).DialContext,
			MaxIdleConnsPerHost: 1, DisableCompression: true,
		},
	}}
}

func (l *lane) close() { l.http.CloseIdleConnections() }

// send sends a key's request once, notes it as an operation, and says what to make of what came back.
func (l *lane) send(ctx context.Context, k *key, changed, final bool, t trouble) result {
	if l.choice.IntN(3) == 0 { // else the bank of last time: connections are kept
		l.bank = l.choice.IntN(l.run.config.Banks)
	}
	if t == troubleHalfSent {
		l.sendHalf(ctx, k) // it can't have been executed, and nobody asks what became of it
		return resultUnsent
	}
	op := check.Operation{
		Client: l.id, Scope: tenantNames[k.tenant].scope, Key: k.text, Request: uint64(2 * k.index),
		From: k.from, To: k.to, Amount: k.amount, Final: final,
	}
	if k.asks == askOrder {
		op.Amount = 0 // of money; the price is the bank's
	}
	if changed {
		op.Request, op.Amount = op.Request+1, op.Amount+1
	}
	var a *answer
	var err error
	op.Sent = l.run.clock()
	if t == troubleCut {
		err = l.cut(ctx, k, changed)
	} else {
		a, err = l.exchange(ctx, k, changed, t)
	}
	returned := l.run.clock()
	if errors.Is(err, errUnsent) {
		l.run.tally.unsent.Add(1)
		return resultUnsent
	}
	what := resultLost
	if a != nil {
		op.Returned, op.Status, op.Outcome = returned, a.status, outcomes[a.outcome]
		what = l.read(k, a, &op)
		l.run.tally.observe(returned - op.Sent)
	}
	l.run.tally.count(&op, k)
	l.ops = append(l.ops, op)
	return what
}

// outcomes keeps one string of each outcome: there may be millions of operations. An outcome that is none of these is
// an unexpected answer.
var outcomes = map[string]string{
	"executed": "executed", "replayed": "replayed", "in-progress": "in-progress", "mismatch": "mismatch",
	"not-executed": "not-executed", "unknown": "unknown",
}

// read fills in an operation from its answer.
func (l *lane) read(k *key, a *answer, op *check.Operation) result {
	if strings.HasPrefix(a.contentType, "application/problem+json") {
		op.Problem = l.run.problems.intern(problemOf(a.body))
	}
	switch op.Outcome {
	case "executed", "replayed":
		op.Answer = a.hash()
		if a.status >= 200 && a.status <= 299 {
			var told struct {
				ID string `json:"id"`
			}
			_ = json.Unmarshal(a.body, &told) // an answer without an id is found by the checks
			op.ID = told.ID
		}
		if op.Answer == plantedAnswer && k.asks == askReused {
			return resultAgain
		}
		return resultAnswered
	case "mismatch":
		return resultMismatch
	case "not-executed":
		if a.status < 500 {
			l.run.unexpected.add("key %s: a good request was refused with %d %s", k.text, a.status, op.Problem)
		}
		return resultNotExecuted
	case "in-progress", "unknown":
		return resultAgain
	}
	l.run.unexpected.add("key %s: an answer with status %d says nothing of the key", k.text, a.status)
	return resultAgain
}

// answer is what came back.
type answer struct {
	status                         int
	outcome, contentType, location string
	body                           []byte
}

// hash is of all that a replay must repeat.
func (a *answer) hash() [sha256.Size]byte {
	h := sha256.New()
	fmt.Fprintf(h, "%d\n%q\n%q\n", a.status, a.contentType, a.location)
	h.Write(a.body)
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

func (l *lane) request(ctx context.Context, k *key, body io.Reader, length int) (*http.Request, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+l.run.banks.address(l.bank)+k.path(), body)
	if err != nil {
		return nil, err
	}
	// Without a GetBody Go's client can't send a request again by itself, which nobody would see.
	r.GetBody, r.ContentLength = nil, int64(length)
	r.Header.Set("Content-Type", contentType)
	r.Header.Set("Idempotency-Key", k.text)
	if authorization := tenantNames[k.tenant].authorization; authorization != "" {
		r.Header.Set("Authorization", authorization)
	}
	return r, nil
}

const contentType = "application/json"

// exchange sends a request and waits for its answer.
func (l *lane) exchange(ctx context.Context, k *key, changed bool, t trouble) (*answer, error) {
	content := k.body(changed)
	var body io.Reader = bytes.NewReader(content)
	switch t {
	case troubleSlow:
		body = &slowReader{ctx: ctx, rest: content}
	case troubleHangUp:
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Millisecond+rand.N(cutDelayMax))
		defer cancel()
	}
	ctx, hangUp := context.WithCancel(ctx)
	defer hangUp()
	k.waits(l, hangUp)
	defer k.waits(l, nil)
	connected := false
	request, err := l.request(httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { connected = true }, // called by Do, before anything is sent
	}), k, body, len(content))
	if err != nil {
		return nil, err
	}
	response, err := l.http.Do(request)
	if err != nil {
		if !connected {
			return nil, fmt.Errorf("%w: %w", errUnsent, err)
		}
		return nil, err
	}
	defer func() { _ = response.Body.Close() }() // it was read to its end, or the connection is broken
	read, err := io.ReadAll(io.LimitReader(response.Body, answerBytesMax))
	if err != nil {
		return nil, err
	}
	return &answer{
		status: response.StatusCode, body: read, outcome: response.Header.Get("Idempotency-Status"),
		location: response.Header.Get("Location"), contentType: response.Header.Get("Content-Type"),
	}, nil
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
	if err := sleep(r.ctx, slowPause); err != nil {
		return 0, err
	}
	n := copy(p, r.rest[:min(len(r.rest), 16)])
	r.rest = r.rest[n:]
	return n, nil
}

// cut sends a request and closes the connection before its reply. It always returns an error.
func (l *lane) cut(ctx context.Context, k *key, changed bool) error {
	content := k.body(changed)
	request, err := l.request(ctx, k, bytes.NewReader(content), len(content))
	if err != nil {
		return err
	}
	conn, err := l.dial(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }() // closed below, but where writing failed
	if err := request.Write(conn); err != nil {
		return err
	}
	_ = sleep(ctx, rand.N(cutDelayMax))
	if tcp, ok := conn.(*net.TCPConn); ok && rand.IntN(2) == 0 {
		_ = tcp.SetLinger(0) // a reset instead of a goodbye
	}
	return errors.Join(errCut, conn.Close())
}

var errCut = errors.New("cut")

func (l *lane) dial(ctx context.Context) (net.Conn, error) {
	dialer := net.Dialer{Timeout: dialTimeout}
	conn, err := dialer.DialContext(ctx, "tcp", l.run.banks.address(l.bank))
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errUnsent, err)
	}
	return conn, nil
}

// sendHalf sends a request whose body ends in the middle.
func (l *lane) sendHalf(ctx context.Context, k *key) {
	content := k.body(false)
	request, err := l.request(ctx, k, bytes.NewReader(content), len(content))
	if err != nil {
		return
	}
	var whole bytes.Buffer
	if err := request.Write(&whole); err != nil {
		return
	}
	conn, err := l.dial(ctx)
	if err != nil {
		return
	}
	defer func() { _ = conn.Close() }() // it has no reply
	_, _ = conn.Write(whole.Bytes()[:whole.Len()-len(content)/2])
	_ = sleep(ctx, rand.N(cutDelayMax))
}

func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
