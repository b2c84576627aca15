// Package ginidem makes gin's handlers idempotent, by package middleware.
//
//	idem := middleware.New(store, account, nil)
//	router.POST("/payments", ginidem.Middleware(idem), pay)
//
//	func pay(c *gin.Context) {
//		tx := postgres.Tx(c.Request.Context()) // its writes commit with the answer, or not at all
//		...
//		c.JSON(http.StatusCreated, payment)
//	}
package ginidem

import (
	"bufio"
	"context"
	"io"
	"maps"
	"net"
	"net/http"
	"reflect"
	"slices"
	"unsafe"

	"github.com/gin-gonic/gin"

	"github.com/paidonce/idempotency/middleware"
)

// Middleware returns idem for gin. Mount it once, on routes or groups, and outside of middleware
// that renders c.Errors. It is safe for concurrent use. Methods that
// [middleware.Middleware.Handler] does not touch are not touched here either.
//
// The handlers after it may run more than once, each time on the gin.Context as it was, and only one
// run counts. c.Request.Context() carries the transaction and outlives the client. An error in
// c.Errors without an answer is a 500; after an answer it is only a note, and the answer is
// committed. Flush does nothing and Hijack fails, because nothing reaches the client before COMMIT.
// When it returns, c is aborted.
//
// Mount gin.Recovery outside: inside, it turns a panic after an answer into no error, and the answer
// is committed.
//
// It panics if idem is for a resumable route: a run without a client has no gin.Context. Mount such
// a middleware around the whole router.
func Middleware(idem *middleware.Middleware) gin.HandlerFunc {
	if _, known := reflect.TypeFor[gin.Context]().FieldByName(ownWriter); !known {
		panic("idempotency/contrib/gin: this release of gin is not known: take an older one, or mount the middleware around the router, idem.Handler(router)")
	}
	handler := idem.With(func(o *middleware.Options) {
		if o.Resumable != "" {
			panic("idempotency/contrib/gin: Options.Resumable is set, and a resumed run has no gin.Context: mount the middleware around the router, idem.Handler(router)")
		}
		o.RouterState = func(ctx context.Context, _ []byte) (middleware.RouterState, error) {
			return snapshot(requestOf(ctx).c), nil
		}
	}).Handler(http.HandlerFunc(run))
	return func(c *gin.Context) {
		one := &request{c: c}
		r := c.Request.WithContext(context.WithValue(c.Request.Context(), requestKey{}, one))
		if r.Pattern == "" && c.FullPath() != "" {
			r.Pattern = r.Method + " " + c.FullPath() // the default of Options.Route
		}
		before, writer := c.Request, c.Writer
		defer func() {
			// Only now: a goroutine that the handler left running must not find gin's own writer while
			// the transaction is open.
			if !one.untouched {
				c.Request, c.Writer = before, writer
				c.Abort() // a replay runs no handler, and a panic left the chain in the middle
			}
		}()
		handler.ServeHTTP(&outside{writer}, r)
	}
}

// request is one request on its way through the middleware.
type request struct {
	c         *gin.Context
	untouched bool // the middleware does not touch its method
}

type requestKey struct{}

func requestOf(ctx context.Context) *request { return ctx.Value(requestKey{}).(*request) }

// outside wraps gin's own writer and hides its other methods. By those the middleware recognizes
// gin's writer, which it refuses without this package.
type outside struct{ http.ResponseWriter }

// run runs the handlers after the middleware.
func run(w http.ResponseWriter, r *http.Request) {
	one := requestOf(r.Context())
	c := one.c
	if _, one.untouched = w.(*outside); one.untouched {
		c.Next()
		return
	}
	errors := len(c.Errors)
	// gin sets a 404 of its own before the handlers run.
	inside := &recorder{ResponseWriter: w, status: c.Writer.Status(), answered: c.Writer.Status() != http.StatusOK, size: -1}
	defer redirect(c, inside)()
	c.Request, c.Writer = r, inside
	c.Next()
	if len(c.Errors) > errors && !inside.Written() && inside.status < http.StatusBadRequest {
		inside.WriteHeader(http.StatusInternalServerError)
	}
	if inside.answered {
		inside.WriteHeaderNow()
	}
}

// redirect makes gin's own writer write to w until restore is called, because HandleContext gives
// that writer to the handlers. Its field is not exported.
func redirect(c *gin.Context, w http.ResponseWriter) (restore func()) {
	field := reflect.ValueOf(c).Elem().FieldByName(ownWriter)
	own := reflect.NewAt(field.Type(), unsafe.Pointer(field.UnsafeAddr())).Elem()
	saved := reflect.New(own.Type()).Elem()
	saved.Set(own)
	own.FieldByName("ResponseWriter").Set(reflect.ValueOf(w))
	return func() { own.Set(saved) }
}

// ownWriter is the name of the field in a gin.Context that is gin's own writer.
const ownWriter = "writermem"

// state is a copy of a gin.Context from before the first run. It has all fields, because the
// position in the chain is not exported.
type state struct {
	c      *gin.Context
	saved  reflect.Value
	params gin.Params // HandleContext writes over those of c
}

func snapshot(c *gin.Context) *state {
	all := reflect.ValueOf(c).Elem()
	s := &state{c, reflect.New(all.Type()).Elem(), slices.Clone(c.Params)}
	s.saved.Set(all)
	c.Keys = maps.Clone(c.Keys) // the first run's; saved keeps the other
	return s
}

// Restore implements middleware.RouterState.
func (s *state) Restore(ctx context.Context) context.Context {
	reflect.ValueOf(s.c).Elem().Set(s.saved)
	s.c.Keys, s.c.Params = maps.Clone(s.c.Keys), slices.Clone(s.params)
	return ctx
}

// Stored implements middleware.RouterState. The routes are not resumable.
func (*state) Stored() []byte { return nil }

// recorder is a gin.ResponseWriter that writes to the middleware's recorder.
type recorder struct {
	http.ResponseWriter
	status   int
	answered bool // the handler gave a status
	size     int  // -1 until the status is written
}

var _ gin.ResponseWriter = (*recorder)(nil)

func (w *recorder) Status() int            { return w.status }
func (w *recorder) Size() int              { return w.size }
func (w *recorder) Written() bool          { return w.size >= 0 }
func (*recorder) Flush()                   {}
func (*recorder) CloseNotify() <-chan bool { return nil } // the handler outlives the client
func (*recorder) Pusher() http.Pusher      { return nil }

// WriteHeader sets the status. As in gin the status is written later, and may change until then.
func (w *recorder) WriteHeader(status int) {
	if status > 0 && !w.Written() {
		w.status, w.answered = status, true
	}
}

// WriteHeaderNow writes the status.
func (w *recorder) WriteHeaderNow() {
	if !w.Written() {
		w.size = 0
		w.ResponseWriter.WriteHeader(w.status)
	}
}

func (w *recorder) Write(p []byte) (int, error) {
	w.WriteHeaderNow()
	n, err := w.ResponseWriter.Write(p)
	w.size += n
	return n, err
}

func (w *recorder) WriteString(s string) (int, error) {
	return io.WriteString(struct{ io.Writer }{w}, s)
}

// Hijack is refused: the client would learn of a payment before COMMIT.
func (*recorder) Hijack() (net.Conn, *bufio.ReadWriter, error) { return nil, nil, http.ErrNotSupported }
