package idempotency_test

import (
	"context"
	"errors"
	"fmt"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/memory"
)

// The engine without net/http: a message that is delivered twice has one effect.
func ExampleEngine_Do() {
	engine := idempotency.NewEngine(memory.New(nil), nil)
	balance := 100
	deliver := func(amount int) {
		body := fmt.Appendf(nil, "%d", amount)
		request := idempotency.Request{
			Key:         idempotency.Key{Scope: "acme", Value: "message-1"},
			Fingerprint: idempotency.NewFingerprint(100, body),
		}
		result := engine.Do(context.Background(), request, func(context.Context) (*idempotency.Answer, error) {
			balance -= amount
			return &idempotency.Answer{Status: 200, Body: body}, nil
		})
		if result.Answer == nil {
			fmt.Println(result.Outcome, result.Reason)
			return
		}
		fmt.Println(result.Outcome, string(result.Answer.Body))
	}
	deliver(10)
	deliver(10)
	deliver(90)
	fmt.Println("balance:", balance)
	// Output:
	// executed 10
	// replayed 10
	// mismatch key-reused
	// balance: 90
}

// A handler that calls another service passes on a derived key, which is the same for every
// attempt. The first run's answer is not recorded, and the other service may have acted, so the
// outcome is unknown: the client retries with the same key.
func ExampleDerivedKey() {
	engine := idempotency.NewEngine(memory.New(nil), nil)
	request := idempotency.Request{Key: idempotency.Key{Scope: "acme", Value: "8e03978e-40d5-43dd-bc93-6894a57f9324"}}
	request.Fingerprint = idempotency.NewFingerprintV1("POST", "/transfers", "", "application/json", []byte(`{}`))
	for _, status := range []int{503, 201} {
		result := engine.Do(context.Background(), request, func(ctx context.Context) (*idempotency.Answer, error) {
			fmt.Println("to the card network:", idempotency.DerivedKey(ctx, "card-network"))
			return &idempotency.Answer{Status: status}, nil
		})
		fmt.Println("to the client:", result.Answer.Status, result.Outcome)
	}
	// Output:
	// to the card network: 7fd89d25-1078-81fc-af06-77ba7848f1a5
	// to the client: 503 unknown
	// to the card network: 7fd89d25-1078-81fc-af06-77ba7848f1a5
	// to the client: 201 executed
}

func ExampleKey() {
	key := idempotency.Key{Scope: "acme", Value: "8e03978e-40d5-43dd-bc93-6894a57f9324"}
	fmt.Printf("%v %#v %d\n", key, key, key)
	fmt.Println(idempotency.Key{Scope: "acme", Value: "a,b"}.Validate())
	// Output:
	// 0302c680 0302c680 0302c680
	// key is invalid: character 2 is not a visible ASCII character other than comma and quote
}

// reporter is a tracer that shows the values of handlers' panics: the log has only their types.
type reporter struct{ idempotency.Tracer }

func (reporter) TraceRequestStart(ctx context.Context, _ idempotency.RequestStart) context.Context {
	return ctx
}
func (reporter) TraceStep(context.Context, idempotency.StepEnd) {}
func (reporter) TraceRequestEnd(_ context.Context, end idempotency.RequestEnd) {
	var panicked *idempotency.PanicError
	if errors.As(end.Result.Err, &panicked) {
		fmt.Println("value:", panicked.Value)
	}
}

func ExamplePanicError() {
	engine := idempotency.NewEngine(memory.New(nil), &idempotency.Options{Tracer: reporter{}})
	request := idempotency.Request{
		Key:         idempotency.Key{Scope: "acme", Value: "k"},
		Fingerprint: idempotency.NewFingerprintV1("POST", "/transfers", "", "application/json", []byte(`{"amount":1250}`)),
	}
	result := engine.Do(context.Background(), request, func(context.Context) (*idempotency.Answer, error) { panic("no rate for EUR") })
	fmt.Println("error:", result.Err)
	// Output:
	// value: no rate for EUR
	// error: handler panicked with a string
}
