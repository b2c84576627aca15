package server

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/http/httptrace"
	"sync/atomic"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/internal/crashpoint"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/observe"
	"github.com/paidonce/idempotency/storage/postgres"
)

// The crash points of requests that call the processor. A COMMIT is recognized by a statement of
// the store that is always sent with this COMMIT, and with no other.

// takeOverSQL is a part of the statement that takes an open request over.
const takeOverSQL = "epoch = epoch + 1"

const storeTables = `"` + bank.Schema + `"."`

// wirePoints are the points before or after a message with this SQL is sent to the database.
var wirePoints = map[string]struct {
	sql    string
	before bool
}{
	crashpoint.BeforeIntent: {`INSERT INTO ` + storeTables + postgres.EffectsTableName + `"`, true},
	crashpoint.IntentSent:   {`INSERT INTO ` + storeTables + postgres.EffectsTableName + `"`, false},
	crashpoint.ResultSent:   {`UPDATE ` + storeTables + postgres.EffectsTableName + `" SET state = `, false},
	crashpoint.BeforeEnd:    {`DELETE FROM ` + storeTables + postgres.OpenTableName + `"`, true},
	crashpoint.EndSent:      {`DELETE FROM ` + storeTables + postgres.OpenTableName + `"`, false},
	crashpoint.TakeOver:     {takeOverSQL, false},
}

// crashCall is in the context of each request to a route that calls the processor.
type crashCall struct {
	called  atomic.Bool
	batches atomic.Int64 // sent by its handler after the call
}

type crashCallKey struct{}

func crashCallFrom(ctx context.Context) *crashCall {
	r, _ := ctx.Value(crashCallKey{}).(*crashCall)
	return r
}

// batch is called before each batch of the handler: the first one reads, the second one writes.
func (r *crashCall) batch(point *CrashPoint) {
	switch {
	case !r.called.Load():
	case r.batches.Add(1) == 1:
		point.reached(crashpoint.AfterResult)
	default:
		point.reached(crashpoint.LastPhase)
	}
}

// trace adds the point to the options of a route that calls the processor. A nil point adds
// nothing.
func (p *CrashPoint) trace(o *middleware.Options) {
	if p != nil {
		o.Tracer = observe.Join(o.Tracer, &crashCallTracer{p})
	}
}

// crashCallTracer sees the calls of a request, and its end.
type crashCallTracer struct{ point *CrashPoint }

var _ idempotency.EffectTracer = (*crashCallTracer)(nil)

// TraceRequestStart implements [idempotency.Tracer].
func (t *crashCallTracer) TraceRequestStart(ctx context.Context, _ idempotency.RequestStart) context.Context {
	return context.WithValue(ctx, crashCallKey{}, new(crashCall))
}

// TraceEffect implements [idempotency.EffectTracer].
func (t *crashCallTracer) TraceEffect(ctx context.Context, end idempotency.EffectEnd) {
	if r := crashCallFrom(ctx); r != nil && end.Result != idempotency.EffectResultFailed {
		r.called.Store(true)
	}
}

// TraceStep implements [idempotency.Tracer].
func (t *crashCallTracer) TraceStep(ctx context.Context, step idempotency.StepEnd) {
	ended := step.Err == nil && (step.Step == idempotency.StepCommit || step.Step == idempotency.StepDecline)
	if r := crashCallFrom(ctx); ended && r != nil && r.called.Load() {
		t.point.reached(crashpoint.AfterEnd)
	}
}

// TraceRequestEnd implements [idempotency.Tracer].
func (*crashCallTracer) TraceRequestEnd(context.Context, idempotency.RequestEnd) {}

// TraceRefused implements [idempotency.Tracer].
func (*crashCallTracer) TraceRefused(context.Context, idempotency.Refused) {}

type completingKey struct{}

// completing marks the context of the completer. A nil point marks nothing.
func (p *CrashPoint) completing(ctx context.Context) context.Context {
	if p == nil {
		return ctx
	}
	return context.WithValue(ctx, completingKey{}, true)
}

func completes(ctx context.Context) bool { return ctx.Value(completingKey{}) != nil }

// transport returns the transport of the bank's calls to its processor. It is nil without a point.
func (p *CrashPoint) transport() http.RoundTripper {
	if p == nil {
		return nil
	}
	return &crashTransport{RoundTripper: bank.NewTransport(), point: p}
}

// crashTransport can kill the process around a request that writes.
type crashTransport struct {
	http.RoundTripper
	point *CrashPoint
}

// RoundTrip implements [http.RoundTripper].
func (t *crashTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if r.Method != http.MethodPost {
		return t.RoundTripper.RoundTrip(r)
	}
	t.point.reached(crashpoint.BeforeSend)
	r = r.WithContext(httptrace.WithClientTrace(r.Context(), &httptrace.ClientTrace{
		WroteRequest: func(info httptrace.WroteRequestInfo) {
			if info.Err == nil {
				t.point.reached(crashpoint.InCall)
			}
		},
	}))
	response, err := t.RoundTripper.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	body, err := io.ReadAll(response.Body)
	_ = response.Body.Close()
	if err != nil {
		return nil, err
	}
	t.point.reached(crashpoint.AfterReply)
	response.Body = io.NopCloser(bytes.NewReader(body))
	return response, nil
}
