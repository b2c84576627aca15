// Package echoidem makes the handlers of Echo v4 idempotent, by package middleware. contrib/echo5 is
// for v5.
//
//	idem := middleware.New(store, account, nil)
//	e.POST("/payments", pay, echoidem.Middleware(idem))
//
//	func pay(c echo.Context) error {
//		tx := postgres.Tx(c.Request().Context()) // its writes commit with the answer, or not at all
//		...
//		return c.JSON(http.StatusCreated, payment)
//	}
package echoidem

import (
	"context"
	"fmt"
	"net/http"

	"github.com/labstack/echo/v4"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
)

// Middleware returns idem for Echo. Mount it once, on routes or groups. It is safe for concurrent
// use. Methods that [middleware.Middleware.Handler] does not touch are not touched here either.
//
// The handler may run more than once, and only one run counts; values that a run set by c.Set
// remain for the next. Its c.Request().Context() carries the transaction and outlives the client.
// An error that it returns goes to Echo's HTTPErrorHandler, and the answer of that is recorded, or
// a 500 if it writes none: middleware outside sees the status, and no error. An error after an
// answer of 2xx or 3xx is a 500 too, and the writes are undone. Flush panics and Hijack fails,
// because nothing reaches the client before COMMIT.
//
// Mount Echo's Recover outside: inside, it turns a panic after an answer into no error, and the
// answer is committed.
//
// It panics if idem is for a resumable route: a run without a client has no echo.Context. Mount such
// a middleware around the whole app.
func Middleware(idem *middleware.Middleware) echo.MiddlewareFunc {
	handler := idem.With(func(o *middleware.Options) {
		if o.Resumable != "" {
			panic("idempotency/contrib/echo4: Options.Resumable is set, and a resumed run has no echo.Context: mount the middleware around the app, idem.Handler(e)")
		}
		o.RouterState = func(context.Context, []byte) (middleware.RouterState, error) { return routed{}, nil }
	}).Handler(http.HandlerFunc(run))
	return func(next echo.HandlerFunc) echo.HandlerFunc {
		return func(c echo.Context) error {
			one := &request{c: c, next: next}
			r := c.Request().WithContext(context.WithValue(c.Request().Context(), requestKey{}, one))
			if r.Pattern == "" && c.Path() != "" {
				r.Pattern = r.Method + " " + c.Path() // the default of Options.Route
			}
			before, response := c.Request(), c.Response()
			defer func() {
				// Only now: a goroutine that the handler left running must not find Echo's own writer
				// while the transaction is open.
				if !one.untouched {
					c.SetRequest(before)
					c.SetResponse(response)
				}
			}()
			handler.ServeHTTP(&outside{response}, r)
			return one.err
		}
	}
}

// request is one request on its way through the middleware.
type request struct {
	c         echo.Context
	next      echo.HandlerFunc
	untouched bool  // the middleware does not touch its method
	err       error // of the handler, if it is untouched
}

type requestKey struct{}

// outside marks Echo's own writer.
type outside struct{ http.ResponseWriter }

// run runs the handler.
func run(w http.ResponseWriter, r *http.Request) {
	one := r.Context().Value(requestKey{}).(*request)
	c := one.c
	if _, one.untouched = w.(*outside); one.untouched {
		one.err = one.next(c)
		return
	}
	c.SetRequest(r)
	response := echo.NewResponse(w, c.Echo())
	c.SetResponse(response)
	if err := one.next(c); err != nil {
		answered := response.Committed && response.Status < http.StatusBadRequest
		c.Error(err)
		if answered { // which Echo would let stand
			panic(idempotency.UsageError(fmt.Sprintf("idempotency/contrib/echo4: the handler, or middleware inside, returned an error after it had answered %d: the writes are undone; return an error before the answer, or none", response.Status)))
		}
		if !response.Committed {
			response.WriteHeader(http.StatusInternalServerError) // never an empty 200
		}
	}
}

// routed is the state of Echo's router. A run does not change it.
type routed struct{}

// Restore implements middleware.RouterState.
func (routed) Restore(ctx context.Context) context.Context { return ctx }

// Stored implements middleware.RouterState. The routes are not resumable.
func (routed) Stored() []byte { return nil }
