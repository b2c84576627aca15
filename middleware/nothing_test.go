package middleware_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/mwtest"
)

// A framework that is wired wrongly sends the handler's answer, or drops its error, past the
// middleware. Its writes are undone, the client is not shown an empty 200, and the log names the
// remedy and the route.
func TestHandlerThatWritesNothingFails(t *testing.T) {
	t.Parallel()
	nothing := true
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, handler http.Handler) http.Handler {
		mux := http.NewServeMux()
		mux.Handle("POST /transfers", idem.Handler(handler))
		return mux
	}}, func(w http.ResponseWriter, r *http.Request) {
		if nothing {
			transfer(&headerless{}, r)
			w.Header().Set("Location", "/transfers/1")
			return
		}
		transfer(w, r)
	})
	for range 2 {
		want(t, b.post(t, "/transfers", "{}", "Idempotency-Key", "k"), 500, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
	}
	if b.runs.Load() != 2 || b.effects(t) != 0 || b.records(t) != 0 {
		t.Errorf("%d runs, %d effects, %d records", b.runs.Load(), b.effects(t), b.records(t))
	}
	for _, text := range []string{"level=ERROR", "around the whole app", "contrib", "EmptyOK", `route="POST /transfers"`} {
		if !strings.Contains(b.logs.String(), text) {
			t.Errorf("the log has no %s: %s", text, b.logs)
		}
	}
	nothing = false
	want(t, b.post(t, "/transfers", "{}", "Idempotency-Key", "k"), 201, idempotency.OutcomeExecuted, "")
}

// A request without a key is no exception.
func TestHandlerThatWritesNothingFailsWithoutAKey(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{middleware: &middleware.Options{Optional: true}}, func(_ http.ResponseWriter, r *http.Request) {
		transfer(&headerless{}, r)
	})
	want(t, b.post(t, "/", "{}"), 500, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
	if b.effects(t) != 0 {
		t.Errorf("%d effects", b.effects(t))
	}
}

// With EmptyOK a handler answers an empty 200 by returning, as with net/http.
func TestEmptyOK(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{middleware: &middleware.Options{EmptyOK: true}}, func(w http.ResponseWriter, r *http.Request) {
		transfer(&headerless{}, r)
		w.Header().Set("Location", "/transfers/1")
	})
	for _, outcome := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
		got := b.post(t, "/", "{}", "Idempotency-Key", "k")
		want(t, got, 200, outcome, "")
		if got.body != "" || got.header.Get("Location") != "/transfers/1" {
			t.Errorf("%s: %q %v", outcome, got.body, got.header)
		}
	}
	if b.effects(t) != 1 || b.records(t) != 1 {
		t.Errorf("%d effects, %d records", b.effects(t), b.records(t))
	}
}

// An answer on the writer outside can't be recorded or called back. The client must not take it for
// the outcome: it gets no answer at all, whatever EmptyOK says, and the log names the remedy.
func TestAnswerOnTheWriterOutsideReachesNobody(t *testing.T) {
	t.Parallel()
	for _, emptyOK := range []bool{false, true} {
		var logs strings.Builder
		runs := 0
		store := mwtest.NewStore()
		idem := middleware.New(store, func(*http.Request) (string, error) { return "acme", nil }, &middleware.Options{
			EmptyOK: emptyOK, Logger: slog.New(slog.NewTextHandler(&logs, nil)),
		})
		server := httptest.NewUnstartedServer(http.HandlerFunc(func(outer http.ResponseWriter, r *http.Request) {
			idem.Handler(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				runs++
				if err := store.Write(r.Context()); err != nil {
					t.Error(err)
				}
				outer.Header().Set("Content-Type", "application/json")
				outer.WriteHeader(http.StatusCreated)
				_, _ = io.WriteString(outer, `{"id":"payment-1"}`)
			})).ServeHTTP(outer, r)
		}))
		server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
		server.Start()
		for range 2 {
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL, nil)
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set("Idempotency-Key", "k")
			if response, err := server.Client().Transport.RoundTrip(r); err == nil {
				t.Errorf("EmptyOK %t: the client got %s", emptyOK, response.Status)
				_ = response.Body.Close()
			}
		}
		server.Close()
		if ends := fmt.Sprint(store.Ends()); runs != 2 || ends != "[ROLLBACK ROLLBACK]" || store.Written() != 0 {
			t.Errorf("EmptyOK %t: %d runs, %s, %d writes; want 2, and none", emptyOK, runs, ends, store.Written())
		}
		if !strings.Contains(logs.String(), "writer outside") || !strings.Contains(logs.String(), "docs/stacks.md") {
			t.Errorf("EmptyOK %t: logged %s", emptyOK, &logs)
		}
	}
}

// If its call has no result, a handler returns without an answer, as it should: the request stays
// open, and the log has the reason of the call. Without a call the handler has failed.
func TestHandlerWithoutAResultWritesNothing(t *testing.T) {
	t.Parallel()
	var call bool
	charge := effect.New("charge", effect.Effect[int, string]{
		Do: func(_ context.Context, _ string, _ int) (string, error) { return "", errors.New("the line was cut") },
	})
	b := setup(t, setupOptions{middleware: &middleware.Options{Resumable: "topup/1"}}, func(_ http.ResponseWriter, r *http.Request) {
		if call {
			if _, err := charge.Call(r.Context(), 1); err == nil {
				t.Error("the call has a result")
			}
		}
	})
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "nothing"), 500, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
	if !strings.Contains(b.logs.String(), idempotency.ErrAnswerMissing.Error()) {
		t.Errorf("logged: %s", b.logs)
	}
	b.logs.Reset()
	call = true
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "call"), 503, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
	if strings.Contains(b.logs.String(), idempotency.ErrAnswerMissing.Error()) || !strings.Contains(b.logs.String(), "the line was cut") {
		t.Errorf("logged: %s", b.logs)
	}
	if open := b.count(t, "SELECT count(*) FROM idempotency_open"); open != 1 {
		t.Errorf("%d open requests", open)
	}
}

// The errors of a gRPC call are trailers of a 200: they would be committed, and no replay would have
// them. The call is refused whatever the route allows, and the log names the interceptor once.
func TestGRPCIsRefused(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{middleware: &middleware.Options{Optional: true}}, transfer)
	for _, mediaType := range []string{
		"application/grpc", "application/grpc+proto", "application/grpc;charset=utf-8", "Application/GRPC", "application/grpc-web", "application/grpc-web-text+proto",
	} {
		got := b.post(t, "/", "{}", "Content-Type", mediaType, "Idempotency-Key", "k")
		want(t, got, 415, idempotency.OutcomeNotExecuted, idempotency.ReasonMediaType)
		if !strings.Contains(got.body, "contrib/grpc") {
			t.Errorf("%s: the problem names no interceptor: %s", mediaType, got.body)
		}
		want(t, b.post(t, "/", "{}", "Content-Type", mediaType), 415, idempotency.OutcomeNotExecuted, idempotency.ReasonMediaType)
	}
	if b.runs.Load() != 0 || strings.Count(b.logs.String(), "contrib/grpc") != 1 {
		t.Errorf("%d runs; logged: %s", b.runs.Load(), b.logs)
	}
	for _, mediaType := range []string{"application/grp", "application/proto", "application/connect+proto"} {
		want(t, b.post(t, "/", "{}", "Content-Type", mediaType, "Idempotency-Key", mediaType), 201, idempotency.OutcomeExecuted, "")
	}
}
