package grpcidem

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/contrib/grpc/rpc"
)

// Options tune an [Interceptor]. Nil and the zero value are the defaults, which are the safest. A
// negative number panics. If the [ScopeFunc], or a function here, panics, the call fails and the
// process goes on: Internal and not executed, or Unavailable and unknown if it was AuthorizeReplay.
type Options struct {
	// Engine has the options that are the same for every protocol: TTL, Wait, Timeouts, Tracer and
	// so on. Its Disposition must be nil: use the one below.
	Engine idempotency.Options

	// Disposition returns the meaning of a code for the transaction. Defaults to
	// DefaultDisposition: OK is committed; InvalidArgument, NotFound, AlreadyExists,
	// FailedPrecondition and OutOfRange are recorded without the handler's writes; every other code
	// is forgotten.
	Disposition func(code codes.Code) idempotency.Disposition

	// Pass reports whether a method passes untouched, such as one that only reads. Methods with the
	// option idempotency_level = NO_SIDE_EFFECTS always pass, and so do gRPC's own services for
	// health, reflection and channelz. Nil passes no others.
	Pass func(fullMethod string) bool

	// Optional lets calls without a key through. Their handler gets a transaction: OK commits it, and
	// any other code undoes it (see Disposition). Nothing is recorded. A malformed key is still
	// refused.
	Optional bool

	// RefuseStreams refuses all streams that do not pass (see Pass). By default only a stream with
	// a key is refused, because its client expects a replay, which a stream can't have.
	RefuseStreams bool

	// KeyField is the name of the message's string field that may carry the key, in place of the
	// metadata idempotency-key. Defaults to request_id (AIP-155). With "-" no field carries it.
	KeyField string

	// KeyBytesMin and KeyBytesMax bound the key after unquoting. They default to 1 and 255. 255 is
	// the maximum ([idempotency.KeyBytesMax]).
	KeyBytesMin int
	KeyBytesMax int

	// RequestBytesMax bounds the encoded request, and ReplyBytesMax the encoded reply or error. A
	// longer request gets InvalidArgument; a longer reply fails the handler. The server checks its
	// own MaxRecvMsgSize first. Both default to 1 MiB.
	RequestBytesMax int
	ReplyBytesMax   int

	// AuthorizeReplay is called before an answer is replayed, when no connection is held. If it
	// returns an error the call gets PermissionDenied, for example because the caller may not see
	// the answer any more. Nil allows all replays, which is right if an interceptor outside
	// authorizes.
	AuthorizeReplay func(ctx context.Context, fullMethod string, record *idempotency.Record) error

	// TraceID returns the id of a call's trace, to be recorded. The default takes it from the
	// metadata traceparent (W3C Trace Context).
	TraceID func(ctx context.Context) string

	// RetryAfter goes into the RetryInfo of refusals. Defaults to 1 second.
	RetryAfter time.Duration

	// Logger gets failed handlers, unavailable databases and unknown outcomes; never a key, message
	// or credential. For a panic it gets the type and the stack. The default is slog.Default().
	Logger *slog.Logger
}

// DefaultDisposition is the default of [Options.Disposition].
func DefaultDisposition(c codes.Code) idempotency.Disposition {
	return rpc.DefaultDisposition(code.Code(c))
}

// noKeyField is the value of Options.KeyField for none.
const noKeyField = "-"

// full returns a copy of o with every default filled in. It panics on values that can't work.
func (o *Options) full() Options {
	var full Options
	if o != nil {
		full = *o
	}
	full.KeyField = cmp.Or(full.KeyField, rpc.KeyFieldDefault)
	full.KeyBytesMin = cmp.Or(full.KeyBytesMin, 1)
	full.KeyBytesMax = cmp.Or(full.KeyBytesMax, idempotency.KeyBytesMax)
	full.RequestBytesMax = cmp.Or(full.RequestBytesMax, 1<<20)
	full.ReplyBytesMax = cmp.Or(full.ReplyBytesMax, 1<<20)
	full.RetryAfter = cmp.Or(full.RetryAfter, time.Second)
	if full.Disposition == nil {
		full.Disposition = DefaultDisposition
	}
	if full.TraceID == nil {
		full.TraceID = traceID
	}
	if full.Logger == nil {
		full.Logger = slog.Default()
	}
	if full.Engine.Disposition != nil {
		panic("idempotency/contrib/grpc: Options.Engine.Disposition is set: it would see HTTP statuses; set Options.Disposition, which sees codes")
	}
	if full.KeyField != noKeyField && !protoreflect.Name(full.KeyField).IsValid() {
		panic(fmt.Sprintf("idempotency/contrib/grpc: Options.KeyField is %q: it must be the name of a field, such as request_id, or %q", full.KeyField, noKeyField))
	}
	if full.KeyBytesMin < 1 || full.KeyBytesMax < full.KeyBytesMin || full.KeyBytesMax > idempotency.KeyBytesMax {
		panic(fmt.Sprintf("idempotency/contrib/grpc: Options.KeyBytesMin is %d and KeyBytesMax is %d: they must be in order, and from 1 to %d", full.KeyBytesMin, full.KeyBytesMax, idempotency.KeyBytesMax))
	}
	if full.RequestBytesMax < 0 || full.ReplyBytesMax < 0 || full.RetryAfter < 0 {
		panic("idempotency/contrib/grpc: Options.RequestBytesMax, ReplyBytesMax and RetryAfter must not be negative")
	}
	return full
}

// disposition is the engine's.
func (o *Options) disposition(answer idempotency.Answer) idempotency.Disposition {
	return o.Disposition(codes.Code(rpc.CodeOf(&answer)))
}

// passes reports whether a method passes untouched.
func (o *Options) passes(fullMethod string) bool {
	return keyless(fullMethod) || o.Pass != nil && o.Pass(fullMethod)
}

// keyless reports whether a method never has a key, by its name or its .proto file.
func keyless(fullMethod string) bool {
	for _, service := range []string{"/grpc.health.", "/grpc.reflection.", "/grpc.channelz."} {
		if strings.HasPrefix(fullMethod, service) {
			return true
		}
	}
	return rpc.NoSideEffects(fullMethod)
}

// traceID takes the trace id from the metadata traceparent: version, 32 hexadecimal digits, parent,
// flags.
func traceID(ctx context.Context) string {
	values := metadata.ValueFromIncomingContext(ctx, "traceparent")
	if len(values) == 0 || len(values[0]) < 55 || values[0][2] != '-' || values[0][35] != '-' {
		return ""
	}
	id := values[0][3:35]
	if strings.Trim(id, "0123456789abcdef") != "" {
		return ""
	}
	return id
}
