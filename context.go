package idempotency

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"reflect"
	"sync/atomic"
	"time"
)

type contextKey struct{}

// running is the attempt that a handler's context belongs to.
type running struct {
	key     Key
	attempt AttemptID
	service string
	derived *atomic.Bool // whether any run of the request has asked for a derived key
	effects *Effects     // nil unless the route is resumable
}

// attemptContext carries the attempt: a context.WithValue that contains its value.
type attemptContext struct {
	context.Context
	running running
}

// Value implements context.Context.
func (c *attemptContext) Value(key any) any {
	if key == (contextKey{}) {
		return &c.running
	}
	return c.Context.Value(key)
}

// String returns only the context's name. The contexts below it belong to other packages, which may
// change them meanwhile.
func (*attemptContext) String() string { return "idempotency.WithAttempt" }

// Format keeps the key and the contexts below out of every verb of fmt. It drops the error, for
// which fmt has no use.
func (c *attemptContext) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, c.String()) }

// detached is a context.WithoutCancel that can be a part of another struct: it has the values of a
// context, and never ends.
type detached struct{ context.Context }

// Deadline implements context.Context.
func (*detached) Deadline() (time.Time, bool) { return time.Time{}, false }

// Done implements context.Context.
func (*detached) Done() <-chan struct{} { return nil }

// Err implements context.Context.
func (*detached) Err() error { return nil }

// String returns only the context's name, as for attemptContext.
func (*detached) String() string { return "idempotency.WithoutCancel" }

// Format keeps the contexts below out of every verb of fmt. It drops the error, for which fmt has
// no use.
func (c *detached) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, c.String()) }

// AttemptIDFrom returns the id of the attempt that runs with this context, and false outside an
// idempotent handler. It differs from run to run: [DerivedKey] stays the same.
func AttemptIDFrom(ctx context.Context) (AttemptID, bool) {
	r, ok := ctx.Value(contextKey{}).(*running)
	if !ok {
		return AttemptID{}, false
	}
	return r.attempt, true
}

// KeyFrom returns the key of the request that runs with this context, and false outside an
// idempotent handler. Its Value is empty if the request came without a key.
func KeyFrom(ctx context.Context) (Key, bool) {
	r, ok := ctx.Value(contextKey{}).(*running)
	if !ok {
		return Key{}, false
	}
	return r.key, true
}

// Resumed reports whether the request that runs with this context was open before this run.
func Resumed(ctx context.Context) bool {
	r, ok := ctx.Value(contextKey{}).(*running)
	return ok && r.effects != nil && r.effects.open != nil
}

// DerivedKey returns a key for a call that the handler makes to another service without package
// effect, which makes calls count once and derives its own keys. A derived key is the same for
// every attempt at this request, and different for every other request and name. It is safe to show
// to the other side, which can't find the original from it. It has the layout of a version 8 UUID
// (RFC 9562).
//
// The handler's effects outside its transaction happen at least once, and a decline or a rollback
// does not undo them. With a derived key the other side can recognize repetitions. So from this
// call on the request is never not-executed: if nothing is recorded, because the answer is
// forgotten, the handler fails, or the commit fails, the outcome is [OutcomeUnknown], and the
// client retries with the same key. That holds for all runs of one [Engine.Do], whichever of them
// called DerivedKey. Call it before the handler returns; a later call from a goroutine does not
// change the client's answer.
//
// For a request without a key it returns a key of this one attempt, which no retry can repeat: if
// the outcome is unknown, it stays so. [Options.Service] keeps the keys of two services apart.
// DerivedKey may be called from several goroutines. It panics outside an idempotent handler,
// because a key that is not stable would be worse than none.
func DerivedKey(ctx context.Context, name string) string {
	r := runningIn(ctx, "DerivedKey")
	r.derived.Store(true)
	return r.derive(name)
}

// DerivedID returns the value that [DerivedKey] returns for this name, for an id that leaves this
// process only with the handler's own transaction: that of a message in an outbox, for example.
// After it the request can still be not-executed, so never give the id to another service. Package
// message uses the names that begin with "message/". DerivedID may be called from several
// goroutines, and panics outside an idempotent handler.
func DerivedID(ctx context.Context, name string) string {
	return runningIn(ctx, "DerivedID").derive(name)
}

// runningIn returns the attempt of the handler that called this function.
func runningIn(ctx context.Context, function string) *running {
	r, ok := ctx.Value(contextKey{}).(*running)
	if !ok {
		panic(UsageError("idempotency: " + function + " outside an idempotent handler: pass the request's context on"))
	}
	return r
}

// HandlerContext returns a context like that of the handler of a request with this key, for
// packages that run handlers without an [Engine], such as package consumer: [KeyFrom],
// [AttemptIDFrom], [DerivedKey] and [DerivedID] work in it. The service is that of
// [Options.Service].
func HandlerContext(ctx context.Context, service string, key Key, attempt AttemptID) context.Context {
	return &attemptContext{Context: ctx, running: running{key: key, attempt: attempt, service: service, derived: new(atomic.Bool)}}
}

// derive returns a derived key without marking the request.
func (r *running) derive(name string) string {
	var fields []byte
	if r.service == "" {
		fields = appendField(nil, "paidonce derived key 1")
	} else {
		fields = appendField(nil, "paidonce derived key 2")
		fields = appendField(fields, r.service)
	}
	fields = appendField(fields, r.key.Scope)
	fields = appendField(fields, r.key.Value)
	if r.key.Value == "" {
		fields = appendField(fields, r.attempt[:])
	}
	sum := sha256.Sum256(appendField(fields, name))
	var id AttemptID
	copy(id[:], sum[:])
	id[6] = id[6]&0x0f | 0x80
	id[8] = id[8]&0x3f | 0x80
	return id.String()
}

// UsageError is a mistake in the program that shows only when it runs: functions of this module
// panic with it. Its text names the remedy and contains no data.
type UsageError string

func (e UsageError) Error() string { return string(e) }

// PanicError is a panic of the handler, of a policy ([Options.Disposition], [Options.Reduce]) or of
// a [Tracer]; its text says which. The text contains an error of package runtime or a [UsageError]
// in full, and for any other value only its type: the value may hold the handler's data, so no log
// of this module has it. A [Tracer] that may show it finds it in Value:
//
//	func (reporter) TraceRequestEnd(_ context.Context, end idempotency.RequestEnd) {
//		var panicked *idempotency.PanicError
//		if errors.As(end.Result.Err, &panicked) {
//			report(panicked.Value, panicked.Stack)
//		}
//	}
type PanicError struct {
	Value any
	Stack []byte // the goroutine's stack at the panic

	whose string // empty: the handler
}

func (p *PanicError) Error() string {
	whose := "handler"
	if p.whose != "" {
		whose = p.whose
	}
	err, ok := p.Value.(error)
	if _, ours := err.(UsageError); ok && (ours || ofRuntime(err)) {
		return whose + " panicked: " + err.Error()
	}
	return fmt.Sprintf("%s panicked with a %T", whose, p.Value)
}

// ofRuntime reports whether an error's type is one of package runtime. The methods of runtime.Error
// are not enough: the text of any other type comes from the service.
func ofRuntime(err error) bool {
	t := reflect.TypeOf(err)
	if t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	return t.PkgPath() == "runtime"
}

// Unwrap returns the value of a handler's panic if it is an error. A panic of a policy or a tracer
// must not pass for the handler's.
func (p *PanicError) Unwrap() error {
	if p.whose != "" {
		return nil
	}
	err, _ := p.Value.(error)
	return err
}
