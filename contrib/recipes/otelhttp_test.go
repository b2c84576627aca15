package recipes

import (
	"net/http"
	"testing"

	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"

	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/mwtest"
)

func tracing(idem *middleware.Middleware, pay http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("POST /payments/{account}", idem.Handler(pay))
	return otelhttp.NewHandler(mux, "payments")
}

func TestTracingOutside(t *testing.T) {
	t.Parallel()
	mwtest.Run(t, noErrors, func(s *mwtest.Service) string {
		return s.Serve(payments(tracing(s.Middleware, s.Handler)))
	})
}
