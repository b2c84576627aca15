package middleware

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"time"

	"github.com/paidonce/idempotency"
)

// Options tune a [Middleware]. Nil and the zero value are the defaults, which are the safest. A
// negative value turns something off if its comment says so, and panics otherwise.
type Options struct {
	// TTL is how long a record counts. A retry that comes later runs again, so TTL must be longer
	// than any client retries. Defaults to 24 hours.
	TTL time.Duration

	// Wait is how long a duplicate of a running request waits for its answer before it gets 409.
	// Defaults to 0: it gets 409 at once. See [idempotency.Options.Wait] for the server's timeouts
	// that must exceed it.
	Wait time.Duration

	// Disposition returns the meaning of an answer for the transaction. Defaults to
	// [idempotency.DefaultDisposition]: 2xx and 3xx are committed, 4xx recorded without the
	// handler's writes, and 5xx forgotten. A protocol that reports errors in the body of a 200, such as
	// GraphQL and JSON-RPC, needs a Disposition of its own. It gets the whole body, and the headers
	// that are recorded, and must not change them in place.
	Disposition func(answer idempotency.Answer) idempotency.Disposition

	// Reduce returns the part of an answer that is recorded, if that is not all of it: see
	// [StatusAndLocation] and [idempotency.Options.Reduce]. Headers that are never recorded are
	// dropped from its result. Defaults to recording everything.
	Reduce func(answer idempotency.Answer) idempotency.Answer

	// Tracer gets all events. Defaults to none.
	Tracer idempotency.Tracer

	// Service is the service's name in derived keys. All replicas and releases must have the same:
	// read [idempotency.Options.Service] before you set it.
	Service string

	// Restarts is the maximum number of times that a request is started again after a serialization
	// failure or a lost race. Negative means never. Defaults to 3.
	Restarts int

	// InFlightMax is the maximum number of requests in progress, counted after their body is read.
	// Further ones get 503. Negative means no limit. Defaults to 512.
	InFlightMax int

	// Timeouts bound the handler (10 seconds by default), COMMIT, and the look-up if the reply to
	// COMMIT is lost.
	Timeouts idempotency.Timeouts

	// Optional lets requests without a key through. Their handler gets a transaction, which is
	// committed with a 2xx or 3xx and undone with any other status; nothing is recorded. A
	// malformed key is still refused.
	Optional bool

	// EmptyOK makes an empty 200, as net/http does, of a handler that calls neither WriteHeader nor
	// Write. Defaults to false: such a request is 500 handler-failed, and the handler's writes are
	// undone. A framework that is wired wrongly looks the same, because its answer, or its error,
	// goes around the middleware.
	EmptyOK bool

	// KeyBytesMin and KeyBytesMax bound the key after unquoting. They default to 1 and 255. 255 is
	// the maximum ([idempotency.KeyBytesMax]).
	KeyBytesMin int
	KeyBytesMax int

	// BodyBytesMax bounds the request's body, and AnswerBytesMax the answer's. A longer body gets
	// 413; a longer answer fails the handler. Both are held in memory. Both default to 1 MiB.
	BodyBytesMax   int64
	AnswerBytesMax int

	// Fingerprinters make the fingerprints of requests. The first makes those of new records. The
	// others are for records that they made, until those have expired. Defaults to the built-in
	// [FingerprinterV1]; beside one of your own, name it if it was in use.
	//
	// The built-in one takes method, path, query, Content-Type and body byte by byte. If something
	// on the way respells media types ("application/json" and "application/json; charset=utf-8"
	// differ), signs the query or compresses bodies, retries are mismatches: then write a function
	// that takes only the relevant parts.
	Fingerprinters []Fingerprinter

	// Resumable lets the route's handler call other services (package effect). It is a name for the
	// handler, with a version, such as "topup/1". A request with a call that is not settled stays
	// open, and runs again on the handler with this name, in any replica that has it (see
	// [Middleware.Completer]). So each name belongs to one handler, and a replaced handler must stay
	// mounted until no request of its name is open. Up to its first call the handler may run even if
	// the answer is recorded already. Empty, the default, refuses such calls.
	Resumable string

	// BackoffMax and ParkAfter are those of [idempotency.Options], for resumable routes. They default
	// to 5 minutes and 24 hours.
	BackoffMax time.Duration
	ParkAfter  time.Duration

	// StoreHeaders are the request headers that a resumed run has, in addition to
	// [StoredHeaders]. Headers that carry credentials can't be stored.
	StoreHeaders []string

	// ResumeContext completes the context of a resumed run. Nil adds nothing.
	ResumeContext ResumeContextFunc

	// Accepted makes a resumable route answer an open request with 202 pending and the address of the
	// status resource, if the client sends "Prefer: respond-async" (RFC 7240). Other clients get 503
	// unknown with "accepted": true. Nil, the default, answers 503 to all, because a client that looks
	// only at the status code takes a 202 for paid.
	Accepted *Status

	// RecordHeaders are recorded and replayed in addition to [RecordedHeaders]. Headers that carry
	// a credential, belong to the connection or tell which site may read the answer
	// (Access-Control-*) are refused.
	RecordHeaders []string

	// AuthorizeReplay is called before an answer is replayed, when no connection is held. An error
	// refuses it with 403, for example if the caller has lost the right to see it since. Nil allows
	// all replays, which is right if authorization is mounted outside. It gets a copy of the request,
	// with its body. Before a [Status] shows the answer, it gets the request to the status resource
	// instead.
	AuthorizeReplay func(r *http.Request, record *idempotency.Record) error

	// Quota bounds how many keys each scope may record. The zero value bounds nothing.
	Quota Quota

	// RouterState restores the state of a router before a handler runs again; package
	// middleware/chiroute has it for chi. If it is nil a handler runs again without it, unless chi
	// has routed the request, or may have: then the answer is 503 instead, because a second run may
	// be routed to a 404. The middleware never looks into a context of any other package than
	// context. If the request has one, chi may have routed the request. A resumable route needs it
	// too, because a resumed run has no router outside.
	RouterState RouterStateFunc

	// TraceID returns the id of a request's trace, to be recorded. The default takes it from the
	// header traceparent (W3C Trace Context). Package observe/otel has one that also records the
	// server's span, which a link from a replay needs.
	TraceID func(r *http.Request) string

	// Route names the route of a request for the tracer, such as "POST /transfers". It must come
	// from a small set, never from the path. It is called before the handler. Neither it nor
	// TraceID may read the body. The default is the pattern that net/http's ServeMux or chi
	// matched, which is empty if the middleware is mounted outside the router.
	Route func(r *http.Request) string

	// RetryAfter goes into the header Retry-After, in full seconds. Defaults to 1 second.
	RetryAfter time.Duration

	// ProblemBase is the beginning of a problem document's type. Defaults to the address of
	// docs/problems.md in this project's repository, with "#" at its end.
	ProblemBase string

	// Logger gets failed handlers, unavailable databases and unknown outcomes, and once per route
	// each mistake in mounting; never a key, body or credential. For a panic it gets the type and
	// the stack, not the value, which may hold anything: a Tracer finds that in
	// [idempotency.PanicError]. The default is slog.Default().
	Logger *slog.Logger
}

// Fingerprinter makes the fingerprint of a request, by a function of your own.
type Fingerprinter struct {
	// Version is at least idempotency.FingerprintVersionUserMin, and new for every change of
	// Content.
	Version int16

	// Content returns the bytes that are equal for equal requests, for example the canonical form
	// of some fields of the body. They are hashed with SHA-256. Everything left out of them may
	// differ unnoticed. If it can't parse the body it returns the body. r is a copy of the request
	// with the body, to read and to parse.
	Content func(r *http.Request, body []byte) []byte
}

const fingerprintVersionBuiltIn = 1

// FingerprinterV1 returns the built-in one, for [Options.Fingerprinters].
func FingerprinterV1() Fingerprinter { return Fingerprinter{Version: fingerprintVersionBuiltIn} }

// RouterStateFunc returns the state that a router has in the request's context. It is called before
// the first run of a handler, with stored nil. In another process, which resumes the request, it is
// called with a context that no router has seen, and with the result of Stored.
type RouterStateFunc func(ctx context.Context, stored []byte) (RouterState, error)

// RouterState is the state of a router before the first run of a handler. It is an alias, so that a
// package for a router need not import this one.
type RouterState = interface {
	// Restore is called before each further run, and returns that run's context with the state.
	Restore(ctx context.Context) context.Context

	// Stored returns the state as it is kept with an open request, or nil if there is none.
	Stored() []byte
}

// full returns a copy of o with every default filled in. It panics on values that can't work.
func (o *Options) full() Options {
	var full Options
	if o != nil {
		full = *o
	}
	full.KeyBytesMin = cmp.Or(full.KeyBytesMin, 1)
	full.KeyBytesMax = cmp.Or(full.KeyBytesMax, idempotency.KeyBytesMax)
	full.BodyBytesMax = cmp.Or(full.BodyBytesMax, 1<<20)
	full.AnswerBytesMax = cmp.Or(full.AnswerBytesMax, 1<<20)
	full.RetryAfter = cmp.Or(full.RetryAfter, time.Second)
	full.ProblemBase = cmp.Or(full.ProblemBase, "https://github.com/paidonce/idempotency/blob/main/docs/problems.md#")
	if full.TraceID == nil {
		full.TraceID = traceID
	}
	if full.Route == nil {
		full.Route = func(r *http.Request) string { return r.Pattern }
	}
	if full.Logger == nil {
		full.Logger = slog.Default()
	}
	if full.KeyBytesMin < 1 || full.KeyBytesMax < full.KeyBytesMin || full.KeyBytesMax > idempotency.KeyBytesMax {
		panic(fmt.Sprintf("idempotency/middleware: Options.KeyBytesMin is %d and KeyBytesMax is %d: they must be in order, and from 1 to %d", full.KeyBytesMin, full.KeyBytesMax, idempotency.KeyBytesMax))
	}
	if full.BodyBytesMax < 0 || full.AnswerBytesMax < 0 || full.RetryAfter < 0 {
		panic("idempotency/middleware: Options.BodyBytesMax, AnswerBytesMax and RetryAfter must not be negative")
	}
	full.Quota = full.Quota.full()
	if len(full.Fingerprinters) == 0 {
		full.Fingerprinters = []Fingerprinter{FingerprinterV1()}
	}
	var versions []int16
	for _, f := range full.Fingerprinters {
		if builtIn := f.Version == fingerprintVersionBuiltIn; builtIn != (f.Content == nil) || !builtIn && f.Version < idempotency.FingerprintVersionUserMin {
			panic(fmt.Sprintf("idempotency/middleware: a Fingerprinter has version %d: a function of your own needs one from %d on", f.Version, idempotency.FingerprintVersionUserMin))
		}
		if slices.Contains(versions, f.Version) {
			panic(fmt.Sprintf("idempotency/middleware: two Fingerprinters have version %d", f.Version))
		}
		versions = append(versions, f.Version)
	}
	for _, name := range full.RecordHeaders {
		if name = http.CanonicalHeaderKey(name); neverRecorded(name) {
			panic(fmt.Sprintf("idempotency/middleware: Options.RecordHeaders names %s, which is never recorded", name))
		}
	}
	full.checkResumable()
	return full
}

// engine returns the engine's options.
func (o *Options) engine() *idempotency.Options {
	engine := &idempotency.Options{
		TTL: o.TTL, Wait: o.Wait, Disposition: o.Disposition, Tracer: o.Tracer, Service: o.Service,
		Restarts: o.Restarts, BackoffMax: o.BackoffMax, ParkAfter: o.ParkAfter, InFlightMax: o.InFlightMax, Timeouts: o.Timeouts,
	}
	if o.Reduce != nil {
		engine.Reduce = func(answer idempotency.Answer) idempotency.Answer {
			reduced := o.Reduce(answer)
			reduced.Header = maps.Clone(reduced.Header)
			maps.DeleteFunc(reduced.Header, func(name string, _ []string) bool { return neverRecorded(http.CanonicalHeaderKey(name)) })
			return reduced
		}
	}
	return engine
}

// traceID takes the trace id from a traceparent header: version, 32 hexadecimal digits, parent,
// flags.
func traceID(r *http.Request) string {
	parent := r.Header.Get("Traceparent")
	if len(parent) < 55 || parent[2] != '-' || parent[35] != '-' {
		return ""
	}
	id := parent[3:35]
	for i := range len(id) {
		if c := id[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return ""
		}
	}
	return id
}
