package recipes

import (
	"context"
	"net/http"
	"testing"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"

	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/mwtest"
)

func humaAPI(idem *middleware.Middleware, pay func(ctx context.Context, in *payIn) (*payOut, error)) http.Handler {
	mux := http.NewServeMux()
	api := humago.New(mux, huma.DefaultConfig("payments", "1"))
	api.UseMiddleware(func(c huma.Context, next func(huma.Context)) {
		r, w := humago.Unwrap(c)
		idem.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			next(humago.NewContext(c.Operation(), r, w))
		})).ServeHTTP(w, r)
	})
	huma.Post(api, "/payments/{account}", pay)
	return mux
}

type payIn struct {
	Account string `path:"account"`
	Body    struct {
		Amount  int64  `json:"amount"`
		Token   string `json:"token"`
		Padding string `json:"padding,omitempty"`
	}
}

type payOut struct {
	Status   int
	Location string `header:"Location"`
	Body     *payment
}

type payment struct {
	ID string `json:"id"`
}

// humaPay is the suite's handler in huma.
func humaPay(s *mwtest.Service) func(ctx context.Context, in *payIn) (*payOut, error) {
	return func(ctx context.Context, in *payIn) (*payOut, error) {
		probe := s.Probe(ctx, in.Account, []byte(in.Body.Token))
		switch probe.Do {
		case mwtest.Answer:
			return &payOut{Status: probe.Status, Location: probe.Location, Body: &payment{ID: probe.ID}}, nil
		case mwtest.StatusOnly:
			return &payOut{Status: probe.Status}, nil
		case mwtest.FinalError:
			return nil, huma.NewError(probe.Status, "declined")
		case mwtest.ReturnError:
			return nil, probe.Err
		case mwtest.AnswerThenError:
			return &payOut{Status: probe.Status, Body: &payment{ID: probe.ID}}, probe.Err
		}
		return nil, nil
	}
}

func TestHuma(t *testing.T) {
	t.Parallel()
	features := typed
	features.AlwaysAnswers = true
	mwtest.Run(t, features, func(s *mwtest.Service) string {
		return s.Serve(payments(humaAPI(s.Middleware, humaPay(s))))
	})
}
