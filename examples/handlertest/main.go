// Command handlertest serves the handler that handler_test.go tests, with the memory store. It
// keeps nothing after it exits.
//
//	go test ./examples/handlertest
//	go run ./examples/handlertest
package main

import (
	"context"
	"crypto/rand"
	"fmt"

	"github.com/paidonce/idempotency/storage/memory"
)

func main() { start("handlertest", "127.0.0.1:8084", run) }

func run(ctx context.Context, address string) error {
	books := &memoryBooks{balances: map[string]int64{"alice": 10000}}
	return serve(ctx, address, newHandler(memory.New(nil), books), greet)
}

// greet prints lines to try. It prints the same line twice on purpose: both have the same key.
func greet(url string) {
	curl := fmt.Sprintf(`curl -i %s/transfers -H 'Account: alice' -H 'Idempotency-Key: %s' -d '{"to":"bob","amount":1250}'`, url, rand.Text())
	fmt.Printf(`handlertest is at %s
It keeps nothing: records and money are in memory, and at exit both are gone. In production that pays twice.

Send a transfer: 201, Idempotency-Status: executed
  %s
Send it again: 201, Idempotency-Status: replayed, and the same bytes
  %s
`, url, curl, curl)
}
