package recipes

import (
	"net/http"
	"strings"
	"testing"

	"github.com/rs/cors"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/mwtest"
)

func crossOrigin(idem *middleware.Middleware, pay http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("POST /payments/{account}", idem.Handler(pay))
	return cors.New(cors.Options{
		AllowedOrigins: []string{"https://shop.example", "https://app.example"},
		AllowedMethods: []string{"POST"},
		AllowedHeaders: []string{"Authorization", "Content-Type", "Idempotency-Key"}, // and Prefer, with Options.Accepted
		ExposedHeaders: []string{"Idempotency-Status", "Idempotent-Replayed", "Location", "Retry-After"},
	}).Handler(mux)
}

func TestCORSOutside(t *testing.T) {
	t.Parallel()
	mwtest.Run(t, noErrors, func(s *mwtest.Service) string {
		return s.Serve(payments(crossOrigin(s.Middleware, s.Handler)))
	})
}

// A page may send a key and read the outcome, of a replay to another origin and of a refusal too.
func TestPagesCanSendAKeyAndReadTheOutcome(t *testing.T) {
	t.Parallel()
	s := mwtest.New(t, nil)
	url := s.Serve(payments(crossOrigin(s.Middleware, s.Handler))) + mwtest.Prefix + string(mwtest.Answer)
	const shop, app = "https://shop.example", "https://app.example"

	preflight := send(t, http.MethodOptions, url, http.Header{
		"Origin": {shop}, "Access-Control-Request-Method": {"POST"}, "Access-Control-Request-Headers": {"authorization,content-type,idempotency-key"},
	})
	if preflight.status/100 != 2 || preflight.header.Get("Access-Control-Allow-Origin") != shop ||
		!strings.Contains(strings.ToLower(preflight.header.Get("Access-Control-Allow-Headers")), "idempotency-key") {
		t.Errorf("preflight: %d %v", preflight.status, preflight.header)
	}
	for _, c := range []struct{ origin, key, outcome string }{
		{shop, "key-1", string(idempotency.OutcomeExecuted)},
		{app, "key-1", string(idempotency.OutcomeReplayed)},
		{app, "a key", string(idempotency.OutcomeNotExecuted)},
	} {
		got := post(t, url, http.Header{"Origin": {c.origin}, "Idempotency-Key": {c.key}})
		if got.header.Get("Idempotency-Status") != c.outcome || got.header.Get("Access-Control-Allow-Origin") != c.origin {
			t.Errorf("%s from %s: %d %v", c.outcome, c.origin, got.status, got.header)
		}
		exposed := got.header.Get("Access-Control-Expose-Headers")
		for _, name := range []string{"Idempotency-Status", "Location", "Retry-After"} {
			if !strings.Contains(exposed, name) {
				t.Errorf("%s is not among the exposed headers %q", name, exposed)
			}
		}
	}
}
