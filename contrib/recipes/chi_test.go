package recipes

import (
	"net/http"
	"testing"

	"github.com/go-chi/chi/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/chiroute"
	"github.com/paidonce/idempotency/middleware/mwtest"
)

func chiRouter(idem *middleware.Middleware, pay http.HandlerFunc) http.Handler {
	idem = idem.With(func(o *middleware.Options) { o.RouterState = chiroute.State })
	router := chi.NewRouter()
	router.With(idem.Handler).Post("/payments/{account}", pay)
	return router
}

func TestChi(t *testing.T) {
	t.Parallel()
	mwtest.Run(t, noErrors, func(s *mwtest.Service) string {
		return s.Serve(payments(chiRouter(s.Middleware, s.Handler.ServeHTTP)))
	})
}

// With the whole router inside, chi routes each run again.
func TestChiInside(t *testing.T) {
	t.Parallel()
	mwtest.Run(t, noErrors, func(s *mwtest.Service) string {
		router := chi.NewRouter()
		router.Method("POST", mwtest.Prefix+"{do}", s.Handler)
		return s.Serve(s.Middleware.Handler(router))
	})
}

// Without chiroute.State a handler can't run again: its request is refused, and leaves nothing.
func TestChiWithoutRouterState(t *testing.T) {
	t.Parallel()
	s := mwtest.New(t, nil)
	router := chi.NewRouter()
	router.With(s.Middleware.Handler).Method("POST", mwtest.Prefix+"{do}", s.Handler)
	s.Store.FailCommits(idempotency.ErrNotSerializable)
	got := s.Send(s.Serve(router), mwtest.Answer, "key-1")
	if got.Status != http.StatusServiceUnavailable || got.Outcome != string(idempotency.OutcomeNotExecuted) || s.Store.Written() != 0 {
		t.Errorf("%v with %d writes, want 503, %s, none", got, s.Store.Written(), idempotency.OutcomeNotExecuted)
	}
}
