package middleware_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
)

// A retry finds the first answer. The memory store is for tests: a service uses storage/postgres.
func ExampleNew() {
	transfer := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusCreated)
		_, _ = fmt.Fprint(w, "paid")
	})
	idem := middleware.New(memory.New(nil), exampleAccount, nil)
	handler := idem.Handler(transfer)

	exampleSend(handler, "8e03978e", `{"amount":1250}`)
	exampleSend(handler, "8e03978e", `{"amount":1250}`)
	exampleSend(handler, `"8e03978e"`, `{"amount":1250}`) // the same key, quoted
	exampleSend(handler, "8e03978e", `{"amount":9999}`)
	exampleSend(handler, "", `{"amount":1250}`)
	// Output:
	// 201 executed paid
	// 201 replayed paid
	// 201 replayed paid
	// 422 mismatch Idempotency-Key was used for another request
	// 400 not-executed Idempotency-Key is missing
}

// The status of an answer decides about the transaction: a 402 is recorded, a 503 is forgotten.
func ExampleMiddleware_Handler() {
	statuses := []int{http.StatusServiceUnavailable, http.StatusPaymentRequired, http.StatusCreated}
	handler := middleware.New(memory.New(nil), exampleAccount, nil).Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(statuses[0])
		statuses = statuses[1:]
	}))
	for range 3 {
		exampleSend(handler, "8e03978e", "")
	}
	// Output:
	// 503 not-executed
	// 402 executed
	// 402 replayed
}

// One route may need other options than the rest: this one accepts requests without a key, and does
// not replay them.
func ExampleMiddleware_With() {
	runs := 0
	subscribe := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		runs++
		_, _ = fmt.Fprintf(w, "run %d", runs)
	})
	idem := middleware.New(memory.New(nil), exampleAccount, nil)
	optional := idem.With(func(o *middleware.Options) {
		o.Optional = true
		o.TTL = time.Hour
	})
	mux := http.NewServeMux()
	mux.Handle("POST /transfers", idem.Handler(subscribe))
	mux.Handle("POST /subscriptions", optional.Handler(subscribe))

	for _, path := range []string{"/transfers", "/subscriptions", "/subscriptions"} {
		w := httptest.NewRecorder()
		r := httptest.NewRequest(http.MethodPost, path, nil)
		r.Header.Set("Account", "acme")
		mux.ServeHTTP(w, r)
		fmt.Println(path, w.Code)
	}
	fmt.Println("runs:", runs)
	// Output:
	// /transfers 400
	// /subscriptions 200
	// /subscriptions 200
	// runs: 2
}

// A fingerprint of your own decides which requests are the same: here those with the same fields
// that move money, in any order and with any white space.
func ExampleOptions_fingerprints() {
	fields := middleware.Fingerprinter{
		Version: idempotency.FingerprintVersionUserMin,
		Content: func(r *http.Request, body []byte) []byte {
			var transfer struct{ To, Amount json.RawMessage }
			if err := json.Unmarshal(body, &transfer); err != nil {
				return body // it can't be compared by its fields
			}
			content, err := json.Marshal([]any{r.URL.Path, transfer.To, transfer.Amount})
			if err != nil {
				return body
			}
			return content
		},
	}
	handler := middleware.New(memory.New(nil), exampleAccount, &middleware.Options{
		// The second is for older records.
		Fingerprinters: []middleware.Fingerprinter{fields, middleware.FingerprinterV1()},
	}).Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) }))

	exampleSend(handler, "8e03978e", `{"to":"bob","amount":1250}`)
	exampleSend(handler, "8e03978e", `{"amount": 1250, "to": "bob"}`)
	exampleSend(handler, "8e03978e", `{"to":"bob","amount":9999}`)
	// Output:
	// 200 executed
	// 200 replayed
	// 422 mismatch Idempotency-Key was used for another request
}

// GraphQL reports errors in the body of a 200. Here such an answer undoes the handler's writes, and a
// retry runs again; DispositionDecline would record it.
func ExampleOptions_disposition() {
	failing := true
	handler := middleware.New(memory.New(nil), exampleAccount, &middleware.Options{
		Disposition: func(answer idempotency.Answer) idempotency.Disposition {
			var reply struct{ Errors []json.RawMessage }
			if err := json.Unmarshal(answer.Body, &reply); err != nil || len(reply.Errors) > 0 {
				return idempotency.DispositionForget
			}
			return idempotency.DefaultDisposition(answer)
		},
	}).Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if failing {
			_, _ = fmt.Fprint(w, `{"errors":[{"message":"try again"}]}`)
			return
		}
		_, _ = fmt.Fprint(w, `{"data":{"transfer":1}}`)
	}))

	exampleSend(handler, "8e03978e", `{"query":"..."}`)
	failing = false
	exampleSend(handler, "8e03978e", `{"query":"..."}`)
	exampleSend(handler, "8e03978e", `{"query":"..."}`)
	// Output:
	// 200 not-executed
	// 200 executed
	// 200 replayed
}

// On this route duplicates wait for the answer of the first request. By default they get 409.
func ExampleOptions_wait() {
	running, finish := make(chan struct{}), make(chan struct{})
	idem := middleware.New(memory.New(nil), exampleAccount, nil)
	transfers := idem.With(func(o *middleware.Options) { o.Wait = 5 * time.Second })
	handler := transfers.Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(running)
		<-finish
		w.WriteHeader(http.StatusCreated)
		_, _ = fmt.Fprint(w, "paid")
	}))

	var first, second sync.WaitGroup
	first.Go(func() { exampleSend(handler, "8e03978e", "") })
	<-running
	second.Go(func() {
		w := exampleServe(handler, "8e03978e", "")
		first.Wait() // so that the lines below are in order
		examplePrint(w)
	})
	for idem.InFlight() < 2 { // the second is there, and waits
		time.Sleep(time.Millisecond)
	}
	close(finish)
	second.Wait()
	// Output:
	// 201 executed paid
	// 201 replayed paid
}

// A caller may have lost the right to an answer since it was recorded.
func ExampleOptions_authorizeReplay() {
	revoked := false
	handler := middleware.New(memory.New(nil), exampleAccount, &middleware.Options{
		AuthorizeReplay: func(*http.Request, *idempotency.Record) error {
			if revoked {
				return errors.New("the account is closed")
			}
			return nil
		},
	}).Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) }))

	exampleSend(handler, "8e03978e", "")
	exampleSend(handler, "8e03978e", "")
	revoked = true
	exampleSend(handler, "8e03978e", "")
	// Output:
	// 200 executed
	// 200 replayed
	// 403 unknown The answer may not be shown
}

// A scope function's error is a 401, unless it says otherwise.
func ExampleStatusError() {
	scope := func(r *http.Request) (string, error) {
		if r.Header.Get("Account") == "acme" {
			return "", &middleware.StatusError{Status: http.StatusForbidden, Detail: "The account is closed."}
		}
		return "", errors.New("no account")
	}
	handler := middleware.New(memory.New(nil), scope, nil).Handler(http.NotFoundHandler())
	exampleSend(handler, "8e03978e", "")
	// Output:
	// 403 not-executed The caller is not known
}

// exampleAccount returns the scope of the examples' keys: the account that outer authentication
// found.
func exampleAccount(r *http.Request) (string, error) { return r.Header.Get("Account"), nil }

// exampleSend sends a transfer and prints the answer, or the title of a problem document.
func exampleSend(handler http.Handler, key, body string) {
	examplePrint(exampleServe(handler, key, body))
}

func exampleServe(handler http.Handler, key, body string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(http.MethodPost, "/transfers", strings.NewReader(body))
	r.Header.Set("Account", "acme")
	if key != "" {
		r.Header.Set("Idempotency-Key", key)
	}
	w := httptest.NewRecorder()
	handler.ServeHTTP(w, r)
	return w
}

func examplePrint(w *httptest.ResponseRecorder) {
	text := w.Body.String()
	var problem struct{ Title string }
	if json.Unmarshal(w.Body.Bytes(), &problem) == nil {
		text = problem.Title
	}
	fmt.Println(strings.TrimSpace(fmt.Sprint(w.Code, " ", w.Header().Get("Idempotency-Status"), " ", text)))
}
