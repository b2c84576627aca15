package bank

import (
	"net/http"

	"github.com/paidonce/idempotency/middleware"
)

// tenantPublic is the tenant of requests without an Authorization header.
const tenantPublic = "public"

// challenge is the WWW-Authenticate header of a 401.
const challenge = `Bearer realm="demo-bank"`

// ErrTenantUnknown means that the request's Authorization header does not name one known tenant.
var ErrTenantUnknown error = &middleware.StatusError{
	Status: http.StatusUnauthorized, Detail: "The token in the Authorization header is not known here.", Challenge: challenge,
}

// Tenant is a middleware.ScopeFunc. The scope is the account behind the token, not the token, so
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

// requireTenant refuses requests of unknown tenants, on routes without the idempotency middleware.
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
