package recipes

import (
	"net/http"
	"testing"

	"github.com/julienschmidt/httprouter"

	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/mwtest"
)

func httpRouter(idem *middleware.Middleware, pay httprouter.Handle) http.Handler {
	router := httprouter.New()
	router.POST("/payments/:account", func(w http.ResponseWriter, r *http.Request, p httprouter.Params) {
		idem.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { pay(w, r, p) })).ServeHTTP(w, r)
	})
	return router
}

// httpRouterHandler is for a handler of net/http, which finds httprouter's parameters in its context.
func httpRouterHandler(idem *middleware.Middleware, pay http.Handler) http.Handler {
	router := httprouter.New()
	router.Handler("POST", "/payments/:account", idem.Handler(pay))
	return router
}

func TestHTTPRouter(t *testing.T) {
	t.Parallel()
	mwtest.Run(t, noErrors, func(s *mwtest.Service) string {
		return s.Serve(payments(httpRouter(s.Middleware, func(w http.ResponseWriter, r *http.Request, p httprouter.Params) {
			wantParameter(s, func(*http.Request) string { return p.ByName("account") }).ServeHTTP(w, r)
		})))
	})
}

func TestHTTPRouterWithHandlersOfNetHTTP(t *testing.T) {
	t.Parallel()
	mwtest.Run(t, noErrors, func(s *mwtest.Service) string {
		return s.Serve(payments(httpRouterHandler(s.Middleware, wantParameter(s, func(r *http.Request) string {
			return httprouter.ParamsFromContext(r.Context()).ByName("account")
		}))))
	})
}
