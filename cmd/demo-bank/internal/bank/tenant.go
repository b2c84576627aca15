package bank

import (
	"net/http"

	"github.com/paidonce/idempotency/middleware"
)

// tenantPublic is who calls without saying who.
const tenantPublic = "public"

// challenge tells a caller how to say who it is.
const challenge = `Bearer realm="demo-bank"`

// ErrTenantUnknown means that the request's token is nobody's.
var ErrTenantUnknown error = &middleware.StatusError{
	Status: http.StatusUnauthorized, Detail: "The token in the Authorization header is not known here.", Challenge: challenge,
}

// Tenant is a middleware.ScopeFunc: who sends the request is whose key it is. It is the account behind the token and not the token, so
// that a new token finds the same keys.
func Tenant(r *http.Request) (string, error) {
	headers := r.Header.Values("Authorization")
	if len(headers) == 0 {
		return tenantPublic, nil
	}
	if len(headers) == 1 {
		switch headers[0] {
		case "Bearer demo-acme":
			return "acme", nil
		case "Bearer demo-globex":
			return "globex", nil
		}
	}
	return "", ErrTenantUnknown
}

// requireTenant refuses requests of nobody that the idempotency middleware does not see.
func (b *Bank) requireTenant(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := Tenant(r); err != nil {
			w.Header().Set("WWW-Authenticate", challenge)
			WriteProblem(w, refusal(http.StatusUnauthorized, "unauthorized", "Who are you?", err.Error()))
			return
		}
		next.ServeHTTP(w, r)
	})
}
