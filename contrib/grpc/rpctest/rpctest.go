// Package rpctest is a conformance suite. It tests that an adapter for gRPC or Connect keeps the
// promises of package middleware: a reply, or an error with its details, is recorded exactly as the
// client got it, with the handler's writes or without them, and the handler runs once.
//
// Each case is a subtest on a fresh store and a fresh mount, and guards one rule. Run it with
// -race.
package rpctest

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/contrib/grpc/rpc"
	"github.com/paidonce/idempotency/contrib/grpc/rpctest/rpctestpb"
	"github.com/paidonce/idempotency/middleware/mwtest"
)

// Methods of the service, each with a [rpctestpb.PayRequest].
const (
	Pay    = "/" + service + "/Pay"
	Refund = "/" + service + "/Refund"
	Look   = "/" + service + "/Look"  // has no side effects
	Watch  = "/" + service + "/Watch" // replies with a stream

	service = "paidonce.rpctest.v1.Probe"
)

// Options are those of the adapter that a case needs. The others keep their defaults.
type Options struct {
	RequestBytesMax int
	RefuseStreams   bool
	Optional        bool
}

// Mount serves the methods of a service through the adapter until the case ends, and returns a
// client of it. The adapter is on s.Store, with s.Options and any constant scope. The handler of
// each unary method is s.Handle, and that of the stream s.HandleStream.
type Mount func(t *testing.T, s *Service) Client

// Client calls a method, or opens the stream, and returns the reply or error that came.
type Client func(ctx context.Context, method string, metadata map[string]string, request *rpctestpb.PayRequest) Reply

// Reply is a reply or error as the client got it.
type Reply struct {
	Message  *rpctestpb.PayReply // nil for an error; of a stream, the first message
	Error    *status.Status      // nil for a reply
	Metadata map[string][]string // of the header, with names in lower case
}

func (r Reply) first(name string) string {
	if values := r.Metadata[name]; len(values) > 0 {
		return values[0]
	}
	return ""
}

// Error is the error of a handler. A [Mount] converts it to an error of its framework.
type Error struct{ Status *status.Status }

// Error returns the message.
func (e *Error) Error() string { return e.Status.GetMessage() }

// Service is the service that a [Mount] serves. Each case has one of its own.
type Service struct {
	Store   *mwtest.Store
	Options Options

	entered chan struct{} // a run is held
	release chan struct{} // closed when a held run may go on
	gone    chan struct{} // closed when the context of the first held call has ended

	goneOnce sync.Once

	mu     sync.Mutex
	runs   int
	faults []string
}

// Arrived gets the framework's own context of a call. A [Mount] calls it outside of the adapter for
// each call, so that the case knows when the server has noticed that the client is gone.
func (s *Service) Arrived(ctx context.Context, request any) {
	if r, ok := request.(*rpctestpb.PayRequest); ok && r.GetDo() == doHold {
		context.AfterFunc(ctx, func() { s.goneOnce.Do(func() { close(s.gone) }) })
	}
}

// The behaviors of the handler.
const (
	doReply    = "reply"
	doEmpty    = "empty"    // a reply without a field
	doNothing  = "nothing"  // neither a reply nor an error
	doFinal    = "final"    // FailedPrecondition, with details
	doFail     = "fail"     // Internal
	doBoth     = "both"     // a reply and Internal
	doAborted  = "aborted"  // Aborted
	doCanceled = "canceled" // Canceled
	doPanic    = "panic"
	doHold     = "hold" // blocks until the case releases the run, then replies
	doLook     = "look" // replies, without a transaction
)

// spent is the amount that the handler sets in its request, to find a request that is used again.
const spent = -1

// Handle is the handler of the unary methods. Its error is an [*Error].
func (s *Service) Handle(ctx context.Context, request *rpctestpb.PayRequest) (*rpctestpb.PayReply, error) {
	s.mu.Lock()
	s.runs++
	id := fmt.Sprintf("run-%d", s.runs)
	s.mu.Unlock()
	do := request.GetDo()
	if do == doLook {
		if _, within := idempotency.KeyFrom(ctx); within {
			s.fault("the adapter took a method without side effects")
		}
		return &rpctestpb.PayReply{Id: id}, nil
	}
	if request.GetAmount() == spent {
		s.fault("a run of the handler got the request as an earlier one left it")
	}
	request.Amount = spent
	if err := s.Store.Write(ctx); err != nil {
		s.fault("%v", err)
	}
	if _, ok := ctx.Deadline(); !ok {
		s.fault("the handler's context has no deadline: it is not the one that the adapter made")
	}
	refused := func(c code.Code, details ...proto.Message) (*rpctestpb.PayReply, error) {
		e := &Error{Status: &status.Status{Code: int32(c), Message: id + " was refused"}}
		for _, detail := range details {
			packed, err := anypb.New(detail)
			if err != nil {
				s.fault("%v", err)
			}
			e.Status.Details = append(e.Status.Details, packed)
		}
		return nil, e
	}
	switch do {
	case doEmpty:
		return &rpctestpb.PayReply{}, nil
	case doNothing:
		return nil, nil
	case doFinal:
		return refused(code.Code_FAILED_PRECONDITION,
			&errdetails.ErrorInfo{Reason: "NO_MONEY", Domain: "bank.example", Metadata: map[string]string{"balance": "3"}},
			&errdetails.LocalizedMessage{Locale: "de", Message: "Das Konto ist nicht gedeckt."})
	case doFail:
		return refused(code.Code_INTERNAL)
	case doBoth:
		_, err := refused(code.Code_INTERNAL)
		return &rpctestpb.PayReply{Id: id}, err
	case doAborted:
		return refused(code.Code_ABORTED)
	case doCanceled:
		return refused(code.Code_CANCELLED)
	case doPanic:
		panic("rpctest: the handler panicked")
	case doHold:
		select {
		case s.entered <- struct{}{}:
		default:
		}
		<-s.release
		if err := ctx.Err(); err != nil {
			s.fault("the handler's context ended while it ran (%v): it must outlive the client", err)
		}
	}
	return &rpctestpb.PayReply{Id: id}, nil
}

// HandleStream is the handler of the stream, which sends one message.
func (s *Service) HandleStream(send func(*rpctestpb.PayReply) error) error {
	s.mu.Lock()
	s.runs++
	s.mu.Unlock()
	return send(&rpctestpb.PayReply{Id: "stream"})
}

// fault keeps a finding of a handler's goroutine for the end of the case.
func (s *Service) fault(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = append(s.faults, fmt.Sprintf(format, args...))
}

// patience bounds every wait of a case. A correct adapter never takes that long.
const patience = 30 * time.Second

// Run runs the suite, each case on a mount of its own.
func Run(t *testing.T, mount Mount) {
	for _, one := range cases {
		t.Run(one.name, func(t *testing.T) {
			t.Parallel()
			s := &Service{Store: mwtest.NewStore(), Options: one.options, entered: make(chan struct{}, 1), release: make(chan struct{}), gone: make(chan struct{})}
			c := &checker{T: t, Service: s, call: mount(t, s)}
			one.check(c)
			s.mu.Lock()
			defer s.mu.Unlock()
			for _, fault := range s.faults {
				t.Error(fault)
			}
			if t.Failed() {
				t.Log("The rule: " + one.rule)
			}
		})
	}
}

// checker is a running case.
type checker struct {
	*testing.T
	*Service
	call Client
}

const key = "rpctest-key-1"

// pay calls Pay with the case's key.
func (c *checker) pay(do string) Reply {
	c.Helper()
	return c.send(Pay, map[string]string{rpc.HeaderKey: key}, &rpctestpb.PayRequest{Do: do, Amount: 5})
}

func (c *checker) send(method string, metadata map[string]string, request *rpctestpb.PayRequest) Reply {
	c.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	return c.call(ctx, method, metadata, request)
}

// reply checks that r is a reply with this id and outcome.
func (c *checker) reply(r Reply, id string, outcome idempotency.Outcome) {
	c.Helper()
	if r.Error != nil || r.Message.GetId() != id || r.first(rpc.HeaderStatus) != string(outcome) {
		c.Errorf("got %q, outcome %q, error %v; want %q, %q", r.Message.GetId(), r.first(rpc.HeaderStatus), r.Error, id, outcome)
	}
	if replayed := r.first(rpc.HeaderReplayed) == "true"; replayed != (outcome == idempotency.OutcomeReplayed) {
		c.Errorf("%s is %q", rpc.HeaderReplayed, r.first(rpc.HeaderReplayed))
	}
}

// error checks that r is an error with this code and outcome.
func (c *checker) error(r Reply, want code.Code, outcome idempotency.Outcome) {
	c.Helper()
	if code.Code(r.Error.GetCode()) != want || r.first(rpc.HeaderStatus) != string(outcome) {
		c.Errorf("got %v, outcome %q; want code %v, %q", r.Error, r.first(rpc.HeaderStatus), want, outcome)
	}
}

// refused checks that r is a refusal of the adapter.
func (c *checker) refused(r Reply, want code.Code, outcome idempotency.Outcome, reason idempotency.Reason, retry bool) {
	c.Helper()
	c.error(r, want, outcome)
	refusal, ok := rpc.Refused(r.Error)
	if !ok || refusal.Reason != reason || refusal.Outcome != outcome || refusal.RetryAfter > 0 != retry {
		c.Errorf("the details say %+v (%v); want reason %q, outcome %q, a time to retry: %v", refusal, ok, reason, outcome, retry)
	}
}

// state checks the numbers of runs and of committed writes, and the ends of the transactions. Each
// recorded answer must be one of these that a client got.
func (c *checker) state(runs, written int, ends []string, got ...Reply) {
	c.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	var verbs []string
	for _, end := range c.Store.Ends() {
		verbs = append(verbs, end.String())
		if end.Answer == nil || end.Key.Value == "" {
			continue
		}
		recorded, err := rpc.Decode(end.Answer)
		if err != nil || !slices.ContainsFunc(got, func(r Reply) bool {
			return r.Error != nil && proto.Equal(recorded.Error, r.Error) || r.Error == nil && recorded.Reply != nil && proto.Equal(recorded.Reply, r.Message)
		}) {
			c.Errorf("the record has %v (%v), and the client got %v", recorded, err, got)
		}
	}
	if c.runs != runs || c.Store.Written() != written || !slices.Equal(verbs, ends) {
		c.Errorf("the handler ran %d times, %d writes are committed, the transactions ended in %q; want %d, %d, %q", c.runs, c.Store.Written(), verbs, runs, written, ends)
	}
}

// held starts a call, and blocks until its handler is held. The handler goes on when release is
// closed; the reply comes from the channel.
func (c *checker) held(ctx context.Context) <-chan Reply {
	c.Helper()
	replies := make(chan Reply, 1)
	go func() {
		replies <- c.call(ctx, Pay, map[string]string{rpc.HeaderKey: key}, &rpctestpb.PayRequest{Do: doHold, Amount: 5})
	}()
	wait(c, c.entered)
	return replies
}

// wait blocks until the channel has a value or is closed.
func wait[V any](c *checker, channel <-chan V) (v V) {
	c.Helper()
	select {
	case v = <-channel:
	case <-time.After(patience):
		c.Fatal("it did not come")
	}
	return v
}
