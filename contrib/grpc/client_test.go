package grpcidem_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
	grpcidem "github.com/paidonce/idempotency/contrib/grpc"
	"github.com/paidonce/idempotency/contrib/grpc/rpc"
	"github.com/paidonce/idempotency/contrib/grpc/rpctest/rpctestpb"
	"github.com/paidonce/idempotency/middleware/mwtest"
)

// fast are options with short pauses.
func fast(change func(o *client.Options)) *client.Options {
	o := &client.Options{Honours: client.Everywhere, BackoffFirst: time.Millisecond, BackoffMax: time.Millisecond, RetryAfterMax: time.Millisecond, AttemptsMax: 3}
	if change != nil {
		change(o)
	}
	return o
}

// scripted answers each attempt by the next step of a script, and the last one again and again.
type scripted struct {
	mu    sync.Mutex
	steps []func(ctx context.Context) (*payReply, error)
	keys  []string // of the attempts
}

func (s *scripted) pay(ctx context.Context, _ *payRequest) (*payReply, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys = append(s.keys, strings.Join(metadata.ValueFromIncomingContext(ctx, rpc.HeaderKey), "|"))
	step := s.steps[min(len(s.keys), len(s.steps))-1]
	return step(ctx)
}

func (s *scripted) attempts() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.keys)
}

// says is a step: an answer with this code, and with this outcome unless it is empty.
func says(outcome idempotency.Outcome, c codes.Code) func(ctx context.Context) (*payReply, error) {
	return func(ctx context.Context) (*payReply, error) {
		if outcome != "" {
			if err := errors.Join(grpc.SetHeader(ctx, metadata.Pairs(rpc.HeaderStatus, string(outcome))),
				grpc.SetTrailer(ctx, metadata.Pairs(rpc.TrailerCode, rpcCode(c)))); err != nil {
				return nil, err
			}
		}
		if c != codes.OK {
			return nil, status.Error(c, "as the script says")
		}
		return &payReply{Id: string(outcome)}, nil
	}
}

func rpcCode(c codes.Code) string {
	return strings.Fields("0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16")[c]
}

// The rules are those of package client, with the code of an error as its HTTP status.
func TestClientActsUponAnswers(t *testing.T) {
	t.Parallel()
	const (
		executed, replayed, mismatch = idempotency.OutcomeExecuted, idempotency.OutcomeReplayed, idempotency.OutcomeMismatch
		notExecuted, unknown         = idempotency.OutcomeNotExecuted, idempotency.OutcomeUnknown
		inProgress                   = idempotency.OutcomeInProgress
		once, spent                  = 1, 3
	)
	for name, c := range map[string]struct {
		outcome  idempotency.Outcome
		code     codes.Code
		attempts int
		then     error // of the client; nil: the answer is the caller's
	}{
		"executed":                      {executed, codes.OK, once, nil},
		"executed, and declined":        {executed, codes.FailedPrecondition, once, nil},
		"executed, with a passing code": {executed, codes.Unavailable, once, nil},
		"replayed":                      {replayed, codes.OK, once, nil},
		"mismatch":                      {mismatch, codes.InvalidArgument, once, nil},
		"in progress":                   {inProgress, codes.Aborted, spent, client.ErrUnknown},
		"unknown":                       {unknown, codes.Unavailable, spent, client.ErrUnknown},
		"unknown, with a final code":    {unknown, codes.DataLoss, spent, client.ErrUnknown},
		"of a later release":            {"later", codes.InvalidArgument, spent, client.ErrUnknown},
		"not executed: the key":         {notExecuted, codes.InvalidArgument, once, nil},
		"not executed: the caller":      {notExecuted, codes.Unauthenticated, once, nil},
		"not executed: forbidden":       {notExecuted, codes.PermissionDenied, once, nil},
		"not executed: too many":        {notExecuted, codes.ResourceExhausted, spent, client.ErrNotExecuted},
		"not executed: aborted":         {notExecuted, codes.Aborted, spent, client.ErrNotExecuted},
		"not executed: canceled":        {notExecuted, codes.Canceled, spent, client.ErrNotExecuted},
		"not executed: internal":        {notExecuted, codes.Internal, spent, client.ErrNotExecuted},
		"not executed: unavailable":     {notExecuted, codes.Unavailable, spent, client.ErrNotExecuted},
		"none: OK":                      {"", codes.OK, once, nil},
		"none: a definite code":         {"", codes.NotFound, once, nil},
		"none: a passing code":          {"", codes.Unavailable, spent, client.ErrUnknown},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			server := &scripted{steps: []func(context.Context) (*payReply, error){says(c.outcome, c.code)}}
			conn := dial(t, serve(t, &probe{unary: server.pay}), grpc.WithUnaryInterceptor(grpcidem.NewClient(fast(nil))))
			reply, err := rpctestpb.NewProbeClient(conn).Pay(t.Context(), &payRequest{})
			var failed *client.Error
			switch ours := errors.As(err, &failed); {
			case server.attempts() != c.attempts:
				t.Errorf("%d attempts, want %d: %v", server.attempts(), c.attempts, err)
			case ours != (c.then != nil), ours && !errors.Is(err, c.then):
				t.Errorf("error %v, want %v", err, c.then)
			case ours && (status.Code(err) != codes.Unavailable || failed.Attempts != spent || failed.Last != c.outcome):
				t.Errorf("error %v with code %v", err, status.Code(err))
			case !ours && (status.Code(err) != c.code || err == nil && reply.GetId() != string(c.outcome)):
				t.Errorf("the caller got %v, %v", reply, err)
			}
			for _, key := range server.keys {
				if key == "" || key != server.keys[0] {
					t.Errorf("the attempts had the keys %q", server.keys)
				}
			}
		})
	}
}

// After an attempt that may have been executed only executed, replayed or mismatch ends a call.
func TestClientGoesOnUntilTheFirstAttemptIsSettled(t *testing.T) {
	t.Parallel()
	server := &scripted{steps: []func(context.Context) (*payReply, error){
		says(idempotency.OutcomeUnknown, codes.Unavailable), says(idempotency.OutcomeNotExecuted, codes.Unauthenticated), says(idempotency.OutcomeReplayed, codes.OK),
	}}
	conn := dial(t, serve(t, &probe{unary: server.pay}), grpc.WithUnaryInterceptor(grpcidem.NewClient(fast(nil))))
	if reply, err := rpctestpb.NewProbeClient(conn).Pay(t.Context(), &payRequest{}); err != nil || reply.GetId() != "replayed" || server.attempts() != 3 {
		t.Errorf("%v, %v after %d attempts", reply, err, server.attempts())
	}
}

func TestClientReadsRefusals(t *testing.T) {
	t.Parallel()
	const after = 30 * time.Millisecond
	server := &scripted{steps: []func(context.Context) (*payReply, error){func(ctx context.Context) (*payReply, error) {
		_, _ = says(idempotency.OutcomeUnknown, codes.Unavailable)(ctx)
		return nil, status.ErrorProto(rpc.Refusal{
			Reason: idempotency.ReasonOutcomeUnknown, Outcome: idempotency.OutcomeUnknown, RetryAfter: after, Accepted: true,
		}.Error())
	}}}
	pauses := 0
	conn := dial(t, serve(t, &probe{unary: server.pay}), grpc.WithUnaryInterceptor(grpcidem.NewClient(fast(func(o *client.Options) {
		o.RetryAfterMax = time.Minute
		o.Trace = func(_ context.Context, e client.Event) {
			if e.Kind == client.EventWaiting && e.Pause >= after && e.Pause < after+2*o.BackoffMax {
				pauses++
			}
		}
	}))))
	_, err := rpctestpb.NewProbeClient(conn).Pay(t.Context(), &payRequest{})
	var unknown *client.Error
	if !errors.As(err, &unknown) || !unknown.Accepted || pauses != 2 {
		t.Errorf("%v; %d pauses of the RetryInfo's time", err, pauses)
	}
}

// cutter closes the conns of a server.
type cutter struct {
	net.Listener
	mu    sync.Mutex
	conns []net.Conn
}

func (c *cutter) Accept() (net.Conn, error) {
	conn, err := c.Listener.Accept()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.conns = append(c.conns, conn)
	return conn, err
}

func (c *cutter) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, conn := range c.conns {
		if conn != nil {
			_ = conn.Close()
		}
	}
	c.conns = nil
}

// paying serves a handler that pays once, behind the interceptor. The replies of the first lost
// calls are lost: the conn is cut after the commit.
func paying(t *testing.T, store *mwtest.Store, lost int) (address string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	cutting := &cutter{Listener: listener}
	idem := grpcidem.New(store, scope, nil)
	var calls atomic.Int64
	server := grpc.NewServer(grpc.ChainUnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		defer func(call int64) {
			if call <= int64(lost) {
				cutting.cut()
				<-ctx.Done() // the server knows, and sends no reply
			}
		}(calls.Add(1))
		return handler(ctx, req)
	}, idem.Unary))
	rpctestpb.RegisterProbeServer(server, &probe{unary: func(ctx context.Context, _ *payRequest) (*payReply, error) {
		return &payReply{Id: strings.Repeat("paid", 100)}, store.Write(ctx)
	}})
	done := make(chan error, 1)
	go func() { done <- server.Serve(cutting) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return listener.Addr().String()
}

func TestClientPaysOnceIfRepliesAreLost(t *testing.T) {
	t.Parallel()
	store := mwtest.NewStore()
	var outcomes []idempotency.Outcome
	conn := dial(t, paying(t, store, 2), grpc.WithUnaryInterceptor(grpcidem.NewClient(fast(func(o *client.Options) {
		o.AttemptsMax = 100 // until the conn is there again
		o.Trace = func(_ context.Context, e client.Event) {
			if e.Kind == client.EventAnswered {
				outcomes = append(outcomes, e.Outcome)
			}
		}
	}))))
	reply, err := rpctestpb.NewProbeClient(conn).Pay(t.Context(), &payRequest{}, grpc.WaitForReady(true))
	if err != nil || !strings.HasPrefix(reply.GetId(), "paid") || store.Written() != 1 {
		t.Errorf("%v, %v; %d payments", reply, err, store.Written())
	}
	if len(outcomes) != 1 || outcomes[0] != idempotency.OutcomeReplayed {
		t.Errorf("answered %q, want one replay", outcomes)
	}
}

func TestClientOfAServerThatMayNotHonourKeysGivesUp(t *testing.T) {
	t.Parallel()
	store := mwtest.NewStore()
	conn := dial(t, paying(t, store, 1), grpc.WithUnaryInterceptor(grpcidem.NewClient(fast(func(o *client.Options) { o.Honours = nil }))))
	pay := rpctestpb.NewProbeClient(conn).Pay
	_, err := pay(t.Context(), &payRequest{}, grpc.WaitForReady(true))
	var unknown *client.Error
	if !errors.As(err, &unknown) || !errors.Is(err, client.ErrUnknown) || !errors.Is(err, client.ErrNotHonoured) || unknown.Attempts != 1 {
		t.Fatalf("a lost reply: %v", err)
	}
	// The caller continues with the key.
	reply, err := pay(client.WithKey(t.Context(), unknown.Key.Value), &payRequest{}, grpc.WaitForReady(true))
	if err != nil || !strings.HasPrefix(reply.GetId(), "paid") || store.Written() != 1 {
		t.Errorf("%v, %v; %d payments", reply, err, store.Written())
	}
}

// A reply that can't be read is no definite error.
func TestClientThatCannotReadTheReplyDoesNotKnow(t *testing.T) {
	t.Parallel()
	store := mwtest.NewStore()
	conn := dial(t, paying(t, store, 0), grpc.WithUnaryInterceptor(grpcidem.NewClient(fast(nil))))
	_, err := rpctestpb.NewProbeClient(conn).Pay(t.Context(), &payRequest{}, grpc.MaxCallRecvMsgSize(10))
	if !errors.Is(err, client.ErrUnknown) || status.Code(err) != codes.Unavailable || store.Written() != 1 {
		t.Errorf("%v; %d payments", err, store.Written())
	}
}

func TestClientProvesThatACallWasNeverSent(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	pay := rpctestpb.NewProbeClient(dial(t, listener.Addr().String(), grpc.WithUnaryInterceptor(grpcidem.NewClient(fast(nil))))).Pay
	if _, err := pay(t.Context(), &payRequest{}); !errors.Is(err, client.ErrNotExecuted) || !errors.Is(err, client.ErrAttemptsSpent) || status.Code(err) != codes.Unavailable {
		t.Errorf("nobody listens: %v", err)
	}
	if _, err := pay(client.WithKey(t.Context(), "of-an-earlier-call"), &payRequest{}); !errors.Is(err, client.ErrUnknown) {
		t.Errorf("with a key that may have been sent before: %v", err)
	}
	if _, err := pay(client.WithNewKey(t.Context(), "k 1"), &payRequest{}); !errors.Is(err, client.ErrNotExecuted) || status.Code(err) != codes.InvalidArgument {
		t.Errorf("with an invalid key: %v", err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := pay(ended, &payRequest{}); !errors.Is(err, client.ErrNotExecuted) || status.Code(err) != codes.Canceled {
		t.Errorf("with a context that has ended: %v", err)
	}
}

// gRPC may retry by itself, if the service config says so. Its attempts may have been executed.
func TestClientNoticesRetriesOfGRPC(t *testing.T) {
	t.Parallel()
	server := &scripted{steps: []func(context.Context) (*payReply, error){
		// Without metadata, as of a gateway: gRPC retries only before it has a header.
		says("", codes.Unavailable), says(idempotency.OutcomeNotExecuted, codes.InvalidArgument), says(idempotency.OutcomeReplayed, codes.OK),
	}}
	conn := dial(t, serve(t, &probe{unary: server.pay}), grpc.WithUnaryInterceptor(grpcidem.NewClient(fast(nil))), grpc.WithDefaultServiceConfig(
		`{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 2, "initialBackoff": "0.001s", "maxBackoff": "0.001s", "backoffMultiplier": 1, "retryableStatusCodes": ["UNAVAILABLE"]}}]}`))
	if reply, err := rpctestpb.NewProbeClient(conn).Pay(t.Context(), &payRequest{}); err != nil || reply.GetId() != "replayed" || server.attempts() != 3 {
		t.Errorf("%v, %v after %d attempts", reply, err, server.attempts())
	}
}

// credentials of the caller's own.
type ownCredentials struct{}

func (ownCredentials) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "own"}, nil
}
func (ownCredentials) RequireTransportSecurity() bool { return false }

func TestClientKeys(t *testing.T) {
	t.Parallel()
	var got metadata.MD
	conn := dial(t, serve(t, &probe{unary: func(ctx context.Context, _ *payRequest) (*payReply, error) {
		got, _ = metadata.FromIncomingContext(ctx)
		return says(idempotency.OutcomeExecuted, codes.OK)(ctx)
	}}), grpc.WithUnaryInterceptor(grpcidem.NewClient(fast(nil))))
	stub := rpctestpb.NewProbeClient(conn)
	for name, c := range map[string]struct {
		ctx     context.Context
		request *payRequest
		want    string
	}{
		"WithKey":        {client.WithKey(t.Context(), "mine"), &payRequest{}, "mine"},
		"metadata":       {metadata.AppendToOutgoingContext(client.WithKey(t.Context(), "other"), rpc.HeaderKey, `"mine"`), &payRequest{}, `"mine"`},
		"request_id":     {t.Context(), &payRequest{RequestId: "mine"}, "mine"},
		"other metadata": {metadata.AppendToOutgoingContext(t.Context(), "account", "acme"), &payRequest{RequestId: "mine"}, "mine"},
		"a new one":      {t.Context(), &payRequest{}, ""},
	} {
		if _, err := stub.Pay(c.ctx, c.request, grpc.PerRPCCredentials(ownCredentials{})); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		keys := got.Get(rpc.HeaderKey)
		if len(keys) != 1 || c.want != "" && keys[0] != c.want || len(keys[0]) != 36 && c.want == "" {
			t.Errorf("%s: the call had the keys %q", name, keys)
		}
		if own := got.Get("authorization"); len(own) != 1 || own[0] != "own" {
			t.Errorf("%s: the caller's credentials are %q", name, own)
		}
		if name == "other metadata" && len(got.Get("account")) != 1 {
			t.Errorf("%s: the caller's metadata are %v", name, got)
		}
	}
	if _, err := stub.Look(t.Context(), &payRequest{}); err != nil || len(got.Get(rpc.HeaderKey)) != 0 {
		t.Errorf("a method without side effects has a key: %v, %v", got, err)
	}
	if err := conn.Invoke(t.Context(), "/grpc.health.v1.Health/Check", &payRequest{}, &payReply{}); status.Code(err) != codes.Unimplemented {
		t.Errorf("a service of gRPC's own: %v", err)
	}
}

// A call ends with its context, and the code says so.
func TestClientEndsWithItsContext(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	conn := dial(t, serve(t, &probe{unary: func(called context.Context, _ *payRequest) (*payReply, error) {
		cancel()
		<-called.Done()
		return nil, called.Err()
	}}), grpc.WithUnaryInterceptor(grpcidem.NewClient(fast(nil))))
	if _, err := rpctestpb.NewProbeClient(conn).Pay(ctx, &payRequest{}); !errors.Is(err, client.ErrUnknown) || status.Code(err) != codes.Canceled {
		t.Errorf("%v with code %v", err, status.Code(err))
	}
}

func TestClientOptionsForHTTPPanic(t *testing.T) {
	t.Parallel()
	for _, o := range []*client.Options{{PreferAsync: true}, {Intents: struct{ client.IntentStore }{}, Honours: client.Everywhere}} {
		func() {
			defer func() {
				if text, _ := recover().(string); !strings.Contains(text, "they are for HTTP") {
					t.Errorf("panicked with %q", text)
				}
			}()
			grpcidem.NewClient(o)
		}()
	}
}
