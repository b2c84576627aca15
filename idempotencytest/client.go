package idempotencytest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptrace"
	"time"

	"github.com/paidonce/idempotency"
)

// Bounds of a client's wait between two requests with one key. It does not wait for Retry-After: a
// test should end soon, and patience is not under test.
const (
	backoffMin = 2 * time.Millisecond
	backoffMax = 100 * time.Millisecond
)

// request is one of the user's requests. It can be sent any number of times.
type request struct {
	method, target string
	header         http.Header
	body           []byte
}

func newRequest(r *http.Request) (*request, error) {
	q := &request{method: r.Method, target: r.URL.RequestURI(), header: r.Header.Clone()}
	if q.method == "" {
		q.method = http.MethodGet // as in net/http
	}
	if q.header == nil {
		q.header = http.Header{}
	}
	if r.Body != nil {
		defer func() { _ = r.Body.Close() }()
		var err error
		if q.body, err = io.ReadAll(r.Body); err != nil {
			return nil, err
		}
	}
	return q, nil
}

// same reports whether two requests ask for the same thing.
func (q *request) same(other *request) bool {
	return q.method == other.method && q.target == other.target && bytes.Equal(q.body, other.body)
}

// reply is a client's view of an answer.
type reply struct {
	outcome idempotency.Outcome // noAnswer if there is none
	status  int                 // 0 if the conn was cut
	header  http.Header
	body    []byte
}

func (r *reply) String() string {
	switch {
	case r.status == 0:
		return "no answer"
	case r.outcome == noAnswer:
		return fmt.Sprintf("%d without Idempotency-Status", r.status)
	}
	return fmt.Sprintf("%d %s", r.status, r.outcome)
}

// send sends a request with a key. With hangUp the client goes away as soon as the request is
// written.
func (l *lab) send(ctx context.Context, value string, q *request, hangUp bool) *reply {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if hangUp {
		ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{WroteRequest: func(httptrace.WroteRequestInfo) { cancel() }})
	}
	r, err := http.NewRequestWithContext(ctx, q.method, l.server.URL+q.target, bytes.NewReader(q.body))
	if err != nil {
		l.found(checkTable, "request can't be sent: %v", err)
		return &reply{}
	}
	r.Header = q.header.Clone()
	r.Header.Set("Idempotency-Key", value)
	r.GetBody = nil // otherwise Go's client retries keyed requests by itself
	l.requests.Add(1)
	response, err := l.client.Do(r)
	if err != nil {
		return &reply{}
	}
	defer func() { _ = response.Body.Close() }()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		return &reply{}
	}
	return &reply{
		outcome: idempotency.Outcome(response.Header.Get("Idempotency-Status")), status: response.StatusCode, header: response.Header, body: body,
	}
}

// manner is a client's behavior.
type manner struct {
	quits   bool // it gives up if it may, once a point was hit
	hangsUp bool // it does not wait for its first answer
}

// follow sends a key's request until it is settled, according to the table in docs/guarantees.md.
// struck is the reply to the request during which the first point was hit, or nil if none was hit.
// last is the last reply. ok is false if there was a finding.
func (l *lab) follow(ctx context.Context, k *key, m manner, random *rand.Rand) (struck, last *reply, ok bool) {
	ctx, cancel := context.WithTimeout(ctx, l.config.Patience)
	defer cancel()
	heard := &reply{}  // the last answer
	uncertain := false // an earlier request with the key may have been executed
	for backoff := backoffMin; ; backoff = min(2*backoff, backoffMax) {
		untouched := k.hit() == 0
		last = l.send(ctx, k.value, k.request, m.hangsUp)
		m.hangsUp = false
		if ctx.Err() != nil {
			l.found(checkSettled, "request %d has no answer for good after %v; the last was %s", k.n, l.config.Patience, heard)
			return struck, last, false
		}
		heard = last
		if untouched && k.hit() > 0 {
			struck = last
		}
		switch last.outcome {
		case idempotency.OutcomeExecuted, idempotency.OutcomeReplayed:
			if check, trouble := k.told(last); trouble != "" {
				l.found(check, "%s", trouble)
				return struck, last, false
			}
			return struck, last, true
		case idempotency.OutcomeMismatch:
			l.found(checkTable, "request %d was answered %s, and its key belongs to no other", k.n, last)
			return struck, last, false
		case idempotency.OutcomeNotExecuted:
			if m.quits && !uncertain && struck != nil {
				k.mu.Lock()
				k.abandoned = true
				k.mu.Unlock()
				return struck, last, true
			}
		case idempotency.OutcomeInProgress, idempotency.OutcomePending, idempotency.OutcomeUnknown:
			uncertain = true
			if why := l.parked(ctx, k); why != "" {
				l.found(checkParked, "request %d is left to a person: %s", k.n, why)
				return struck, last, false
			}
		default:
			uncertain = true
			if last.status != 0 && last.status < 500 && last.status != http.StatusTooManyRequests {
				l.found(checkTable, "request %d was answered %s: is the middleware mounted on its route?", k.n, last)
				return struck, last, false
			}
		}
		if l.config.Resume != nil && k.opened.Load() && random.IntN(2) == 0 {
			l.resume(ctx, k)
		}
		wait(ctx, backoff/2+time.Duration(random.Int64N(int64(backoff))))
	}
}

// parked returns the reason why only a person can end the key's request, or "".
func (l *lab) parked(ctx context.Context, k *key) string {
	if l.keeper == nil || !k.opened.Load() {
		return ""
	}
	open, err := l.keeper.ReadOpen(ctx, k.claimed())
	if err != nil || open == nil {
		return ""
	}
	return open.Parked
}

// resume runs an open request without its client.
func (l *lab) resume(ctx context.Context, k *key) {
	l.running.Add(1)
	defer l.running.Add(-1)
	defer func() {
		if value := recover(); value != nil && !aborted(value) {
			panic(value)
		}
	}()
	l.config.Resume(context.WithValue(ctx, exchangeKey{}, &exchange{}), k.claimed())
}

// change sends another request with the key of an answered one: it must be refused, and never be
// executed.
func (l *lab) change(ctx context.Context, k *key, other *request) {
	ctx, cancel := context.WithTimeout(ctx, l.config.Patience)
	defer cancel()
	for ctx.Err() == nil {
		switch r := l.send(ctx, k.value, other, false); r.outcome {
		case idempotency.OutcomeMismatch:
			return
		case idempotency.OutcomeExecuted, idempotency.OutcomeReplayed:
			l.found(checkChanged, "another request with the key of request %d was answered %s, want a mismatch: it is part of the fingerprint what a request asks for", k.n, r)
			return
		}
		wait(ctx, backoffMax)
	}
	l.found(checkSettled, "another request with the key of request %d has no answer for good after %v", k.n, l.config.Patience)
}

func wait(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}
