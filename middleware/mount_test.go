package middleware_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
	"github.com/paidonce/idempotency/storage/postgres"
)

// here returns the line after its caller's, as the log names it.
func here() string {
	_, file, line, _ := runtime.Caller(1)
	return fmt.Sprintf("%s:%d", file, line+1)
}

// A request that passes two mounts would claim its key twice, and wait for itself. It is refused,
// whatever lies between the two, takes one connection, and leaves no record, even if a policy keeps
// every answer. The log names both lines.
func TestMountedTwiceNamesBothMounts(t *testing.T) {
	t.Parallel()
	keepAll := func(o *middleware.Options) {
		o.Disposition = func(idempotency.Answer) idempotency.Disposition { return idempotency.DispositionCommit }
	}
	var outer, inner string // the lines of the two
	for name, mount := range map[string]func(idem *middleware.Middleware, h http.Handler) http.Handler{
		"one in the other": func(idem *middleware.Middleware, h http.Handler) http.Handler {
			inner = here()
			within := idem.Handler(h)
			outer = here()
			return idem.Handler(within)
		},
		"with other options": func(idem *middleware.Middleware, h http.Handler) http.Handler {
			inner = here()
			within := idem.With(func(o *middleware.Options) { o.TTL = time.Hour }).Handler(h)
			outer = here()
			return idem.With(keepAll).Handler(within)
		},
		"a router between": func(idem *middleware.Middleware, h http.Handler) http.Handler {
			r := chi.NewRouter()
			r.Use(idem.With(keepAll).Handler)
			r.Route("/v1", func(r chi.Router) {
				inner = here()
				r.With(idem.Handler).Method("POST", "/", h)
			})
			outer = "mount_test.go:" // chi mounts when the first route is added
			return r
		},
		"a goroutine between, and 200 for its failure": func(idem *middleware.Middleware, h http.Handler) http.Handler {
			inner = here()
			hidden := idem.Handler(h)
			outer = here()
			return idem.With(keepAll).Handler(http.TimeoutHandler(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
				hidden.ServeHTTP(httptest.NewRecorder(), r)
			}), time.Minute, ""))
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := setup(t, setupOptions{mount: mount, poolMax: 1, middleware: &middleware.Options{Optional: true}, store: &postgres.Options{AcquireTimeout: 20 * time.Second}}, transfer)
			started := time.Now()
			for range 2 {
				want(t, b.post(t, "/v1/", "{}", "Idempotency-Key", "k"), 500, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
				want(t, b.post(t, "/v1/", "{}"), 500, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
			}
			if b.runs.Load() != 0 || b.records(t) != 0 || time.Since(started) > 10*time.Second {
				t.Errorf("%d runs, %d records, after %v", b.runs.Load(), b.records(t), time.Since(started))
			}
			logged := b.logs.String()
			if !strings.Contains(logged, "mounted twice") || strings.Count(logged, "level=ERROR") != 4 {
				t.Errorf("logged %s", logged)
			}
			if before, after, found := strings.Cut(logged, ", and again at "); !found || !strings.Contains(before, outer) || !strings.HasPrefix(after, inner) {
				t.Errorf("the log does not name the mounts at %s and %s: %s", outer, inner, logged)
			}
		})
	}
}

// An attempt that an Engine runs without the middleware counts as an outer mount.
func TestMountWithinAnAttemptIsRefused(t *testing.T) {
	t.Parallel()
	store := memory.New(nil)
	var logs strings.Builder
	handler := middleware.New(store, byAccount, &middleware.Options{Logger: slog.New(slog.NewTextHandler(&logs, nil))}).Handler(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		t.Error("the handler ran")
	}))
	request := idempotency.Request{Key: idempotency.Key{Scope: "acme", Value: "k"}, Fingerprint: idempotency.NewFingerprint(100, nil)}
	result := idempotency.NewEngine(store, nil).Do(t.Context(), request, func(ctx context.Context) (*idempotency.Answer, error) {
		r := httptest.NewRequestWithContext(ctx, http.MethodPost, "/", nil)
		r.Header = http.Header{"Idempotency-Key": {"k"}, "Account": {"acme"}}
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		return &idempotency.Answer{Status: w.Code}, nil
	})
	if result.Answer == nil || result.Answer.Status != 500 || len(store.Records()) != 0 {
		t.Errorf("%+v, %d records", result, len(store.Records()))
	}
	if logged := logs.String(); !strings.Contains(logged, "mounted twice") || !strings.Contains(logged, "mount_test.go:") {
		t.Errorf("logged %s", logged)
	}
}

// If a handler sets the middleware's headers they are dropped, and the log says so once per route.
func TestHandlersOwnStatusHeadersAreDroppedAndLoggedOnce(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, h http.Handler) http.Handler {
		mux := http.NewServeMux()
		mux.Handle("POST /a", idem.Handler(h))
		mux.Handle("POST /b", idem.Handler(h))
		return mux
	}}, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Idempotency-Key", r.Header.Get("Idempotency-Key"))
		w.Header()["idempotent-replayed"] = []string{"true"}
		w.Header().Set("Idempotency-Status", "replayed")
		_, _ = io.WriteString(w, "{}")
	})
	for i := range 3 {
		for _, path := range []string{"/a", "/b"} {
			got := b.post(t, path, "{}", "Idempotency-Key", fmt.Sprint("canary", i, path[1:]))
			want(t, got, 200, idempotency.OutcomeExecuted, "")
			if got.header.Get("Idempotency-Key") != "" || got.header.Get("Idempotent-Replayed") != "" || len(got.header.Values("Idempotency-Status")) != 1 {
				t.Errorf("header %v", got.header)
			}
		}
	}
	logged := b.logs.String()
	if strings.Count(logged, "were dropped") != 2 || !strings.Contains(logged, `route="POST /a"`) || !strings.Contains(logged, `route="POST /b"`) ||
		!strings.Contains(logged, "Idempotent-Replayed") || strings.Contains(logged, "canary") {
		t.Errorf("logged %s", logged)
	}
}

// If the router is inside the middleware, its own 404 and 405 are recorded, and the log names the
// remedy once. If the middleware is mounted on routes, a request for a route that only the next
// version has is executed after the deployment.
func TestRoutersOwn404IsNoticedAndNotRecordedByWith(t *testing.T) {
	t.Parallel()
	type version struct{ before, after http.Handler }
	for name, build := range map[string]func(idem *middleware.Middleware, h http.Handler) version{
		"ServeMux, at the root": func(idem *middleware.Middleware, h http.Handler) version {
			before, after := http.NewServeMux(), http.NewServeMux()
			before.Handle("POST /v1/transfers", h)
			after.Handle("POST /v2/transfers", h)
			return version{idem.Handler(before), idem.Handler(after)}
		},
		"ServeMux, on the route": func(idem *middleware.Middleware, h http.Handler) version {
			before, after := http.NewServeMux(), http.NewServeMux()
			before.Handle("POST /v1/transfers", idem.Handler(h))
			after.Handle("POST /v2/transfers", idem.Handler(h))
			return version{before, after}
		},
		"chi, at the root": func(idem *middleware.Middleware, h http.Handler) version {
			before, after := chi.NewRouter(), chi.NewRouter()
			before.Use(idem.Handler)
			after.Use(idem.Handler)
			before.Method("POST", "/v1/transfers", h)
			after.Method("POST", "/v2/transfers", h)
			return version{before, after}
		},
		"chi, With": func(idem *middleware.Middleware, h http.Handler) version {
			before, after := chi.NewRouter(), chi.NewRouter()
			before.With(idem.Handler).Method("POST", "/v1/transfers", h)
			after.With(idem.Handler).Method("POST", "/v2/transfers", h)
			return version{before, after}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			deployed := false
			b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, h http.Handler) http.Handler {
				v := build(idem, h)
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if deployed {
						v.after.ServeHTTP(w, r)
					} else {
						v.before.ServeHTTP(w, r)
					}
				})
			}}, func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("Missing") != "" { // a handler's own 404 is an answer
					http.NotFound(w, r)
					return
				}
				transfer(w, r)
			})
			want(t, b.post(t, "/v1/transfers", "{}", "Idempotency-Key", "handlers own", "Missing", "yes"), 400, idempotency.OutcomeNotExecuted, idempotency.ReasonKeyInvalid)
			want(t, b.post(t, "/v1/transfers", "{}", "Idempotency-Key", "own", "Missing", "yes"), 404, idempotency.OutcomeExecuted, "")
			if logged := b.logs.String(); logged != "" {
				t.Errorf("of a handler's own 404 it is logged %s", logged)
			}
			atRoot := strings.HasSuffix(name, "root")
			for range 2 {
				got := b.post(t, "/v2/transfers", "{}", "Idempotency-Key", "k")
				if got.status != 404 || (got.outcome != "") != atRoot {
					t.Errorf("%d %q", got.status, got.outcome)
				}
			}
			if notices := strings.Count(b.logs.String(), "mount the middleware on routes (With)"); (notices == 1) != atRoot || notices > 1 {
				t.Errorf("%d notices: %s", notices, b.logs.String())
			}
			deployed = true
			if got := b.post(t, "/v2/transfers", "{}", "Idempotency-Key", "k"); (got.status == 201) == atRoot {
				t.Errorf("after the deployment: %d %s", got.status, got.outcome)
			}
		})
	}
}

// ginWriter and fasthttpContext have the methods by which gin's writer and fasthttp's context are
// recognized. The adapters in contrib test the real ones.
type ginWriter struct{ http.ResponseWriter }

func (ginWriter) WriteHeaderNow() {}

type fasthttpContext struct{ context.Context }

func (fasthttpContext) VisitUserValuesAll(func(key, value any)) {}

// Value hides net/http's server, which is not there with fasthttp.
func (c fasthttpContext) Value(key any) any {
	if key == http.ServerContextKey {
		return nil
	}
	return c.Context.Value(key)
}

// A request through a framework's own bridge is refused: no handler runs, and the log names the
// adapter. The handlers would run past the middleware, or after it. Methods that the middleware does
// not touch pass.
func TestFrameworksOwnBridgesAreRefused(t *testing.T) {
	t.Parallel()
	for name, bridge := range map[string]func(next http.Handler) http.Handler{
		"contrib/gin": func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				defer func() { _ = recover() }() // as gin.Recovery: the panic ended gin's chain
				next.ServeHTTP(ginWriter{w}, r)
			})
		},
		"contrib/fiber3": func(next http.Handler) http.Handler {
			return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				next.ServeHTTP(w, r.WithContext(fasthttpContext{r.Context()}))
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, setupOptions{mount: func(idem *middleware.Middleware, handler http.Handler) http.Handler {
				return bridge(idem.Handler(handler))
			}}, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusCreated) })
			want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 500, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed)
			if b.runs.Load() != 0 || !strings.Contains(b.logs.String(), name) {
				t.Errorf("%d runs, logged: %s", b.runs.Load(), b.logs)
			}
			if got := b.send(t, http.MethodGet, "/", nil); got.status != 201 || b.runs.Load() != 1 {
				t.Errorf("GET: %d, %d runs", got.status, b.runs.Load())
			}
		})
	}
}
