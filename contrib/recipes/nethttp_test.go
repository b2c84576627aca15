package recipes

import (
	"net/http"
	"testing"

	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/mwtest"
)

func netHTTP(idem *middleware.Middleware, pay http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("POST /payments/{account}", idem.Handler(pay))
	return mux
}

func TestNetHTTP(t *testing.T) {
	t.Parallel()
	mwtest.Run(t, noErrors, func(s *mwtest.Service) string {
		return s.Serve(payments(netHTTP(s.Middleware, s.Handler)))
	})
}
