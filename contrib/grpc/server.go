package grpcidem

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/contrib/grpc/rpc"
)

// ScopeFunc returns the scope of a call's key: the account, never the credential, so that a rotated
// token still finds its own requests. An example of fullMethod is "/bank.v1.Bank/Pay". An error
// refuses the call with Unauthenticated, or with its own code, message and details if it is one of
// package status; an empty or malformed scope is refused too. A service that also speaks HTTP must
// return the same scope for both: then a key counts once for both.
type ScopeFunc func(ctx context.Context, fullMethod string) (string, error)

// Interceptor makes the methods of a server idempotent. It is safe for concurrent use.
type Interceptor struct {
	engine  *idempotency.Engine
	scope   ScopeFunc
	options Options
}

// New returns an interceptor on the store. It panics if the store or the scope function is nil, or
// if the options can't work together.
func New(store idempotency.Store, scope ScopeFunc, opts *Options) *Interceptor {
	if scope == nil {
		panic("idempotency/contrib/grpc: New needs a ScopeFunc: without it one caller would get another's answers")
	}
	o := opts.full()
	engine := o.Engine
	engine.Disposition = o.disposition
	return &Interceptor{engine: idempotency.NewEngine(store, &engine), scope: scope, options: o}
}

// InFlight returns the number of calls in progress.
func (i *Interceptor) InFlight() int { return i.engine.InFlight() }

// Stream is a [grpc.StreamServerInterceptor]. No stream is recorded: it passes, or is refused as
// [Options.RefuseStreams] says, with Unimplemented.
func (i *Interceptor) Stream(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (failed error) {
	ctx, passes := stream.Context(), false
	defer func() {
		if passes {
			return // and a panic is the handler's
		}
		if value := recover(); value != nil {
			failed = i.survive(ctx, info.FullMethod, idempotency.ReasonHandlerFailed, value)
		}
	}()
	passes = i.options.passes(info.FullMethod) || !i.options.RefuseStreams && len(metadata.ValueFromIncomingContext(ctx, rpc.HeaderKey)) == 0
	if passes {
		return handler(server, stream)
	}
	refusal := i.refuse(ctx, info.FullMethod, rpc.ReasonStreamRefused, nil, nil)
	i.setOutcome(ctx, rpc.Result{Error: refusal}, idempotency.OutcomeNotExecuted, nil)
	return status.ErrorProto(refusal)
}

var (
	errNoMessage    = errors.New("request is not a message of protobuf: such methods must pass (Options.Pass)")
	errMountedTwice = errors.New("interceptor is on the way of a call twice, or inside of package middleware: leave one of the two out")
)

// Unary is a [grpc.UnaryServerInterceptor]. It replays the recorded answer of the call's key. If
// there is none, and nothing refuses the call, it runs the handler: again only if the transaction
// has to be started again, and each time on a copy of the request.
func (i *Interceptor) Unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (reply any, failed error) {
	o, method := &i.options, info.FullMethod
	passes, panicked := false, idempotency.ReasonHandlerFailed
	defer func() {
		if passes {
			return // and a panic is the handler's
		}
		if value := recover(); value != nil {
			failed = i.survive(ctx, method, panicked, value)
		}
	}()
	if passes = o.passes(method); passes {
		return handler(ctx, req)
	}
	refuse := func(reason idempotency.Reason, err error, override *spb.Status) (any, error) {
		refusal := i.refuse(ctx, method, reason, err, override)
		i.setOutcome(ctx, rpc.Result{Error: refusal}, outcomeOf(reason), nil)
		return nil, status.ErrorProto(refusal)
	}
	broken := func(err error) (any, error) { // by the service's own wiring: no retry helps
		o.Logger.LogAttrs(ctx, slog.LevelError, "idempotency: call can't be taken", slog.String("method", method), slog.Any("error", err))
		return refuse(idempotency.ReasonHandlerFailed, err, nil)
	}
	message, ok := req.(proto.Message)
	if !ok {
		return broken(errNoMessage)
	}
	if _, within := idempotency.KeyFrom(ctx); within {
		return broken(errMountedTwice)
	}

	// Find the key and the scope.
	key, err := rpc.Key(metadata.ValueFromIncomingContext(ctx, rpc.HeaderKey), message, protoreflect.Name(o.KeyField))
	switch {
	case errors.Is(err, rpc.ErrKeyMissing) && o.Optional:
	case errors.Is(err, rpc.ErrKeyMissing):
		return refuse(idempotency.ReasonKeyMissing, err, nil)
	case errors.Is(err, rpc.ErrKeysDiffer):
		return refuse(idempotency.ReasonKeyInvalid, err, &spb.Status{
			Code:    int32(code.Code_INVALID_ARGUMENT),
			Message: fmt.Sprintf("The keys in metadata %s and in the message's field %s differ: send one of them, or the same key in both. Nothing was executed.", rpc.HeaderKey, o.KeyField),
		})
	case err == nil && (len(key) < o.KeyBytesMin || len(key) > o.KeyBytesMax):
		err = fmt.Errorf("%w: it has %d characters, and must have %d to %d", idempotency.ErrKeyInvalid, len(key), o.KeyBytesMin, o.KeyBytesMax)
		fallthrough
	case err != nil:
		return refuse(idempotency.ReasonKeyInvalid, err, nil)
	}
	scope, err := i.scope(ctx, method)
	if err != nil {
		own, _ := status.FromError(err)
		if own.Code() == codes.Unknown { // not one of package status
			own = nil
		}
		return refuse(idempotency.ReasonScope, &serviceError{err}, own.Proto())
	}
	if err = idempotency.ValidateScope(scope); err == nil && strings.HasPrefix(scope, idempotency.MessageScopePrefix) {
		err = fmt.Errorf("%w: it begins with %q, as those of consumers do: put another word in front", idempotency.ErrScopeInvalid, idempotency.MessageScopePrefix)
	}
	if err != nil {
		return refuse(idempotency.ReasonScope, err, nil)
	}
	if size := proto.Size(message); size > o.RequestBytesMax {
		return refuse(idempotency.ReasonBodyTooLarge, fmt.Errorf("message has %d bytes, over the limit of %d (Options.RequestBytesMax)", size, o.RequestBytesMax), nil)
	}

	// Nothing goes to the client before Do has returned.
	call := &call{options: o, message: message, method: method, handler: handler}
	request := idempotency.Request{
		Key: idempotency.Key{Scope: scope, Value: key}, FingerprintAt: rpc.FingerprintAt, TraceID: o.TraceID(ctx), Route: method,
	}
	if key != "" {
		request.Fingerprint = rpc.Fingerprint(method, message, protoreflect.Name(o.KeyField))
	}
	panicked = idempotency.ReasonOutcomeUnknown
	result := i.engine.Do(ctx, request, call.run)
	answer := call.result
	if result.Record != nil {
		if answer, err = rpc.Decode(result.Answer); err != nil {
			result = idempotency.Result{Outcome: idempotency.OutcomeUnknown, Reason: idempotency.ReasonOutcomeUnknown, Err: err}
			if errors.Is(err, idempotency.ErrRecordCorrupt) {
				result.Reason = idempotency.ReasonRecordCorrupt
			}
			i.refuse(ctx, method, result.Reason, err, nil) // only for the Tracer
		}
	}
	i.log(ctx, method, request.Key, result)
	switch {
	case result.Answer == nil:
		answer = rpc.Result{Error: rpc.Refusal{
			Reason: result.Reason, Outcome: result.Outcome, RetryAfter: max(result.RetryAfter, o.RetryAfter), Accepted: result.Accepted,
		}.Error()}
		i.setOutcome(ctx, answer, result.Outcome, nil)
	case result.Record == nil: // the handler's own reply or error, with all its metadata
		i.setOutcome(ctx, answer, result.Outcome, nil)
		if err := errors.Join(grpc.SetHeader(ctx, call.stream.header), grpc.SetTrailer(ctx, call.stream.trailer)); err != nil && ctx.Err() == nil {
			o.Logger.LogAttrs(ctx, slog.LevelWarn, "idempotency: metadata that the handler set can't be sent", slog.String("method", method), slog.Any("error", err))
		}
	default:
		if o.AuthorizeReplay != nil {
			if err := o.AuthorizeReplay(ctx, method, result.Record); err != nil {
				return refuse(idempotency.ReasonReplayDenied, &serviceError{err}, nil)
			}
		}
		i.setOutcome(ctx, answer, result.Outcome, metadata.Pairs(rpc.HeaderReplayed, "true",
			rpc.HeaderCreatedAt, result.Record.CreatedAt.UTC().Format(time.RFC3339), rpc.HeaderExpiresAt, result.Record.ExpiresAt.UTC().Format(time.RFC3339)))
	}
	if answer.Error != nil {
		return nil, status.ErrorProto(answer.Error)
	}
	return answer.Reply, nil
}

// survive returns the error of a call in which the ScopeFunc or a function in Options panicked. gRPC
// does not recover, and would end the process.
func (i *Interceptor) survive(ctx context.Context, method string, reason idempotency.Reason, value any) error {
	err := fmt.Errorf("the ScopeFunc, or a function in Options, panicked with a %T", value)
	i.options.Logger.LogAttrs(ctx, slog.LevelError, "idempotency: call failed", slog.String("method", method),
		slog.Any("error", err), slog.String("stack", string(debug.Stack())))
	refusal := i.refuse(ctx, method, reason, err, nil)
	i.setOutcome(ctx, rpc.Result{Error: refusal}, outcomeOf(reason), nil)
	return status.ErrorProto(refusal)
}

// setOutcome sets the metadata of a reply: the given header and the outcome, and in the trailers
// the code.
func (i *Interceptor) setOutcome(ctx context.Context, answer rpc.Result, outcome idempotency.Outcome, header metadata.MD) {
	header = metadata.Join(header, metadata.Pairs(rpc.HeaderStatus, string(outcome)))
	if err := grpc.SetHeader(ctx, header); err != nil && ctx.Err() == nil && grpc.ServerTransportStreamFromContext(ctx) != nil { // the client is there
		i.options.Logger.LogAttrs(ctx, slog.LevelError, "idempotency: the outcome can't be sent, because an interceptor outside has sent the header", slog.Any("error", err))
		return
	}
	_ = grpc.SetTrailer(ctx, metadata.Pairs(rpc.TrailerCode, strconv.Itoa(int(answer.Code())))) // fails only for a call without a transport
}

// outcomeOf returns the outcome of a call that the interceptor itself refuses.
func outcomeOf(reason idempotency.Reason) idempotency.Outcome {
	if reason == idempotency.ReasonReplayDenied || reason == idempotency.ReasonOutcomeUnknown {
		// Not-executed would be untrue, and replayed would reveal that there is an answer.
		return idempotency.OutcomeUnknown
	}
	return idempotency.OutcomeNotExecuted
}

// refuse returns the status of a call that the interceptor itself refuses, and traces it. override
// replaces the code and message of the reason.
func (i *Interceptor) refuse(ctx context.Context, method string, reason idempotency.Reason, err error, override *spb.Status) *spb.Status {
	refused := rpc.Refusal{Reason: reason, Outcome: outcomeOf(reason), RetryAfter: i.options.RetryAfter, Status: override}.Error()
	i.traceRefused(ctx, idempotency.Refused{Route: method, Reason: reason, Status: rpc.HTTPStatus(code.Code(refused.GetCode())), Err: err})
	return refused
}

func (i *Interceptor) traceRefused(ctx context.Context, refused idempotency.Refused) {
	tracer := i.options.Engine.Tracer
	if tracer == nil {
		return
	}
	defer func() { // as in the engine, a Tracer's panic does not affect the call
		if value := recover(); value != nil {
			i.options.Logger.LogAttrs(ctx, slog.LevelError, "idempotency: a Tracer panicked",
				slog.String("error", fmt.Sprintf("Tracer panicked with a %T", value)), slog.String("stack", string(debug.Stack())))
		}
	}()
	tracer.TraceRefused(ctx, refused)
}

// serviceError hides the text of an error of the service's own, which may quote a credential. A
// caller that may see it unwraps it.
type serviceError struct{ err error }

func (e *serviceError) Error() string { return "refused by the service" }

func (e *serviceError) Unwrap() error { return e.err }

// log reports results that need an operator. It shows the key as eight digits of a hash, and a
// panic as its type and stack.
func (i *Interceptor) log(ctx context.Context, method string, key idempotency.Key, result idempotency.Result) {
	var panicked *idempotency.PanicError
	errors.As(result.Err, &panicked)
	level, message := slog.LevelWarn, "idempotency: call was not answered by its handler"
	switch {
	case result.Reason == idempotency.ReasonUnavailable:
	case result.Reason == idempotency.ReasonHandlerFailed, result.Reason != "" && result.Outcome == idempotency.OutcomeUnknown:
		level = slog.LevelError
	case panicked != nil:
		level, message = slog.LevelError, "idempotency: a Tracer panicked"
	case result.Answer != nil && result.Outcome == idempotency.OutcomeUnknown:
		message = "idempotency: handler asked for a derived key, and its answer is not recorded"
	default:
		return
	}
	attributes := []slog.Attr{
		slog.String("outcome", string(result.Outcome)), slog.String("reason", string(result.Reason)),
		slog.Any("key", key), slog.String("method", method), slog.Any("error", result.Err),
	}
	if panicked != nil {
		attributes = append(attributes, slog.String("stack", string(panicked.Stack)))
	}
	i.options.Logger.LogAttrs(ctx, level, message, attributes...)
}
