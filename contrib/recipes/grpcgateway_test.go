package recipes

import (
	"context"
	"encoding/json"
	"net/http"
	"testing"

	"github.com/grpc-ecosystem/grpc-gateway/v2/runtime"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/contrib/recipes/internal/paymentpb"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/mwtest"
)

func grpcGateway(ctx context.Context, idem *middleware.Middleware, server paymentpb.PaymentsServer) (http.Handler, error) {
	idem = idem.With(func(o *middleware.Options) { o.Disposition = forgetAborted })
	gateway := runtime.NewServeMux()
	err := paymentpb.RegisterPaymentsHandlerServer(ctx, gateway, server) // in process
	return idem.Handler(gateway), err
}

// forgetAborted lets a retry run after Aborted, which is a 409 as AlreadyExists is.
func forgetAborted(answer idempotency.Answer) idempotency.Disposition {
	var body struct{ Code codes.Code }
	if answer.Status == http.StatusConflict && json.Unmarshal(answer.Body, &body) == nil && body.Code == codes.Aborted {
		return idempotency.DispositionForget
	}
	return idempotency.DefaultDisposition(answer)
}

// gatewayServer is the suite's handler as a server of gRPC.
type gatewayServer struct {
	paymentpb.UnimplementedPaymentsServer
	s     *mwtest.Service
	final codes.Code
}

func (server gatewayServer) Pay(ctx context.Context, request *paymentpb.PayRequest) (*paymentpb.Payment, error) {
	probe := server.s.Probe(ctx, request.GetAccount(), []byte(request.GetToken()))
	switch probe.Do {
	case mwtest.FinalError:
		return nil, status.Error(server.final, "declined")
	case mwtest.ReturnError:
		return nil, probe.Err
	case mwtest.AnswerThenError:
		return &paymentpb.Payment{Id: probe.ID}, probe.Err
	}
	return &paymentpb.Payment{Id: probe.ID}, nil
}

func TestGRPCGateway(t *testing.T) {
	t.Parallel()
	features := typed
	features.AlwaysAnswers, features.NoStatusOnly, features.NoLocation = true, true, true
	mwtest.Run(t, features, func(s *mwtest.Service) string {
		return s.Serve(payments(gateway(t, s, codes.FailedPrecondition)))
	})
}

// Aborted and Canceled are forgotten: a retry runs.
func TestGRPCGatewayForgets(t *testing.T) {
	t.Parallel()
	for _, code := range []codes.Code{codes.Aborted, codes.Canceled} {
		s := mwtest.New(t, nil)
		url := s.Serve(payments(gateway(t, s, code)))
		for run := range 2 {
			got := s.Send(url, mwtest.FinalError, "key-1")
			if got.Status/100 != 4 || got.Outcome != string(idempotency.OutcomeNotExecuted) || s.Runs() != run+1 {
				t.Errorf("%v: %v and %d runs, want 4xx, %s and %d", code, got, s.Runs(), idempotency.OutcomeNotExecuted, run+1)
			}
		}
	}
}

func gateway(t *testing.T, s *mwtest.Service, final codes.Code) http.Handler {
	t.Helper()
	handler, err := grpcGateway(t.Context(), s.Middleware, gatewayServer{s: s, final: final})
	if err != nil {
		t.Fatal(err)
	}
	return handler
}
