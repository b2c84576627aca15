package fiberidem_test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"

	"github.com/gofiber/fiber/v3"

	fiberidem "github.com/paidonce/idempotency/contrib/fiber3"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
)

// A retry gets the first answer, and the handler does not run. An error that the handler returns is
// recorded as Fiber renders it. The memory store is for tests: a service uses storage/postgres.
func ExampleMiddleware() {
	idem := middleware.New(memory.New(nil), func(*http.Request) (string, error) { return "acme", nil }, nil)
	app := fiber.New()
	payments := 0
	app.Post("/payments", fiberidem.Middleware(idem), func(c fiber.Ctx) error {
		payments++
		if payments > 1 {
			return fiber.NewError(fiber.StatusPaymentRequired, "the account is empty")
		}
		return c.Status(fiber.StatusCreated).JSON(fiber.Map{"id": payments})
	})

	for _, key := range []string{"8e03978e", "8e03978e", "5a0c2f11", "5a0c2f11"} {
		r := httptest.NewRequest(http.MethodPost, "/payments", nil)
		r.Header.Set("Idempotency-Key", key)
		response, err := app.Test(r)
		if err != nil {
			panic(err)
		}
		body, _ := io.ReadAll(response.Body)
		fmt.Println(response.StatusCode, response.Header.Get("Idempotency-Status"), string(body))
	}
	// Output:
	// 201 executed {"id":1}
	// 201 replayed {"id":1}
	// 402 executed the account is empty
	// 402 replayed the account is empty
}
