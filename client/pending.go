package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"
	"time"

	"github.com/paidonce/idempotency"
)

// A server may answer that a request is pending, with the Location of a status resource. From then
// on each attempt polls that resource, until it says that the operation is done. Then the request
// is sent again, and gets the replay: the answer byte by byte, with its headers. If the resource
// can't be read, the next attempt sends the request again.

const (
	headerPrefer = "Prefer"
	respondAsync = "respond-async"
)

// operationState has the member of a status resource that the client reads.
type operationState struct {
	Status string `json:"status"`
}

const (
	operationPending        = "pending"
	operationNeedsAttention = "needs-attention"
	operationDone           = "done"
)

// state returns the state of the operation in an answer, or "".
func (a *attempt) state() string {
	kind, _, err := mime.ParseMediaType(a.response.Header.Get("Content-Type"))
	var state operationState
	if err != nil || kind != "application/json" || json.Unmarshal(a.content, &state) != nil {
		return ""
	}
	return state.Status
}

// notePending remembers where to poll, if the answer says so.
func (op *operation) notePending(a *attempt) {
	op.poll = nil
	if a.outcome != idempotency.OutcomePending {
		return
	}
	op.accepted = true
	a.needsAttention = a.state() == operationNeedsAttention
	op.poll = op.pollOf(a.response.Header)
}

// pollOf returns a poll of the status resource in the answer's Location. It returns nil if there is
// none, or if it is not on the request's server: no other server may get the credentials.
func (op *operation) pollOf(header http.Header) *http.Request {
	location := header.Get("Location")
	if location == "" || len(header.Values("Location")) > 1 {
		return nil
	}
	to, err := op.request.URL.Parse(location)
	if err != nil || to.User != nil || !strings.EqualFold(to.Scheme, op.request.URL.Scheme) || !strings.EqualFold(to.Host, op.request.URL.Host) {
		return nil
	}
	to.User, to.Fragment, to.RawFragment = op.request.URL.User, "", ""
	poll := &http.Request{Method: http.MethodGet, URL: to, Host: op.request.Host, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Header: op.request.Header.Clone()}
	for name := range poll.Header {
		if ofThisRequest(name) {
			delete(poll.Header, name)
		}
	}
	poll.Header.Set("Accept", "application/json")
	return poll
}

// ofThisRequest reports whether a header is about the request, its body or its answer, and not
// about its caller: a poll does not have it.
func ofThisRequest(name string) bool {
	switch name {
	case HeaderKey, headerPrefer, "Accept", "Accept-Encoding", "Digest", "Repr-Digest", "Expect", "If-Match", "If-Modified-Since", "If-None-Match",
		"If-Unmodified-Since", "If-Range", "Range", "Trailer", "Transfer-Encoding":
		return true
	}
	return strings.HasPrefix(name, "Content-")
}

// askPending polls the status resource once. It returns nil if the operation is done.
func (t *Transport) askPending(op *operation) *attempt {
	ctx, cancel := context.WithCancelCause(op.ctx)
	defer cancel(nil)
	timer := time.AfterFunc(t.options.AttemptTimeout, func() { cancel(ErrAttemptTimedOut) })
	defer timer.Stop()
	poll := op.poll
	op.poll = nil // unless the resource says that it is pending
	response, err := t.base.RoundTrip(poll.Clone(ctx))
	if err != nil {
		return &attempt{seen: seenLost, err: timedOut(ctx, err)}
	}
	defer func() { _ = response.Body.Close() }() // the rest of a too long answer is not needed
	content, err := io.ReadAll(io.LimitReader(response.Body, t.options.AnswerBytesMax))
	if err != nil {
		return &attempt{seen: seenLost, err: timedOut(ctx, fmt.Errorf("read the status resource: %w", err))}
	}
	a := &attempt{seen: seenAnswered, status: response.StatusCode, outcome: idempotency.OutcomePending, response: response, content: content, polled: true}
	if response.StatusCode != http.StatusOK {
		return a
	}
	switch a.state() {
	case operationDone:
		return nil
	case operationPending:
		op.poll = poll
	case operationNeedsAttention:
		a.needsAttention = true
	}
	return a
}

// ErrNeedsAttention is wrapped by an [*Error] that is [ErrUnknown] and Accepted, if the server says
// that only a person can settle the request.
var ErrNeedsAttention = errors.New("a person must settle the request")
