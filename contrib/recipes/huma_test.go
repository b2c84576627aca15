package recipes

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
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

// The context of the request inside is not enough: huma answers on the writer outside. If the
// operation has no body the handler runs. Nothing is recorded, its writes are undone, and the client
// gets no answer, instead of a 201 that is untrue.
func TestHumaWithTheWriterOutside(t *testing.T) {
	t.Parallel()
	var log strings.Builder
	logger := slog.New(slog.NewTextHandler(&log, nil))
	s := mwtest.New(t, func(o *middleware.Options) { o.Logger = logger })
	mux := http.NewServeMux()
	api := humago.New(mux, huma.DefaultConfig("payments", "1"))
	api.UseMiddleware(func(c huma.Context, next func(huma.Context)) {
		r, w := humago.Unwrap(c)
		s.Middleware.Handler(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			next(huma.WithContext(c, r.Context()))
		})).ServeHTTP(w, r)
	})
	pay := humaPay(s)
	huma.Post(api, "/payments/{account}", func(ctx context.Context, in *struct {
		Account string `path:"account"`
	},
	) (*payOut, error) {
		return pay(ctx, &payIn{Account: in.Account})
	})
	url := s.Serve(payments(mux))
	for run := range 2 {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url+mwtest.Prefix+string(mwtest.Answer), http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Idempotency-Key", "key-1")
		if response, err := (&http.Transport{DisableKeepAlives: true}).RoundTrip(r); err == nil {
			t.Errorf("the client got %s", response.Status)
			_ = response.Body.Close()
		}
		if s.Runs() != run+1 {
			t.Errorf("%d runs, want %d", s.Runs(), run+1)
		}
	}
	if ends := fmt.Sprint(s.Store.Ends()); ends != "[ROLLBACK ROLLBACK]" || s.Store.Written() != 0 {
		t.Errorf("%s, %d writes, want none", ends, s.Store.Written())
	}
	logger.Info("the end") // takes the lock of the server's own lines: a closed conn orders nothing
	if !strings.Contains(log.String(), "handler-failed") || !strings.Contains(log.String(), "writer outside") {
		t.Errorf("the log has %s", &log)
	}
}
