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
	IntentSkewMax  = time.Minute     // an intent that was saved later than that from now on tells no age, and is not sent again
	RoutesMax      = 1000            // routes of which it is remembered that they honour keys
	ResumeAtOnce   = 4               // intents that are resumed at once
	SettleTimeout  = 5 * time.Second // for an IntentStore to forget an intent, also when the request's context is over
	problemBodyMax = 64 << 10        // bytes of a problem document that is looked into
)

// Options tune a [Transport]. Nil and the zero value are the defaults, which are the safest. A
// negative number panics.
type Options struct {
	// Methods are the request methods that get a key. The default is POST and PATCH. PUT and DELETE
	// may be added if the server honours keys for them. GET, HEAD, OPTIONS, TRACE and QUERY may
	// not: they always pass through untouched.
	Methods []string

	// Honours says whether the server honours keys for a request, so that it may be sent again although its reply was
	// lost. Where it does not, that pays twice. [Everywhere] says so of all. Nil goes by what was seen: a route (method,
	// scheme, host and path) that has answered with Idempotency-Status honours keys, and a lost reply of any other is
	// [ErrUnknown] at once. At most [RoutesMax] routes are remembered.
	Honours func(r *http.Request) bool

	// BareKeys sends keys as they are, for a server that does not read them as RFC 8941 strings, "in quotes".
	BareKeys bool

	// BackoffFirst and BackoffMax bound the pause before a retry: it is drawn evenly from zero to the bound (full jitter),
	// which is BackoffFirst at first and doubles up to BackoffMax. Retry-After of an answer, up to RetryAfterMax, comes on
	// top. They default to 100 milliseconds, 10 seconds (BackoffFirst, if that is longer) and 30
	// seconds.
	BackoffFirst  time.Duration
	BackoffMax    time.Duration
	RetryAfterMax time.Duration

	// AttemptTimeout bounds one attempt, its answer's body included. It should be longer than the server takes at most, or
	// each retry finds the attempt before still in progress. Defaults to 30 seconds, as long as a server's WriteTimeout
	// should be.
	AttemptTimeout time.Duration

	// TotalMax and AttemptsMax limit a request with all of its attempts and pauses. A pause that
	// would end too late is not begun. If one took longer, because the process was stopped or the
	// machine suspended, nothing more is sent. They default to 2 minutes and 10 attempts. TotalMax
	// must be well under the server's TTL of a key and, with Intents, must not exceed IntentAgeMax.
	TotalMax    time.Duration
	AttemptsMax int

	// RetryPercent, RetriesPerSecond and RetryBurst bound the retries of all requests of a Transport together, so that an
	// outage is not amplified: each request earns RetryPercent of a retry, each second RetriesPerSecond, and RetryBurst can
	// be saved up. A request that finds none left ends with [ErrRetriesSpent]. They default to 20, 10 and 100.
	// Unbudgeted lifts the bound.
	RetryPercent     int
	RetriesPerSecond int
	RetryBurst       int
	Unbudgeted       bool

	// BodyBytesMax bounds a request's body, which is kept in memory to be sent again. A longer one is sent only if the
	// request has GetBody and no intent is kept of it; else it is refused with [ErrBodyTooLarge], before anything is sent.
	// Defaults to 1 MiB, the limit of package middleware.
	BodyBytesMax int64

	// AnswerBytesMax is how much of an answer's body is read before the caller gets it, because an answer that breaks off
	// is a lost one. What is beyond is read by the caller as it comes. Defaults to 4 MiB.
	AnswerBytesMax int64

	// Intents keeps each keyed request from before its first attempt until it is settled, so that a process that dies can
	// go on by [Transport.Resume]. A store belongs to one Transport. Nil keeps none.
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

	// IntentAgeMax is the age from which on an intent is not sent again: a key counts at the server for a time, and is new
	// after it. It must be under that time. Defaults to 12 hours, half of the server's default TTL.
	IntentAgeMax time.Duration

	// Trace is told of everything that happens to a keyed request, from the goroutine of the request and with its context.
	// It should be quick. Nil tells nobody.
	Trace func(ctx context.Context, e Event)
}

// Everywhere is an [Options.Honours] for a client all of whose requests go to routes that honour keys.
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

// full returns a copy of o in which nothing is left out. It panics on values that can't work.
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
