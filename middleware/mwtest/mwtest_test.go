package mwtest_test

import (
	"net/http"
	"testing"

	"github.com/go-chi/chi/v5"

	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/chiroute"
	"github.com/paidonce/idempotency/middleware/mwtest"
)

func TestServeMux(t *testing.T) {
	t.Parallel()
	mwtest.Run(t, mwtest.Features{NoReturnedErrors: true}, func(s *mwtest.Service) string {
		mux := http.NewServeMux()
		mux.Handle("POST "+mwtest.Prefix+"{do}", s.Middleware.Handler(s.Handler))
		return s.Serve(mux)
	})
}

func TestWholeMuxInside(t *testing.T) {
	t.Parallel()
	mwtest.Run(t, mwtest.Features{NoReturnedErrors: true}, func(s *mwtest.Service) string {
		mux := http.NewServeMux()
		mux.Handle("POST "+mwtest.Prefix+"{do}", s.Handler)
		return s.Serve(s.Middleware.Handler(mux))
	})
}

func TestChi(t *testing.T) {
	t.Parallel()
	mwtest.Run(t, mwtest.Features{NoReturnedErrors: true}, func(s *mwtest.Service) string {
		idem := s.Middleware.With(func(o *middleware.Options) { o.RouterState = chiroute.State })
		router := chi.NewRouter()
		router.With(idem.Handler).Method("POST", mwtest.Prefix+"{do}", s.Handler)
		return s.Serve(router)
	})
}
