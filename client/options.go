package client

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"net/textproto"
	"slices"
	"time"
)

// Limits that no option changes.
const (
	// an intent saved later than this from now has no reliable age, and is not sent again
	IntentSkewMax = time.Minute
	RoutesMax     = 1000 // the maximum number of routes remembered to honour keys
	ResumeAtOnce  = 4    // intents resumed concurrently
	// the time for an IntentStore to forget an intent, even if the request's context has ended
	SettleTimeout  = 5 * time.Second
	problemBodyMax = 64 << 10 // bytes of a problem document that are read
)

// Options tune a [Transport]. Nil and the zero value are the defaults, which are the safest. A
// negative number panics.
type Options struct {
	// Methods are the request methods that get a key. The default is POST and PATCH. PUT and DELETE
	// may be added if the server honours keys for them. GET, HEAD, OPTIONS, TRACE and QUERY can't
	// be added: they always pass through untouched.
	Methods []string

	// Honours reports whether the server honours keys for a request, so that it may be sent again
	// although its reply was lost. If it reports true wrongly, a retry pays twice. [Everywhere] is
	// true for all requests. If it is nil, the answers decide: a route (method, scheme, host and
	// path) that has answered with Idempotency-Status honours keys, and a lost reply of any other
	// route is [ErrUnknown] at once. At most [RoutesMax] routes are remembered.
	Honours func(r *http.Request) bool

	// BareKeys sends keys without quotes, for a server that does not read them as RFC 8941 strings.
	BareKeys bool

	// PreferAsync sends "Prefer: respond-async" (RFC 7240), so that a server that is not done yet may
	// answer that the request is pending, instead of unknown. The client polls the status resource
	// that the answer names until the operation is done, and then sends the request again for its
	// answer. Each poll is an attempt, with its pauses and limits. For the caller nothing changes. The
	// client understands pending answers without PreferAsync too.
	PreferAsync bool

	// BackoffFirst and BackoffMax bound the pause before a retry. The pause is random, between zero
	// and a bound (full jitter): the bound is BackoffFirst at first, and doubles up to BackoffMax.
	// An answer's Retry-After, up to RetryAfterMax, is added. They default to 100 milliseconds, 10
	// seconds (or BackoffFirst, if longer) and 30 seconds.
	BackoffFirst  time.Duration
	BackoffMax    time.Duration
	RetryAfterMax time.Duration

	// AttemptTimeout bounds one attempt, including its answer's body. It should be longer than the
	// server's longest request, or each retry finds the previous attempt still in progress.
	// Defaults to 30 seconds, the recommended WriteTimeout of a server.
	AttemptTimeout time.Duration

	// TotalMax and AttemptsMax limit a request with all of its attempts and pauses. A pause that
	// would end too late is not begun. If a pause took longer, because the process was stopped or
	// the machine suspended, nothing more is sent. They default to 2 minutes and 10 attempts.
	// TotalMax must be well under the server's TTL of a key and, with Intents, must not exceed
	// IntentAgeMax.
	TotalMax    time.Duration
	AttemptsMax int

	// RetryPercent, RetriesPerSecond and RetryBurst bound the retries of all requests of a
	// Transport together, so that an outage is not amplified. Each request adds RetryPercent of a
	// retry, each second adds RetriesPerSecond, and at most RetryBurst are saved up. A request that
	// finds none left ends with [ErrRetriesSpent]. They default to 20, 10 and 100. Unbudgeted
	// removes the bound.
	RetryPercent     int
	RetriesPerSecond int
	RetryBurst       int
	Unbudgeted       bool

	// BodyBytesMax bounds a request's body, which is kept in memory to be sent again. A longer body
	// is sent only if the request has GetBody and no intent of it is kept; else the request is
	// refused with [ErrBodyTooLarge], before anything is sent. Defaults to 1 MiB, the limit of
	// package middleware.
	BodyBytesMax int64

	// AnswerBytesMax is the number of bytes of an answer's body that are read before the caller
	// gets the answer, because an answer that breaks off is a lost one. The caller reads the rest
	// as it arrives. Defaults to 4 MiB.
	AnswerBytesMax int64

	// Intents keeps each keyed request from before its first attempt until it is settled, so that
	// after a crash [Transport.Resume] can continue it. A store belongs to one Transport. Nil keeps
	// none.
	Intents IntentStore

	// IntentHeaders are kept with an intent, in addition to [IntentHeadersDefault]. A request with
	// a header that is neither kept nor omitted is refused with [ErrIntentRefused] before anything
	// is sent: a header can select the account, and a resumed request without it would be another
	// request. Those of [IntentHeadersOmittedDefault] can't be kept.
	IntentHeaders []string

	// IntentHeadersOmitted are not kept with an intent, in addition to
	// [IntentHeadersOmittedDefault]: credentials, which the base RoundTripper must add to a resumed
	// request as to any other, and headers that the server ignores. The headers that the base adds
	// must depend only on the request: the context is that of Resume.
	IntentHeadersOmitted []string

	// IntentAgeMax is the age from which an intent is not sent again: the server deletes a record
	// after its TTL, and then the key is new. It must be under that TTL. Defaults to 12 hours, half
	// of the server's default TTL.
	IntentAgeMax time.Duration

	// Trace is called for every event of a keyed request, on the request's goroutine and with its
	// context. It should be quick. May be nil.
	Trace func(ctx context.Context, e Event)
}

// Everywhere is an [Options.Honours] for a client that sends requests only to routes that honour
// keys.
func Everywhere(*http.Request) bool { return true }

// IntentHeadersDefault returns the request headers that an intent keeps.
func IntentHeadersDefault() []string {
	return []string{
		"Accept", "Accept-Charset", "Accept-Encoding", "Accept-Language", "Content-Digest", "Content-Encoding", "Content-Language", "Content-Md5",
		"Content-Type", "Digest", "If-Match", "If-Modified-Since", "If-None-Match", "If-Unmodified-Since", "Prefer", "Referer", "Repr-Digest", "User-Agent",
	}
}

// IntentHeadersOmittedDefault returns the request headers that an intent never keeps: credentials,
// those of the connection and those that net/http makes itself, and the trace context, which by its
// standard does not change a request's meaning.
func IntentHeadersOmittedDefault() []string {
	return []string{
		"Authorization", "Cookie", "Proxy-Authorization", "X-Api-Key",
		"Connection", "Content-Length", "Expect", "Host", "Keep-Alive", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade",
		"Traceparent", "Tracestate",
	}
}

// full returns a copy of o with defaults filled in. It panics on invalid values.
func (o *Options) full() Options {
	var full Options
	if o != nil {
		full = *o
	}
	if full.Methods == nil {
		full.Methods = []string{http.MethodPost, http.MethodPatch}
	}
	full.Methods = slices.Clone(full.Methods)
	for _, method := range full.Methods {
		switch method {
		case http.MethodGet, http.MethodHead, http.MethodOptions, http.MethodTrace, http.MethodConnect, "QUERY":
			panic(fmt.Sprintf("idempotency/client: Options.Methods names %q, which never carries a key", method))
		}
		if !isToken(method) {
			panic(fmt.Sprintf("idempotency/client: Options.Methods names %q, which is no method", method))
		}
	}
	full.BackoffFirst = cmp.Or(full.BackoffFirst, 100*time.Millisecond)
	full.BackoffMax = cmp.Or(full.BackoffMax, max(10*time.Second, full.BackoffFirst))
	full.RetryAfterMax = cmp.Or(full.RetryAfterMax, 30*time.Second)
	full.AttemptTimeout = cmp.Or(full.AttemptTimeout, 30*time.Second)
	full.TotalMax = cmp.Or(full.TotalMax, 2*time.Minute)
	full.AttemptsMax = cmp.Or(full.AttemptsMax, 10)
	full.RetryPercent = cmp.Or(full.RetryPercent, 20)
	full.RetriesPerSecond = cmp.Or(full.RetriesPerSecond, 10)
	full.RetryBurst = cmp.Or(full.RetryBurst, 100)
	full.BodyBytesMax = cmp.Or(full.BodyBytesMax, 1<<20)
	full.AnswerBytesMax = cmp.Or(full.AnswerBytesMax, 4<<20)
	full.IntentAgeMax = cmp.Or(full.IntentAgeMax, 12*time.Hour)
	if full.BackoffFirst < 0 || full.BackoffMax < full.BackoffFirst || full.RetryAfterMax < 0 {
		panic("idempotency/client: Options.BackoffFirst must not be negative, nor RetryAfterMax, and BackoffMax must not be less than BackoffFirst")
	}
	if full.AttemptTimeout < 0 || full.TotalMax < 0 || full.AttemptsMax < 0 || full.BodyBytesMax < 0 || full.AnswerBytesMax < 0 {
		panic("idempotency/client: Options.AttemptTimeout, TotalMax, AttemptsMax, BodyBytesMax and AnswerBytesMax must not be negative")
	}
	if full.RetryPercent < 0 || full.RetriesPerSecond < 0 || full.RetryBurst < 0 {
		panic("idempotency/client: Options.RetryPercent, RetriesPerSecond and RetryBurst must not be negative: Unbudgeted lifts the bound")
	}
	if full.Intents != nil && full.IntentAgeMax < full.TotalMax {
		panic(fmt.Sprintf("idempotency/client: Options.IntentAgeMax is %v and TotalMax is %v: an intent must not grow too old while it is sent", full.IntentAgeMax, full.TotalMax))
	}
	full.IntentHeadersOmitted = append(IntentHeadersOmittedDefault(), canonical(full.IntentHeadersOmitted)...)
	full.IntentHeaders = canonical(full.IntentHeaders)
	for _, name := range full.IntentHeaders {
		if name == HeaderKey || slices.Contains(full.IntentHeadersOmitted, name) {
			panic(fmt.Sprintf("idempotency/client: Options.IntentHeaders names %s, which is never kept or is omitted", name))
		}
	}
	for _, name := range IntentHeadersDefault() {
		if !slices.Contains(full.IntentHeadersOmitted, name) {
			full.IntentHeaders = append(full.IntentHeaders, name)
		}
	}
	return full
}

func canonical(names []string) []string {
	list := make([]string, len(names))
	for i, name := range names {
		list[i] = textproto.CanonicalMIMEHeaderKey(name)
	}
	return list
}
