package grpcidem_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/paidonce/idempotency"
	grpcidem "github.com/paidonce/idempotency/contrib/grpc"
	"github.com/paidonce/idempotency/contrib/grpc/rpc"
	"github.com/paidonce/idempotency/contrib/grpc/rpctest"
	"github.com/paidonce/idempotency/contrib/grpc/rpctest/rpctestpb"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/mwtest"
	"github.com/paidonce/idempotency/storage/postgres"
)

type (
	payRequest = rpctestpb.PayRequest
	payReply   = rpctestpb.PayReply
	payFunc    = func(ctx context.Context, r *payRequest) (*payReply, error)
)

// answer is an answer as the client got it.
type answer struct {
	id      string
	err     *status.Status
	header  metadata.MD
	trailer metadata.MD
}

func (a answer) outcome() idempotency.Outcome {
	return idempotency.Outcome(strings.Join(a.header.Get(rpc.HeaderStatus), "|"))
}

func (a answer) want(t *testing.T, id string, code codes.Code, outcome idempotency.Outcome) {
	t.Helper()
	if a.id != id || a.err.Code() != code || a.outcome() != outcome {
		t.Errorf("got %q, %v %q, outcome %q; want %q, %v, %q", a.id, a.err.Code(), a.err.Message(), a.outcome(), id, code, outcome)
	}
}

// payer serves a handler behind an interceptor on the store, and returns a function that calls it.
// pairs are names and values of metadata.
func payer(t *testing.T, store idempotency.Store, opts *grpcidem.Options, handler payFunc, outside ...grpc.UnaryServerInterceptor) func(r *payRequest, pairs ...string) answer {
	t.Helper()
	var o grpcidem.Options
	if opts != nil {
		o = *opts
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	idem := grpcidem.New(store, scope, &o)
	return caller(dial(t, serve(t, &probe{unary: handler}, grpc.ChainUnaryInterceptor(append(outside, idem.Unary)...))), t)
}

func caller(conn *grpc.ClientConn, t *testing.T) func(r *payRequest, pairs ...string) answer {
	return func(r *payRequest, pairs ...string) (a answer) {
		t.Helper()
		ctx, cancel := context.WithTimeout(metadata.NewOutgoingContext(t.Context(), metadata.Pairs(pairs...)), time.Minute)
		defer cancel()
		reply := new(payReply)
		err := conn.Invoke(ctx, rpctest.Pay, r, reply, grpc.Header(&a.header), grpc.Trailer(&a.trailer))
		a.id, a.err = reply.GetId(), status.Convert(err)
		return a
	}
}

// The reply, or the error with its details, and the handler's writes are one commit in PostgreSQL.
func TestRepliesCommitWithTheHandlersWrites(t *testing.T) {
	t.Parallel()
	service := testservice.New(t, nil)
	runs := 0
	pay := payer(t, service.Store, nil, func(ctx context.Context, r *payRequest) (*payReply, error) {
		runs++
		tx := postgres.Tx(ctx)
		if _, err := tx.Exec(ctx, "INSERT INTO effects (name) VALUES ($1)", r.GetDo()); err != nil {
			return nil, err
		}
		switch r.GetDo() {
		case "declined":
			declined, err := status.New(codes.FailedPrecondition, "not enough money").WithDetails(&errdetails.ErrorInfo{Reason: "NO_MONEY"})
			return nil, errors.Join(err, declined.Err())
		case "failed":
			return nil, errors.New("it failed")
		case "again":
			if runs == 1 {
				_, err := tx.Exec(ctx, "DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '40001'; END $$")
				return nil, err
			}
		}
		return &payReply{Id: r.GetDo()}, nil
	})
	for _, c := range []struct {
		do               string
		code             codes.Code
		first, second    idempotency.Outcome
		effects, records int // after both
		runs             int
	}{
		{"again", codes.OK, idempotency.OutcomeExecuted, idempotency.OutcomeReplayed, 1, 1, 2},
		{"paid", codes.OK, idempotency.OutcomeExecuted, idempotency.OutcomeReplayed, 2, 2, 3},
		{"declined", codes.FailedPrecondition, idempotency.OutcomeExecuted, idempotency.OutcomeReplayed, 2, 3, 4},
		{"failed", codes.Unknown, idempotency.OutcomeNotExecuted, idempotency.OutcomeNotExecuted, 2, 3, 6},
	} {
		for _, outcome := range []idempotency.Outcome{c.first, c.second} {
			id := ""
			if c.code == codes.OK {
				id = c.do
			}
			got := pay(&payRequest{Do: c.do}, rpc.HeaderKey, "key-"+c.do)
			got.want(t, id, c.code, outcome)
			if c.do == "declined" && len(got.err.Details()) != 1 {
				t.Errorf("%s has the details %v", outcome, got.err.Details())
			}
		}
		if effects, records := service.Effects(t), service.Count(t, "SELECT count(*) FROM idempotency_keys"); effects != c.effects || records != c.records || runs != c.runs {
			t.Errorf("%s: %d effects, %d records, %d runs; want %d, %d, %d", c.do, effects, records, runs, c.effects, c.records, c.runs)
		}
	}
}

// A key that was used by HTTP is a mismatch by gRPC, and the other way round: never a second
// payment.
func TestAKeyCountsOnceForHTTPAndGRPC(t *testing.T) {
	t.Parallel()
	service := testservice.New(t, nil)
	insert := func(ctx context.Context) error {
		_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects DEFAULT VALUES")
		return err
	}
	pay := payer(t, service.Store, nil, func(ctx context.Context, _ *payRequest) (*payReply, error) {
		return &payReply{Id: "grpc"}, insert(ctx)
	})
	idem := middleware.New(service.Store, func(r *http.Request) (string, error) { return scope(r.Context(), "") }, nil)
	own := idem.With(func(o *middleware.Options) {
		o.Fingerprinters = []middleware.Fingerprinter{
			{Version: idempotency.FingerprintVersionUserMin, Content: func(*http.Request, []byte) []byte { return nil }}, middleware.FingerprinterV1(),
		}
	})
	transfer := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := insert(r.Context()); err != nil {
			t.Error(err)
		}
		w.WriteHeader(http.StatusCreated)
	})
	mux := http.NewServeMux()
	mux.Handle("POST /transfers", idem.Handler(transfer))
	mux.Handle("POST /own", own.Handler(transfer))
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	post := func(path, key string) (int, string) {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL+path, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Idempotency-Key", key)
		response, err := server.Client().Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = response.Body.Close() }()
		_, _ = io.Copy(io.Discard, response.Body)
		return response.StatusCode, response.Header.Get("Idempotency-Status")
	}
	if code, outcome := post("/transfers", "http-first"); code != http.StatusCreated || outcome != string(idempotency.OutcomeExecuted) {
		t.Errorf("HTTP: %d %s", code, outcome)
	}
	mismatch := pay(&payRequest{}, rpc.HeaderKey, "http-first")
	mismatch.want(t, "", codes.InvalidArgument, idempotency.OutcomeMismatch)
	if refusal, ok := rpc.Refused(mismatch.err.Proto()); !ok || refusal.Reason != idempotency.ReasonKeyReused {
		t.Errorf("the details say %+v", refusal)
	}
	pay(&payRequest{}, rpc.HeaderKey, "grpc-first").want(t, "grpc", codes.OK, idempotency.OutcomeExecuted)
	for _, path := range []string{"/transfers", "/own"} {
		if code, outcome := post(path, "grpc-first"); code != http.StatusUnprocessableEntity || outcome != string(idempotency.OutcomeMismatch) {
			t.Errorf("HTTP after gRPC: %d %s", code, outcome)
		}
	}
	if n := service.Effects(t); n != 2 {
		t.Errorf("two keys paid %d times", n)
	}
}

// Copies at once, by both protocols, pay once.
func TestCopiesAtOnceByBothProtocolsPayOnce(t *testing.T) {
	t.Parallel()
	const each = 4
	// A connection for each, so that none is refused because it waited for one.
	service := testservice.New(t, &postgres.Options{PoolConfig: func(config *pgxpool.Config) { config.MaxConns = 2 * each }})
	insert := func(ctx context.Context) error {
		_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects DEFAULT VALUES")
		return err
	}
	pay := payer(t, service.Store, nil, func(ctx context.Context, _ *payRequest) (*payReply, error) { return &payReply{}, insert(ctx) })
	server := httptest.NewServer(middleware.New(service.Store, func(r *http.Request) (string, error) { return scope(r.Context(), "") }, nil).Handler(
		http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if err := insert(r.Context()); err != nil {
				t.Error(err)
			}
			w.WriteHeader(http.StatusCreated)
		})))
	t.Cleanup(server.Close)
	var mu sync.Mutex
	outcomes := map[idempotency.Outcome]int{}
	var copies sync.WaitGroup
	for range each {
		copies.Go(func() {
			got := pay(&payRequest{}, rpc.HeaderKey, "k")
			mu.Lock()
			defer mu.Unlock()
			outcomes[got.outcome()]++
		})
		copies.Go(func() {
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL, strings.NewReader("{}"))
			if err != nil {
				t.Error(err)
				return
			}
			r.Header.Set("Idempotency-Key", "k")
			response, err := server.Client().Do(r)
			if err != nil {
				t.Error(err)
				return
			}
			defer func() { _ = response.Body.Close() }()
			mu.Lock()
			defer mu.Unlock()
			outcomes[idempotency.Outcome(response.Header.Get("Idempotency-Status"))]++
		})
	}
	copies.Wait()
	known := 0
	for _, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed, idempotency.OutcomeInProgress, idempotency.OutcomeMismatch} {
		known += outcomes[outcome]
	}
	if n := service.Effects(t); n != 1 || outcomes[idempotency.OutcomeExecuted] != 1 || known != 2*each {
		t.Errorf("%d payments, outcomes %v", n, outcomes)
	}
}

func TestMetadataOfTheHandler(t *testing.T) {
	t.Parallel()
	store := mwtest.NewStore()
	store.FailCommits(idempotency.ErrNotSerializable)
	runs := 0
	pay := payer(t, store, nil, func(ctx context.Context, _ *payRequest) (*payReply, error) {
		runs++
		if err := grpc.SendHeader(ctx, metadata.Pairs("early", "1")); status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "use SetHeader") {
			t.Errorf("SendHeader: %v", err)
		}
		name := []string{"first", "second"}[runs-1]
		if name, ok := grpc.Method(ctx); name != rpctest.Pay || !ok {
			t.Errorf("Method: %q, %v", name, ok)
		}
		err := errors.Join(
			grpc.SetHeader(ctx, metadata.MD{"Run": {name}}), grpc.SetHeader(ctx, metadata.Pairs("own", "2", "idempotency-status", "replayed")),
			grpc.SetTrailer(ctx, metadata.Pairs("end", name, "idempotency-code", "13")))
		return &payReply{Id: name}, err
	})
	got := pay(&payRequest{}, rpc.HeaderKey, "k")
	got.want(t, "second", codes.OK, idempotency.OutcomeExecuted)
	for name, want := range map[string]string{"run": "second", "own": "2", "early": ""} {
		if got := strings.Join(got.header.Get(name), "|"); got != want {
			t.Errorf("header %s: %q, want %q", name, got, want)
		}
	}
	for name, want := range map[string]string{"end": "second", rpc.TrailerCode: "0"} {
		if got := strings.Join(got.trailer.Get(name), "|"); got != want {
			t.Errorf("trailer %s: %q, want %q", name, got, want)
		}
	}
	again := pay(&payRequest{}, rpc.HeaderKey, "k")
	again.want(t, "second", codes.OK, idempotency.OutcomeReplayed)
	if len(again.header.Get("run")) != 0 || len(again.trailer.Get("end")) != 0 {
		t.Errorf("the replay has the handler's metadata: %v, %v", again.header, again.trailer)
	}
	for _, name := range []string{rpc.HeaderCreatedAt, rpc.HeaderExpiresAt} {
		if _, err := time.Parse(time.RFC3339, strings.Join(again.header.Get(name), "|")); err != nil {
			t.Error(err)
		}
	}
}

// A goroutine that the handler leaves running can't change the reply.
func TestMetadataAfterTheHandler(t *testing.T) {
	t.Parallel()
	var left context.Context
	pay := payer(t, mwtest.NewStore(), nil, func(ctx context.Context, _ *payRequest) (*payReply, error) {
		left = ctx
		return &payReply{}, nil
	})
	pay(&payRequest{}, rpc.HeaderKey, "k").want(t, "", codes.OK, idempotency.OutcomeExecuted)
	if err := grpc.SetHeader(left, metadata.Pairs("late", "1")); status.Code(err) != codes.Internal {
		t.Errorf("SetHeader after the handler: %v", err)
	}
}

func TestScope(t *testing.T) {
	t.Parallel()
	store := mwtest.NewStore()
	blocked, err := status.New(codes.PermissionDenied, "the account is blocked").WithDetails(&errdetails.ErrorInfo{Reason: "BLOCKED", Domain: "bank.example"})
	if err != nil {
		t.Fatal(err)
	}
	idem := grpcidem.New(store, func(ctx context.Context, fullMethod string) (string, error) {
		if fullMethod != rpctest.Pay {
			t.Errorf("the scope function got the method %s", fullMethod)
		}
		switch account := strings.Join(metadata.ValueFromIncomingContext(ctx, "account"), ""); account {
		case "wrong":
			return "", errors.New("token SECRET is wrong")
		case "blocked":
			return "", blocked.Err()
		case "none":
			return "", nil
		default:
			return account, nil
		}
	}, &grpcidem.Options{Logger: slog.New(slog.DiscardHandler)})
	pay := caller(dial(t, serve(t, &probe{unary: func(ctx context.Context, _ *payRequest) (*payReply, error) {
		key, _ := idempotency.KeyFrom(ctx)
		return &payReply{Id: key.Scope}, nil
	}}, grpc.ChainUnaryInterceptor(idem.Unary))), t)
	for account, want := range map[string]codes.Code{
		"wrong": codes.Unauthenticated, "none": codes.Unauthenticated, "message:x": codes.Unauthenticated, "blocked": codes.PermissionDenied,
		strings.Repeat("s", idempotency.ScopeBytesMax+1): codes.Unauthenticated,
	} {
		got := pay(&payRequest{}, rpc.HeaderKey, "k", "account", account)
		got.want(t, "", want, idempotency.OutcomeNotExecuted)
		if refusal, ok := rpc.Refused(got.err.Proto()); !ok || refusal.Reason != idempotency.ReasonScope || strings.Contains(got.err.String(), "SECRET") {
			t.Errorf("%s: %v", account, got.err)
		}
		if account == "blocked" && (got.err.Message() != blocked.Message() || len(got.err.Details()) != 2) {
			t.Errorf("a status of the scope function became %v", got.err)
		}
	}
	for _, account := range []string{"acme", "other", strings.Repeat("s", idempotency.ScopeBytesMax)} { // a key of each
		pay(&payRequest{}, rpc.HeaderKey, "k", "account", account).want(t, account, codes.OK, idempotency.OutcomeExecuted)
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	const replyBytesMax = 200
	pay := payer(t, mwtest.NewStore(), &grpcidem.Options{KeyBytesMin: 2, KeyBytesMax: 4, ReplyBytesMax: replyBytesMax, KeyField: "do"}, func(_ context.Context, r *payRequest) (*payReply, error) {
		return &payReply{Id: strings.Repeat("x", int(r.GetAmount()))}, nil
	})
	for key, want := range map[string]codes.Code{"k": codes.InvalidArgument, "kk": codes.OK, "kkkk": codes.OK, "kkkkk": codes.InvalidArgument} {
		if got := pay(&payRequest{}, rpc.HeaderKey, key); got.err.Code() != want {
			t.Errorf("a key of %d characters: %v", len(key), got.err)
		}
	}
	size := func(n int) int {
		recorded, err := rpc.Encode(rpc.Result{Reply: &payReply{Id: strings.Repeat("x", n)}})
		if err != nil {
			t.Fatal(err)
		}
		return len(recorded.Body)
	}
	at := 0
	for size(at+1) <= replyBytesMax {
		at++
	}
	if got := pay(&payRequest{Amount: int64(at)}, rpc.HeaderKey, "at"); got.err.Code() != codes.OK || len(got.id) != at {
		t.Errorf("a reply at the limit: %v", got.err)
	}
	pay(&payRequest{Amount: int64(at + 1)}, rpc.HeaderKey, "over").want(t, "", codes.Internal, idempotency.OutcomeNotExecuted)
	pay(&payRequest{RequestId: "long-enough", Do: "key"}).want(t, "", codes.OK, idempotency.OutcomeExecuted) // the field of another name
}

func TestReplayMayBeDenied(t *testing.T) {
	t.Parallel()
	pay := payer(t, mwtest.NewStore(), &grpcidem.Options{AuthorizeReplay: func(_ context.Context, fullMethod string, record *idempotency.Record) error {
		if fullMethod != rpctest.Pay || rpc.CodeOf(&record.Answer) != 0 {
			t.Errorf("AuthorizeReplay got %s, %v", fullMethod, record.Answer)
		}
		return errors.New("no SECRET")
	}}, func(context.Context, *payRequest) (*payReply, error) { return &payReply{Id: "1"}, nil })
	pay(&payRequest{}, rpc.HeaderKey, "k").want(t, "1", codes.OK, idempotency.OutcomeExecuted)
	denied := pay(&payRequest{}, rpc.HeaderKey, "k")
	denied.want(t, "", codes.PermissionDenied, idempotency.OutcomeUnknown)
	if strings.Contains(denied.err.String(), "SECRET") {
		t.Error(denied.err)
	}
}

// gRPC does not recover from panics. One of the service's own functions fails its call, and not the
// process. It is logged without its value, and the outcome is true: after AuthorizeReplay unknown.
func TestPanicOfTheServicesFunctions(t *testing.T) {
	t.Parallel()
	type outcome struct {
		code    codes.Code
		outcome idempotency.Outcome
	}
	notExecuted, unknown := outcome{codes.Internal, idempotency.OutcomeNotExecuted}, outcome{codes.Unavailable, idempotency.OutcomeUnknown}
	for name, c := range map[string]struct {
		scope   grpcidem.ScopeFunc
		options grpcidem.Options
		want    outcome
		runs    int
	}{
		"ScopeFunc": {scope: func(context.Context, string) (string, error) { panic("SECRET") }, want: notExecuted},
		"Pass":      {options: grpcidem.Options{Pass: func(string) bool { panic("SECRET") }}, want: notExecuted},
		"TraceID":   {options: grpcidem.Options{TraceID: func(context.Context) string { panic("SECRET") }}, want: notExecuted},
		"AuthorizeReplay": {options: grpcidem.Options{AuthorizeReplay: func(context.Context, string, *idempotency.Record) error {
			panic("SECRET")
		}}, want: unknown, runs: 1},
	} {
		var logs strings.Builder
		runs := 0
		options := c.options
		options.Logger = slog.New(slog.NewTextHandler(&logs, nil))
		if c.scope == nil {
			c.scope = scope
		}
		idem := grpcidem.New(mwtest.NewStore(), c.scope, &options)
		conn := dial(t, serve(t, &probe{unary: func(context.Context, *payRequest) (*payReply, error) {
			runs++
			return &payReply{}, nil
		}, stream: func(func(*payReply) error) error { return nil }}, grpc.ChainUnaryInterceptor(idem.Unary), grpc.ChainStreamInterceptor(idem.Stream)))
		pay := caller(conn, t)
		pay(&payRequest{}, rpc.HeaderKey, "k")
		pay(&payRequest{}, rpc.HeaderKey, "k").want(t, "", c.want.code, c.want.outcome)
		if runs != c.runs {
			t.Errorf("%s: %d runs, want %d", name, runs, c.runs)
		}
		if name == "Pass" {
			if _, err := watch(t.Context(), conn, &payRequest{}, new(payReply)); status.Code(err) != codes.Internal {
				t.Errorf("a stream got %v", err)
			}
		}
		if text := logs.String(); !strings.Contains(text, "panicked with a string") || !strings.Contains(text, "unary_test.go") || strings.Contains(text, "SECRET") {
			t.Errorf("%s: the log has %s", name, text)
		}
	}
}

// A panic of a handler that passes is its own.
func TestPanicOfAPassingHandlerGoesOn(t *testing.T) {
	t.Parallel()
	recovering := func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (reply any, err error) {
		defer func() { err = status.Errorf(codes.DataLoss, "%v", recover()) }()
		return handler(ctx, req)
	}
	pay := payer(t, mwtest.NewStore(), &grpcidem.Options{Pass: func(string) bool { return true }}, func(context.Context, *payRequest) (*payReply, error) {
		panic("own")
	}, recovering)
	if got := pay(&payRequest{}); got.err.Code() != codes.DataLoss || got.err.Message() != "own" {
		t.Errorf("got %v, want the handler's own panic", got.err)
	}
}

// A caller learns where the key belongs, and whether two keys differ.
func TestTextsNameBothSourcesOfTheKey(t *testing.T) {
	t.Parallel()
	pay := payer(t, mwtest.NewStore(), nil, nil)
	for want, got := range map[string]answer{
		"The key is missing":        pay(&payRequest{}),
		"The key is invalid":        pay(&payRequest{RequestId: "a b"}),
		"differ: send one of them,": pay(&payRequest{RequestId: "canary-1"}, rpc.HeaderKey, "canary-2"),
	} {
		text := got.err.Message()
		if got.err.Code() != codes.InvalidArgument || !strings.Contains(text, want) || !strings.Contains(text, "metadata idempotency-key") || !strings.Contains(text, "request_id") || strings.Contains(text, "canary") {
			t.Errorf("%v, want %q and both sources", got.err, want)
		}
	}
}

func TestRecordThatIsNoResultIsUnknown(t *testing.T) {
	t.Parallel()
	store := mwtest.NewStore()
	record := func(key string, answer idempotency.Answer) {
		idempotency.NewEngine(store, nil).Do(t.Context(), idempotency.Request{
			Key: idempotency.Key{Scope: "acme", Value: key}, Fingerprint: rpc.Fingerprint(rpctest.Pay, &payRequest{}, rpc.KeyFieldDefault),
		}, func(context.Context) (*idempotency.Answer, error) { return &answer, nil })
	}
	record("changed", idempotency.Answer{Status: 200, Body: []byte("x")})
	foreign, err := proto.Marshal(&spb.Status{Details: []*anypb.Any{{TypeUrl: "type.googleapis.com/absent.Reply"}}})
	if err != nil {
		t.Fatal(err)
	}
	record("foreign", idempotency.Answer{Status: 200, Header: map[string][]string{"Content-Type": {rpc.MediaType}}, Body: foreign})
	var logs strings.Builder
	pay := payer(t, store, &grpcidem.Options{Logger: slog.New(slog.NewTextHandler(&logs, nil))}, func(context.Context, *payRequest) (*payReply, error) {
		t.Error("the handler ran")
		return nil, nil
	})
	pay(&payRequest{}, rpc.HeaderKey, "changed").want(t, "", codes.DataLoss, idempotency.OutcomeUnknown)
	pay(&payRequest{}, rpc.HeaderKey, "foreign").want(t, "", codes.Unavailable, idempotency.OutcomeUnknown)
	if !strings.Contains(logs.String(), "record-corrupt") {
		t.Errorf("the log has %s", logs.String())
	}
}

func TestInterceptorTwiceIsRefused(t *testing.T) {
	t.Parallel()
	var logs strings.Builder
	store := mwtest.NewStore()
	options := &grpcidem.Options{Logger: slog.New(slog.NewTextHandler(&logs, nil))}
	pay := payer(t, store, options, func(context.Context, *payRequest) (*payReply, error) {
		t.Error("the handler ran")
		return nil, nil
	}, grpcidem.New(store, scope, options).Unary)
	pay(&payRequest{}, rpc.HeaderKey, "k").want(t, "", codes.Internal, idempotency.OutcomeNotExecuted)
	if !strings.Contains(logs.String(), "leave one of the two out") {
		t.Errorf("the log has %s", logs.String())
	}
}

func TestLogsShowNeitherKeysNorMessages(t *testing.T) {
	t.Parallel()
	var logs strings.Builder
	pay := payer(t, mwtest.NewStore(), &grpcidem.Options{Logger: slog.New(slog.NewTextHandler(&logs, nil))}, func(_ context.Context, r *payRequest) (*payReply, error) {
		panic(r.GetDo())
	})
	pay(&payRequest{Do: "canary-message"}, rpc.HeaderKey, "canary-key").want(t, "", codes.Internal, idempotency.OutcomeNotExecuted)
	for _, want := range []string{"handler panicked with a string", "unary_test.go", rpctest.Pay, "handler-failed"} {
		if !strings.Contains(logs.String(), want) {
			t.Errorf("the log lacks %q: %s", want, logs.String())
		}
	}
	if strings.Contains(logs.String(), "canary") {
		t.Errorf("the log shows a key or a message: %s", logs.String())
	}
}

func TestPass(t *testing.T) {
	t.Parallel()
	idem := grpcidem.New(mwtest.NewStore(), scope, &grpcidem.Options{
		RefuseStreams: true, Pass: func(fullMethod string) bool { return fullMethod == "/bank.v1.Bank/List" }, Logger: slog.New(slog.DiscardHandler),
	})
	for method, passes := range map[string]bool{"/bank.v1.Bank/List": true, "/grpc.health.v1.Health/Check": true, rpctest.Look: true, "/bank.v1.Bank/Pay": false, "/grpc.of.a.bank.Bank/Pay": false} {
		reply, err := idem.Unary(t.Context(), &payRequest{}, &grpc.UnaryServerInfo{FullMethod: method}, func(context.Context, any) (any, error) { return "as it is", nil })
		if passed := reply == "as it is" && err == nil; passed != passes {
			t.Errorf("%s: %v, %v", method, reply, err)
		}
	}
	if _, err := idem.Unary(t.Context(), "no message", &grpc.UnaryServerInfo{FullMethod: "/bank.v1.Bank/Pay"}, nil); status.Code(err) != codes.Internal {
		t.Errorf("a request that is no message: %v", err)
	}
	_, err := idem.Unary(metadata.NewIncomingContext(t.Context(), metadata.Pairs(rpc.HeaderKey, "k")), &payRequest{}, &grpc.UnaryServerInfo{FullMethod: "/bank.v1.Bank/Pay"},
		func(context.Context, any) (any, error) { return "no message", nil })
	if status.Code(err) != codes.Internal {
		t.Errorf("a reply that is no message: %v", err)
	}
}

// refusals counts the events of calls, and panics.
type refusals struct {
	idempotency.Tracer
	mu      sync.Mutex
	refused []idempotency.Refused
	started []idempotency.RequestStart
}

func (r *refusals) TraceRefused(_ context.Context, refused idempotency.Refused) {
	r.refused = append(r.refused, refused)
	panic("the tracer")
}

func (r *refusals) TraceRequestStart(ctx context.Context, start idempotency.RequestStart) context.Context {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.started = append(r.started, start)
	return ctx
}

func (*refusals) TraceStep(context.Context, idempotency.StepEnd)          {}
func (*refusals) TraceRequestEnd(context.Context, idempotency.RequestEnd) {}

func TestTracer(t *testing.T) {
	t.Parallel()
	tracer := &refusals{}
	pay := payer(t, mwtest.NewStore(), &grpcidem.Options{Engine: idempotency.Options{Tracer: tracer}}, func(context.Context, *payRequest) (*payReply, error) {
		return &payReply{Id: "1"}, nil
	})
	pay(&payRequest{}).want(t, "", codes.InvalidArgument, idempotency.OutcomeNotExecuted)
	if len(tracer.refused) != 1 || tracer.refused[0].Reason != idempotency.ReasonKeyMissing || tracer.refused[0].Status != 400 || tracer.refused[0].Route != rpctest.Pay {
		t.Errorf("refused: %+v", tracer.refused)
	}
	const trace = "4bf92f3577b34da6a3ce929d0e0e4736"
	for parent, want := range map[string]string{"00-" + trace + "-00f067aa0ba902b7-01": trace, "00-" + strings.ToUpper(trace) + "-00f067aa0ba902b7-01": "", "00-short-01": ""} {
		tracer.started = nil
		pay(&payRequest{}, rpc.HeaderKey, "k", "traceparent", parent)
		if len(tracer.started) != 1 || tracer.started[0].TraceID != want || tracer.started[0].Route != rpctest.Pay {
			t.Errorf("%s: %+v", parent, tracer.started)
		}
	}
}

// waits is a tracer that reports each wait.
type waits struct {
	refusals
	began chan struct{}
}

func (w *waits) TraceWaitStart(context.Context) { w.began <- struct{}{} }

func TestCopiesMayWait(t *testing.T) {
	t.Parallel()
	tracer := &waits{began: make(chan struct{}, 1)}
	runs := 0
	pay := payer(t, mwtest.NewStore(), &grpcidem.Options{Engine: idempotency.Options{Wait: time.Minute, Tracer: tracer}}, func(context.Context, *payRequest) (*payReply, error) {
		runs++
		<-tracer.began // until the copy waits
		return &payReply{Id: "1"}, nil
	})
	var copies sync.WaitGroup
	var outcomes sync.Map
	for range 2 {
		copies.Go(func() { outcomes.Store(pay(&payRequest{}, rpc.HeaderKey, "k").outcome(), true) })
	}
	copies.Wait()
	_, executed := outcomes.Load(idempotency.OutcomeExecuted)
	_, replayed := outcomes.Load(idempotency.OutcomeReplayed)
	if runs != 1 || !executed || !replayed {
		t.Errorf("%d runs, executed %v, replayed %v", runs, executed, replayed)
	}
}

func TestOutcomeThatCannotBeSentIsLogged(t *testing.T) {
	t.Parallel()
	var logs strings.Builder
	early := func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		if err := grpc.SendHeader(ctx, metadata.Pairs("early", "1")); err != nil {
			t.Error(err)
		}
		return handler(ctx, req)
	}
	pay := payer(t, mwtest.NewStore(), &grpcidem.Options{Logger: slog.New(slog.NewTextHandler(&logs, nil))}, func(context.Context, *payRequest) (*payReply, error) {
		return &payReply{Id: "1"}, nil
	}, early)
	pay(&payRequest{}, rpc.HeaderKey, "k").want(t, "1", codes.OK, "")
	if !strings.Contains(logs.String(), "an interceptor outside has sent the header") {
		t.Errorf("the log has %s", logs.String())
	}
}

func TestDispositionOfTheService(t *testing.T) {
	t.Parallel()
	store := mwtest.NewStore()
	pay := payer(t, store, &grpcidem.Options{Disposition: func(c codes.Code) idempotency.Disposition {
		if c == codes.AlreadyExists {
			return idempotency.DispositionCommit
		}
		return grpcidem.DefaultDisposition(c)
	}}, func(context.Context, *payRequest) (*payReply, error) {
		return nil, status.Error(codes.AlreadyExists, "it was there")
	})
	pay(&payRequest{}, rpc.HeaderKey, "k").want(t, "", codes.AlreadyExists, idempotency.OutcomeExecuted)
	if ends := store.Ends(); len(ends) != 1 || ends[0].Verb != "COMMIT" {
		t.Errorf("the transaction ended in %v", ends)
	}
}

func TestOptionsThatCannotWorkPanic(t *testing.T) {
	t.Parallel()
	for name, o := range map[string]grpcidem.Options{
		"Engine.Disposition": {Engine: idempotency.Options{Disposition: idempotency.DefaultDisposition}},
		"KeyField":           {KeyField: "request id"},
		"KeyBytesMin":        {KeyBytesMin: 5, KeyBytesMax: 4},
		"KeyBytesMax":        {KeyBytesMax: idempotency.KeyBytesMax + 1},
		"RequestBytesMax":    {RequestBytesMax: -1},
		"ReplyBytesMax":      {ReplyBytesMax: -1},
		"RetryAfter":         {RetryAfter: -1},
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if text, _ := recover().(string); !strings.Contains(text, "Options.") {
					t.Errorf("panicked with %q", text)
				}
			}()
			grpcidem.New(mwtest.NewStore(), scope, &o)
		})
	}
	defer func() {
		if text, _ := recover().(string); !strings.Contains(text, "ScopeFunc") {
			t.Errorf("panicked with %q", text)
		}
	}()
	grpcidem.New(mwtest.NewStore(), nil, nil)
}

// A client that leaves is no fault of the service: the call goes on to its end, and the log has
// nothing for an operator.
func TestClientThatLeavesIsNotLogged(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	entered, ended := make(chan context.Context, 1), make(chan struct{})
	outside := func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
		defer close(ended)
		return handler(context.WithValue(ctx, serverContext{}, ctx), req)
	}
	store := mwtest.NewStore()
	idem := grpcidem.New(store, scope, &grpcidem.Options{Logger: slog.New(slog.NewTextHandler(&log, nil))})
	conn := dial(t, serve(t, &probe{unary: func(ctx context.Context, _ *payRequest) (*payReply, error) {
		server := ctx.Value(serverContext{}).(context.Context)
		entered <- server
		<-server.Done() // the server has noticed
		return &payReply{Id: "paid"}, grpc.SetHeader(ctx, metadata.Pairs("of-the-handler", "1"))
	}}, grpc.ChainUnaryInterceptor(outside, idem.Unary)))
	ctx, leave := context.WithCancel(metadata.NewOutgoingContext(t.Context(), metadata.Pairs(rpc.HeaderKey, "key-1")))
	go func() {
		<-entered
		leave()
	}()
	if err := conn.Invoke(ctx, rpctest.Pay, &payRequest{}, new(payReply)); status.Code(err) != codes.Canceled {
		t.Errorf("the client got %v", err)
	}
	<-ended
	if ends := store.Ends(); len(ends) != 1 || ends[0].String() != "COMMIT" {
		t.Errorf("the transactions ended with %q", ends)
	}
	if log.Len() > 0 {
		t.Errorf("logged: %s", &log)
	}
}

type serverContext struct{}
