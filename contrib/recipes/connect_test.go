package recipes

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/mwtest"
)

const connectPay = "/payments.v1.Payments/Pay"

// connectService works for calls by Connect's own protocol.
func connectService(idem *middleware.Middleware, pay http.Handler) http.Handler {
	idem = idem.With(func(o *middleware.Options) { o.Disposition = forgetConnectAborted })
	mux := http.NewServeMux()
	mux.Handle(connectPay, idem.Handler(pay))
	return mux
}

// forgetConnectAborted lets a retry run after Aborted, which is a 409 as AlreadyExists is.
func forgetConnectAborted(answer idempotency.Answer) idempotency.Disposition {
	var body struct{ Code string }
	if answer.Status == http.StatusConflict && json.Unmarshal(answer.Body, &body) == nil && body.Code == connect.CodeAborted.String() {
		return idempotency.DispositionForget
	}
	return idempotency.DefaultDisposition(answer)
}

// serveConnect serves a service whose calls pay, and return an error with the code in their request,
// if there is one. It returns the service's log.
func serveConnect(t *testing.T) (s *mwtest.Service, server *httptest.Server, log *strings.Builder) {
	t.Helper()
	log = &strings.Builder{}
	s = mwtest.New(t, func(o *middleware.Options) { o.Logger = slog.New(slog.NewTextHandler(log, nil)) })
	pay := connect.NewUnaryHandlerSimple(connectPay, func(ctx context.Context, code *wrapperspb.UInt32Value) (*wrapperspb.StringValue, error) {
		if err := s.Store.Write(ctx); err != nil {
			return nil, err
		}
		if code.Value != 0 {
			return nil, connect.NewError(connect.Code(code.Value), errors.New("declined"))
		}
		return wrapperspb.String("paid"), nil
	})
	server = httptest.NewUnstartedServer(connectService(s.Middleware, pay))
	server.EnableHTTP2 = true // for gRPC
	server.StartTLS()
	t.Cleanup(server.Close)
	return s, server, log
}

// callConnect calls the service and returns its answer and the outcome.
func callConnect(t *testing.T, server *httptest.Server, key string, code connect.Code, protocol ...connect.ClientOption) (answer string, outcome idempotency.Outcome) {
	t.Helper()
	client := connect.NewClient[wrapperspb.UInt32Value, wrapperspb.StringValue](server.Client(), server.URL+connectPay, append(protocol, connect.WithAcceptCompression("gzip", nil, nil))...)
	request := connect.NewRequest(wrapperspb.UInt32(uint32(code)))
	request.Header().Set("Idempotency-Key", key)
	response, err := client.CallUnary(t.Context(), request)
	var failed *connect.Error
	switch {
	case err == nil:
		return response.Msg.Value, idempotency.Outcome(response.Header().Get("Idempotency-Status"))
	case errors.As(err, &failed):
		return failed.Code().String(), idempotency.Outcome(failed.Meta().Get("Idempotency-Status"))
	}
	t.Fatal(err)
	return "", ""
}

func TestConnect(t *testing.T) {
	t.Parallel()
	s, server, _ := serveConnect(t)
	for _, c := range []struct {
		name    string
		code    connect.Code
		answer  string
		retried idempotency.Outcome
		written int
	}{
		{"ok", 0, "paid", idempotency.OutcomeReplayed, 1},
		{"failed precondition", connect.CodeFailedPrecondition, "failed_precondition", idempotency.OutcomeReplayed, 0},
		{"already exists", connect.CodeAlreadyExists, "already_exists", idempotency.OutcomeReplayed, 0},
		{"aborted", connect.CodeAborted, "aborted", idempotency.OutcomeNotExecuted, 0},
		{"canceled", connect.CodeCanceled, "canceled", idempotency.OutcomeNotExecuted, 0},
		{"internal", connect.CodeInternal, "internal", idempotency.OutcomeNotExecuted, 0},
	} {
		before := s.Store.Written()
		for run := range 2 {
			want := idempotency.OutcomeExecuted
			if c.retried != idempotency.OutcomeReplayed || run == 1 {
				want = c.retried
			}
			if answer, outcome := callConnect(t, server, strings.ReplaceAll(c.name, " ", "-"), c.code); answer != c.answer || outcome != want {
				t.Errorf("%s: %s %s, want %s %s", c.name, answer, outcome, c.answer, want)
			}
		}
		if written := s.Store.Written() - before; written != c.written {
			t.Errorf("%s: %d writes, want %d", c.name, written, c.written)
		}
	}
}

// Connect serves gRPC and gRPC-Web on the same route. Their errors are trailers of a 200, which
// would be committed. Both are refused, no handler runs, and the log names the interceptor.
func TestConnectsOtherProtocolsAreRefused(t *testing.T) {
	t.Parallel()
	for name, protocol := range map[string]connect.ClientOption{"gRPC": connect.WithGRPC(), "gRPC-Web": connect.WithGRPCWeb()} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, server, log := serveConnect(t)
			for _, code := range []connect.Code{0, connect.CodeFailedPrecondition, connect.CodeInternal} {
				for range 2 {
					if answer, _ := callConnect(t, server, "key-1", code, protocol); answer == "paid" || answer == code.String() {
						t.Errorf("the client got %s", answer)
					}
				}
			}
			if ends := s.Store.Ends(); len(ends) != 0 || s.Store.Written() != 0 {
				t.Errorf("%v, %d writes, want none", ends, s.Store.Written())
			}
			if !strings.Contains(log.String(), "contrib/grpc") {
				t.Errorf("the log does not name the interceptor: %s", log)
			}
		})
	}
}
