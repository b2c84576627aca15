package grpcidem

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strconv"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/contrib/grpc/rpc"
)

// NewClient returns an interceptor that gives each unary call a key, and makes it until its outcome
// is known. It is a [client.Transport] for calls: the rules of docs/client.md hold, with the code
// of an error as its HTTP status (rpc.HTTPStatus).
//
//	conn, err := grpc.NewClient(address, grpc.WithChainUnaryInterceptor(
//		grpcidem.NewClient(&client.Options{Honours: client.Everywhere})))
//
// Methods with idempotency_level = NO_SIDE_EFFECTS, and those of gRPC's own services, are called
// once and without a key. The key is the call's own metadata idempotency-key, else the message's
// request_id, else that of [client.WithKey] or [client.WithNewKey], else a new one.
//
// A call without an answer returns an error that wraps a *[client.Error]: [client.ErrNotExecuted]
// is proven, and after [client.ErrUnknown] the caller must continue with the key. The error's code
// is that of the context's error, InvalidArgument if the key is invalid, and otherwise Unavailable:
// a code that means a definite failure would be untrue. Any other error is the server's own.
//
// In opts Honours gets a POST request for https://target/service/method. Methods, BareKeys,
// PreferAsync and Intents are for HTTP: the last two panic. TotalMax and the like bound a call, and
// so does its context. The reply's size is bounded by grpc.MaxCallRecvMsgSize and not by
// AnswerBytesMax. BodyBytesMax bounds nothing.
//
// Put the interceptor outside of others, and let no other retry. If a retryPolicy in the service
// config retries, the interceptor notices, and counts those attempts as possibly executed.
func NewClient(opts *client.Options) grpc.UnaryClientInterceptor {
	var o client.Options
	if opts != nil {
		o = *opts
	}
	if o.Intents != nil || o.PreferAsync {
		panic("idempotency/contrib/grpc: NewClient can't keep Intents or PreferAsync: they are for HTTP")
	}
	o.Methods, o.BareKeys = nil, true
	transport := client.New(roundTripper{}, &o)
	return func(ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
		if keyless(method) {
			return invoke(ctx, method, req, reply, conn, options...)
		}
		attempt := &outgoing{method: method, req: req, reply: reply, conn: conn, invoke: invoke, options: options}
		r := attempt.request(context.WithValue(ctx, outgoingKey{}, attempt))
		if _, err := transport.RoundTrip(r); err != nil {
			return &callError{err}
		}
		return attempt.err
	}
}

// outgoing is one call, and the result of its latest attempt.
type outgoing struct {
	method     string
	req, reply any
	conn       *grpc.ClientConn
	invoke     grpc.UnaryInvoker
	options    []grpc.CallOption

	err error
}

type outgoingKey struct{}

// request returns the call as a request of package client. It has no body: the message stays here.
func (o *outgoing) request(ctx context.Context) *http.Request {
	r := &http.Request{
		Method: http.MethodPost, URL: &url.URL{Scheme: "https", Host: o.conn.Target(), Path: o.method}, Header: http.Header{}, Body: http.NoBody,
	}
	md, _ := metadata.FromOutgoingContext(ctx)
	if keys := md.Get(rpc.HeaderKey); len(keys) > 0 {
		r.Header[client.HeaderKey] = keys
	} else if message, ok := o.req.(proto.Message); ok {
		if key := rpc.FieldKey(message, rpc.KeyFieldDefault); key != "" {
			r.Header.Set(client.HeaderKey, key)
		}
	}
	return r.WithContext(ctx)
}

// roundTripper makes one attempt of the call in a request's context.
type roundTripper struct{}

// RoundTrip implements http.RoundTripper. It returns an answer if one came from the server's
// handler or interceptor, and an error if it is not known whether they got the call.
func (roundTripper) RoundTrip(r *http.Request) (*http.Response, error) {
	ctx := r.Context()
	o := ctx.Value(outgoingKey{}).(*outgoing)
	md, _ := metadata.FromOutgoingContext(ctx)
	md = md.Copy()
	md.Set(rpc.HeaderKey, r.Header.Get(client.HeaderKey))
	var header, trailer metadata.MD
	sent := &sentHook{trace: httptrace.ContextClientTrace(ctx)}
	options := append([]grpc.CallOption{grpc.Header(&header), grpc.Trailer(&trailer)}, sent.wrap(o.options)...)
	sent.trace.GetConn(r.URL.Host)
	o.err = o.invoke(metadata.NewOutgoingContext(ctx, md), o.method, o.req, o.reply, o.conn, options...)
	return responseOf(o.err, header, trailer)
}

// responseOf returns the answer of an attempt, or its error if no whole answer came.
func responseOf(err error, header, trailer metadata.MD) (*http.Response, error) {
	s := status.Convert(err)
	outcome := header.Get(rpc.HeaderStatus)
	switch {
	case len(outcome) > 0 && !whole(s.Code(), trailer):
		return nil, fmt.Errorf("the server's answer was lost or could not be read: %w", err)
	case err != nil && len(outcome) == 0 && len(trailer) == 0:
		return nil, err // gRPC made it in this process: no metadata came
	}
	response := &http.Response{StatusCode: rpc.HTTPStatus(code.Code(s.Code())), Header: http.Header{}, Body: http.NoBody}
	for _, value := range outcome {
		response.Header.Add("Idempotency-Status", value)
	}
	if refusal, ok := rpc.Refused(s.Proto()); ok {
		if refusal.RetryAfter > 0 {
			response.Header.Set("Retry-After", strconv.FormatFloat(refusal.RetryAfter.Seconds(), 'f', 3, 64))
		}
		document, err := json.Marshal(map[string]any{"type": "#" + string(refusal.Reason), "accepted": refusal.Accepted})
		if err != nil { // a string and a bool
			panic(err)
		}
		response.Header.Set("Content-Type", "application/problem+json")
		response.Body = io.NopCloser(strings.NewReader(string(document)))
	}
	return response, nil
}

// whole reports whether the server sent this code in the trailers, after its whole answer.
func whole(c codes.Code, trailer metadata.MD) bool {
	codes := trailer.Get(rpc.TrailerCode)
	return len(codes) == 1 && codes[0] == strconv.Itoa(int(c))
}

// sentHook reports to the client's trace when an attempt may be on a conn: gRPC calls its per-RPC
// credentials right before it writes the header. A second call means that gRPC retries by itself.
// It passes the caller's own credentials on.
type sentHook struct {
	trace *httptrace.ClientTrace
	inner credentials.PerRPCCredentials // nil if the caller has none
}

// wrap returns the call options with the hook in place of the caller's credentials.
func (h *sentHook) wrap(options []grpc.CallOption) []grpc.CallOption {
	var wrapped []grpc.CallOption
	for _, option := range options {
		if own, ok := option.(grpc.PerRPCCredsCallOption); ok {
			h.inner = own.Creds
			continue
		}
		wrapped = append(wrapped, option)
	}
	return append(wrapped, grpc.PerRPCCredentials(h))
}

// GetRequestMetadata implements credentials.PerRPCCredentials.
func (h *sentHook) GetRequestMetadata(ctx context.Context, uri ...string) (map[string]string, error) {
	var md map[string]string
	if h.inner != nil {
		var err error
		if md, err = h.inner.GetRequestMetadata(ctx, uri...); err != nil {
			return nil, err
		}
	}
	h.trace.GotConn(httptrace.GotConnInfo{})
	return md, nil
}

// RequireTransportSecurity implements credentials.PerRPCCredentials.
func (h *sentHook) RequireTransportSecurity() bool {
	return h.inner != nil && h.inner.RequireTransportSecurity()
}

// callError is the error of a call without an answer: a *client.Error with a code.
type callError struct{ error }

// Unwrap returns the *client.Error.
func (e *callError) Unwrap() error { return e.error }

// GRPCStatus returns the status for package status.
func (e *callError) GRPCStatus() *status.Status {
	c := codes.Unavailable
	switch {
	case errors.Is(e.error, context.DeadlineExceeded):
		c = codes.DeadlineExceeded
	case errors.Is(e.error, context.Canceled):
		c = codes.Canceled
	case errors.Is(e.error, idempotency.ErrKeyInvalid):
		c = codes.InvalidArgument
	}
	return status.New(c, e.Error())
}
