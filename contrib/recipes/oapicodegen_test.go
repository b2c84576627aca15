package recipes

import (
	"context"
	"errors"
	"net/http"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/contrib/recipes/internal/paymentapi"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/mwtest"
)

func oapiCodegen(idem *middleware.Middleware, server paymentapi.StrictServerInterface) http.Handler {
	return paymentapi.HandlerWithOptions(paymentapi.NewStrictHandler(server, nil), paymentapi.StdHTTPServerOptions{
		Middlewares: []paymentapi.MiddlewareFunc{idem.Handler},
	})
}

// oapiServer is the suite's handler as a strict server.
type oapiServer struct{ s *mwtest.Service }

func (server oapiServer) Pay(ctx context.Context, request paymentapi.PayRequestObject) (paymentapi.PayResponseObject, error) {
	probe := server.s.Probe(ctx, request.Account, []byte(request.Body.Token))
	switch probe.Do {
	case mwtest.Answer:
		paid := paymentapi.Pay201JSONResponse{Headers: paymentapi.Pay201ResponseHeaders{Location: probe.Location}}
		paid.Body.Id = probe.ID
		return paid, nil
	case mwtest.StatusOnly:
		return paymentapi.Pay204Response{}, nil
	case mwtest.FinalError:
		return paymentapi.Pay402Response{}, nil
	case mwtest.ReturnError:
		return nil, probe.Err
	case mwtest.AnswerThenError:
		return paymentapi.Pay204Response{}, probe.Err
	}
	return nil, nil
}

func TestOAPICodegen(t *testing.T) {
	t.Parallel()
	mwtest.Run(t, typed, func(s *mwtest.Service) string {
		return s.Serve(payments(oapiCodegen(s.Middleware, oapiServer{s})))
	})
}

// A StrictMiddlewareFunc runs after the body was decoded: every request is refused.
func TestOAPICodegenAsStrictMiddleware(t *testing.T) {
	t.Parallel()
	s := mwtest.New(t, nil)
	wrong := func(next paymentapi.StrictHandlerFunc, _ string) paymentapi.StrictHandlerFunc {
		return func(ctx context.Context, w http.ResponseWriter, r *http.Request, request any) (response any, err error) {
			err = errors.New("refused")
			s.Middleware.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				response, err = next(r.Context(), w, r, request)
			})).ServeHTTP(w, r)
			return response, err
		}
	}
	handler := paymentapi.Handler(paymentapi.NewStrictHandler(oapiServer{s}, []paymentapi.StrictMiddlewareFunc{wrong}))
	got := s.Send(s.Serve(payments(handler)), mwtest.Answer, "key-1")
	if got.Status < 400 || got.Outcome != string(idempotency.OutcomeNotExecuted) || s.Runs() != 0 {
		t.Errorf("%v and %d runs, want a refusal and none", got, s.Runs())
	}
}
