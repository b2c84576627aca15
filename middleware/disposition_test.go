package middleware_test

import (
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
)

// GraphQL reports errors in the body of a 200. A policy that reads the body has the handler's
// writes undone, and the answer recorded.
func TestDispositionReadsTheAnswer(t *testing.T) {
	t.Parallel()
	var mediaType string
	b := setup(t, setupOptions{middleware: &middleware.Options{Disposition: func(answer idempotency.Answer) idempotency.Disposition {
		mediaType = http.Header(answer.Header).Get("Content-Type")
		if answer.Status == http.StatusOK && bytes.Contains(answer.Body, []byte(`"errors"`)) {
			return idempotency.DispositionDecline
		}
		return idempotency.DefaultDisposition(answer)
	}}}, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		transfer(discard{}, r)
		w.Header().Set("Content-Type", "application/graphql-response+json")
		if strings.Contains(string(body), "overdraw") {
			_, _ = io.WriteString(w, `{"errors":[{"message":"not enough money"}]}`)
			return
		}
		_, _ = io.WriteString(w, `{"data":{"transfer":1}}`)
	})
	for n, c := range []struct {
		body    string
		effects int
	}{{`{"query":"overdraw"}`, 0}, {`{"query":"transfer"}`, 1}} {
		key := strings.Repeat("k", n+1)
		first := b.post(t, "/", c.body, "Idempotency-Key", key)
		want(t, first, 200, idempotency.OutcomeExecuted, "")
		again := b.post(t, "/", c.body, "Idempotency-Key", key)
		want(t, again, 200, idempotency.OutcomeReplayed, "")
		if again.body != first.body || b.effects(t) != c.effects || b.records(t) != n+1 {
			t.Errorf("%s: answers %q and %q, %d effects, %d records", c.body, first.body, again.body, b.effects(t), b.records(t))
		}
	}
	if mediaType != "application/graphql-response+json" {
		t.Errorf("the policy saw the type %q", mediaType)
	}
}

// discard drops an answer.
type discard struct{}

func (discard) Header() http.Header         { return http.Header{} }
func (discard) Write(p []byte) (int, error) { return len(p), nil }
func (discard) WriteHeader(int)             {}
