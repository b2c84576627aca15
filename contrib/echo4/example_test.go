package echoidem_test

import (
	"fmt"
	"net/http"

	"github.com/labstack/echo/v4"

	echoidem "github.com/paidonce/idempotency/contrib/echo4"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
)

// A retry gets the first answer, and the handler does not run. An error that the handler returns is
// recorded as Echo renders it. The memory store is for tests: a service uses storage/postgres.
func ExampleMiddleware() {
	idem := middleware.New(memory.New(nil), func(*http.Request) (string, error) { return "acme", nil }, nil)
	e := echo.New()
	payments := 0
	e.POST("/payments", func(c echo.Context) error {
		payments++
		if payments > 1 {
			return echo.NewHTTPError(http.StatusPaymentRequired, "the account is empty")
		}
		return c.String(http.StatusCreated, fmt.Sprintln("payment", payments))
	}, echoidem.Middleware(idem))

	fmt.Print(send(e, "/payments", "8e03978e"))
	fmt.Print(send(e, "/payments", "8e03978e"))
	fmt.Print(send(e, "/payments", "5a0c2f11"))
	fmt.Print(send(e, "/payments", "5a0c2f11"))
	// Output:
	// 201 executed payment 1
	// 201 replayed payment 1
	// 402 executed {"message":"the account is empty"}
	// 402 replayed {"message":"the account is empty"}
}
