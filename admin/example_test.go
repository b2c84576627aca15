package admin_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/admin"
	"github.com/paidonce/idempotency/storage/postgres"
)

// The page is mounted behind the service's own authentication. Support may look; the engineers on
// call may act.
func ExampleNew() {
	ctx := context.Background()
	pool, err := pgxpool.New(ctx, os.Getenv("DATABASE_URL")) // connects at the first use
	if err != nil {
		panic(err)
	}
	defer pool.Close()

	authorize := func(r *http.Request, want admin.Permission) (string, error) {
		user, groups := signedInUser(r)
		switch {
		case user == "":
			return "", admin.ErrUnauthenticated
		case groups["on-call"], groups["support"] && want == admin.PermissionView:
			return user, nil
		}
		return "", errors.New("neither in support nor on call")
	}
	records := admin.New(postgres.New(pool, nil), authorize, &admin.Options{Title: "payments, production"})
	mux := http.NewServeMux()
	mux.Handle("/ops/keys/", http.StripPrefix("/ops/keys", records))

	request := httptest.NewRequest(http.MethodGet, "/ops/keys/", nil) // from an unknown user
	answer := httptest.NewRecorder()
	mux.ServeHTTP(answer, request)
	fmt.Println(answer.Code, answer.Header().Get("Referrer-Policy"))
	// Output: 401 no-referrer
}

// signedInUser stands for the result of the service's own authentication.
func signedInUser(*http.Request) (user string, groups map[string]bool) { return "", nil }
