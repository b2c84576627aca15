package ginidem_test

import (
	"fmt"
	"net/http"

	"github.com/gin-gonic/gin"

	ginidem "github.com/paidonce/idempotency/contrib/gin"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
)

// A retry gets the first answer, and the handler does not run. The memory store is for tests: a
// service uses storage/postgres.
func ExampleMiddleware() {
	idem := middleware.New(memory.New(nil), func(*http.Request) (string, error) { return "acme", nil }, nil)
	router := gin.New()
	payments := 0
	router.POST("/payments", ginidem.Middleware(idem), func(c *gin.Context) {
		payments++
		c.JSON(http.StatusCreated, gin.H{"id": payments})
	})

	fmt.Println(send(router, "/payments", "8e03978e"))
	fmt.Println(send(router, "/payments", "8e03978e"))
	fmt.Println(send(router, "/payments", "5a0c2f11"))
	// Output:
	// 201 executed {"id":1}
	// 201 replayed {"id":1}
	// 201 executed {"id":2}
}
