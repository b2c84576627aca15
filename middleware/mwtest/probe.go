package mwtest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path"

	"github.com/paidonce/idempotency"
)

// Behavior names what the handler has to do.
type Behavior string

// The behaviors.
const (
	// Answer: answer with the probe's Status, ContentType, Location and Body.
	Answer Behavior = "answer"
	// StatusOnly: answer with the probe's Status and no body.
	StatusOnly Behavior = "status-only"
	// FinalError: answer with the probe's Status, by the framework's own error if it has one, and
	// with any body.
	FinalError Behavior = "final-error"
	// ReturnError: return the probe's Err, and write nothing.
	ReturnError Behavior = "return-error"
	// AnswerThenError: answer as for Answer, and then return the probe's Err. A handler that returns
	// its answer returns both.
	AnswerThenError Behavior = "answer-then-error"
	// Nothing: return without an answer, and without an error.
	Nothing Behavior = "nothing"
	// Stream: write the probe's Body, and flush it to the client. A flush that fails or panics is
	// right.
	Stream Behavior = "stream"
	// Hijack: take the conn over, call Probe.Hijacked with the result, and return without an answer.
	Hijack Behavior = "hijack"
)

// With these parameters of the route, Probe itself panics or blocks.
const (
	doPanic = "panic" // panics
	doHold  = "hold"  // blocks until the case releases the run, then Answer
)

// Probe says what one run of the handler has to do.
type Probe struct {
	Do          Behavior
	ID          string // of the run
	Status      int
	ContentType string
	Location    string // contains ID
	Body        []byte // JSON; contains ID
	Err         error

	s *Service
}

// Probe counts a run of the handler, writes into its transaction, and returns what the handler has
// to do. ctx is the handler's context, do the parameter of its route, and body the request's body
// as the handler sees it: all of it, or as much as the framework leaves of it after decoding.
//
// It panics or blocks if the case wants the handler to.
func (s *Service) Probe(ctx context.Context, do string, body []byte) Probe {
	s.mu.Lock()
	s.runs++
	run, want := s.runs, s.body
	s.mu.Unlock()
	if err := s.Store.Write(ctx); err != nil {
		s.fault("%v", err)
	} else {
		if _, ok := ctx.Deadline(); !ok {
			s.fault("the handler's context has no deadline: it is not the one that the middleware made")
		}
		if _, ok := idempotency.KeyFrom(ctx); !ok {
			s.fault("the handler's context has no key: it is not the one that the middleware made")
		}
	}
	if !bytes.Contains(body, []byte(want)) {
		s.fault("run %d of the handler did not get the request's body", run)
	}
	id := fmt.Sprintf("run-%d", run)
	p := Probe{
		Do: Behavior(do), ID: id, Status: http.StatusCreated, ContentType: "application/json", Location: Prefix + "payments/" + id,
		Body: fmt.Appendf(nil, `{"id":%q}`, id), Err: errors.New("mwtest: the handler failed"), s: s,
	}
	switch do {
	case doPanic:
		panic("mwtest: the handler panicked")
	case doHold:
		p.Do = Answer
		s.hold()
		if err := ctx.Err(); err != nil {
			s.fault("the handler's context ended while it ran (%v): it must outlive the client", err)
		}
	case string(StatusOnly):
		p.Status = http.StatusNoContent
	case string(FinalError):
		p.Status = http.StatusPaymentRequired
	case string(Answer), string(ReturnError), string(AnswerThenError), string(Nothing), string(Stream), string(Hijack):
	default:
		s.fault("the parameter of the route came to the handler as %q", do)
	}
	return p
}

// hold blocks until the case releases the run.
func (s *Service) hold() {
	select {
	case s.entered <- struct{}{}:
	default:
	}
	<-s.release
}

// letGo releases every held run, those to come included.
func (s *Service) letGo() {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-s.release:
	default:
		close(s.release)
	}
}

// Hijacked takes the result of taking the conn over, which must fail. conn may be nil, and the
// second value is not used.
func (p Probe) Hijacked(conn net.Conn, _ any, err error) {
	if err == nil {
		p.s.fault("the handler took the conn over: it can write to the client before COMMIT")
		if conn != nil {
			_ = conn.Close()
		}
	}
}

// serveHTTP is the handler for net/http.
func (s *Service) serveHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		s.fault("the handler can't read the body: %v", err)
	}
	probe := s.Probe(r.Context(), path.Base(r.URL.Path), body)
	switch probe.Do {
	case Answer:
		w.Header().Set("Content-Type", probe.ContentType)
		w.Header().Set("Location", probe.Location)
		w.WriteHeader(probe.Status)
		_, _ = w.Write(probe.Body)
	case StatusOnly:
		w.WriteHeader(probe.Status)
	case FinalError:
		http.Error(w, "declined", probe.Status)
	case Stream:
		_, _ = w.Write(probe.Body)
		_ = http.NewResponseController(w).Flush() // refused
	case Hijack:
		conn, _, err := http.NewResponseController(w).Hijack()
		probe.Hijacked(conn, nil, err)
	}
}
