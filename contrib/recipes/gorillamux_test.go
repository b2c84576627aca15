package recipes

import (
	"net/http"
	"testing"

	"github.com/gorilla/mux"

	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/mwtest"
)

func gorillaMux(idem *middleware.Middleware, pay http.Handler) http.Handler {
	router := mux.NewRouter()
	router.Handle("/payments/{account}", idem.Handler(pay)).Methods("POST")
	return router
}

func TestGorillaMux(t *testing.T) {
	t.Parallel()
	mwtest.Run(t, noErrors, func(s *mwtest.Service) string {
		return s.Serve(payments(gorillaMux(s.Middleware, wantParameter(s, func(r *http.Request) string { return mux.Vars(r)["account"] }))))
	})
}
