// Package fiberidem makes the handlers of Fiber v3 idempotent, by package middleware.
//
//	idem := middleware.New(store, account, nil)
//	app.Post("/payments", fiberidem.Middleware(idem), pay)
//
//	func pay(c fiber.Ctx) error {
//		tx := postgres.Tx(c.Context()) // its writes commit with the answer, or not at all
//		...
//		return c.Status(fiber.StatusCreated).JSON(payment)
//	}
package fiberidem

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"iter"
	"maps"
	"mime/multipart"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"

	"github.com/gofiber/fiber/v3"
	"github.com/valyala/fasthttp"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
)

// Middleware returns idem for Fiber. Mount it once, on routes or groups. It is safe for concurrent
// use. Methods that [middleware.Middleware.Handler] does not touch are not touched here either.
//
// The handlers after it may run more than once, each time on the request, the response and the
// fiber.Ctx as they were, and only one run counts. c.Context() carries the transaction and outlives
// the client; c itself does not carry it. An error that a handler returns goes to the app's
// ErrorHandler, and the answer of that is recorded: middleware outside sees the status, and no
// error. An answer of 2xx or 3xx before the error does not count. An answer of 200 without a body
// counts as none (see [middleware.Options].EmptyOK). If the ErrorHandler gives one, the request is a
// 500.
//
// A handler that streams its answer or takes the conn over gets a 500, because nothing may reach
// the client before COMMIT. It must not call c.End, c.Drop and c.SendEarlyHints, which use the conn
// themselves.
//
// It panics if idem is for a resumable route: a run without a client has no fiber.Ctx.
func Middleware(idem *middleware.Middleware) fiber.Handler {
	handler := idem.With(func(o *middleware.Options) {
		if o.Resumable != "" {
			panic("idempotency/contrib/fiber3: Options.Resumable is set, and a resumed run has no fiber.Ctx: serve such a route by net/http")
		}
		o.RouterState = func(ctx context.Context, _ []byte) (middleware.RouterState, error) {
			s := requestOf(ctx).state
			if !holdsDefaultCtx(s.saved.Type()) {
				return nil, fmt.Errorf("fiber.Ctx of the type %s can't be taken back to the start of a run: embed fiber.DefaultCtx itself, not a pointer to it", s.saved.Type())
			}
			return s, nil
		}
	}).Handler(http.HandlerFunc(run))
	return func(c fiber.Ctx) error {
		outside := c.Context()
		one := &request{c: c, state: snapshot(c)}
		r := convert(context.WithValue(outside, requestKey{}, one), c)
		w := &writer{header: http.Header{}}
		addHeaders(w.header, &one.state.response.Header)
		w.header.Del("Content-Type") // Fiber's default
		handler.ServeHTTP(w, r)
		if !one.untouched {
			c.SetContext(outside)
			one.state.restoreResponse()
			w.copyTo(c.Response())
		}
		return one.err
	}
}

// request is one request on its way through the middleware.
type request struct {
	c         fiber.Ctx
	state     *state
	untouched bool  // the middleware does not touch its method
	err       error // of the handlers, if it is untouched
}

type requestKey struct{}

func requestOf(ctx context.Context) *request { return ctx.Value(requestKey{}).(*request) }

// convert returns the request for net/http. It shares no memory with c, because fasthttp reuses its
// buffers and the store keeps keys.
func convert(ctx context.Context, c fiber.Ctx) *http.Request {
	in := c.Request()
	target := string(in.Header.RequestURI())
	parsed, err := url.ParseRequestURI(target)
	if err != nil { // Fiber routes it by the path that it finds
		parsed = &url.URL{Path: string(in.URI().Path()), RawQuery: string(in.URI().QueryString())}
	}
	r := (&http.Request{
		Method: string(in.Header.Method()), URL: parsed, RequestURI: target, Host: string(in.Host()), Header: http.Header{},
		Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, RemoteAddr: c.RequestCtx().RemoteAddr().String(), TLS: c.RequestCtx().TLSConnectionState(),
		Pattern: c.Method() + " " + c.FullPath(), // the default of Options.Route
	}).WithContext(ctx)
	addHeaders(r.Header, &in.Header)
	r.Header.Del("Host")
	if stream := in.BodyStream(); stream != nil {
		r.Body, r.ContentLength = io.NopCloser(stream), max(int64(in.Header.ContentLength()), -1)
	} else {
		body := bodyOf(c)
		r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
	}
	return r
}

// bodyOf returns the body. If fasthttp has parsed a multipart form before the handlers run, it no
// longer has its bytes, and would write the fields in another order each time. Here they are sorted,
// so that a retry has the same fingerprint.
func bodyOf(c fiber.Ctx) []byte {
	in := c.Request()
	boundary := string(in.Header.MultipartFormBoundary())
	if boundary == "" || c.App().Config().DisablePreParseMultipartForm || len(in.Header.ContentEncoding()) > 0 {
		return in.Body()
	}
	form, err := in.MultipartForm()
	if err != nil {
		return in.Body()
	}
	var body bytes.Buffer
	if err := writeForm(&body, form, boundary); err != nil {
		panic(fmt.Errorf("idempotency/contrib/fiber3: write the form again: %w", err))
	}
	return body.Bytes()
}

func writeForm(w io.Writer, form *multipart.Form, boundary string) error {
	parts := multipart.NewWriter(w)
	if err := parts.SetBoundary(boundary); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(form.Value)) {
		for _, value := range form.Value[name] {
			if err := parts.WriteField(name, value); err != nil {
				return err
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(form.File)) {
		for _, header := range form.File[name] {
			if err := writeFile(parts, header); err != nil {
				return err
			}
		}
	}
	return parts.Close()
}

func writeFile(parts *multipart.Writer, header *multipart.FileHeader) error {
	part, err := parts.CreatePart(header.Header)
	if err != nil {
		return err
	}
	file, err := header.Open()
	if err != nil {
		return err
	}
	defer func() { _ = file.Close() }()
	_, err = io.Copy(part, file)
	return err
}

// run runs the handlers after the middleware.
func run(w http.ResponseWriter, r *http.Request) {
	one := requestOf(r.Context())
	c := one.c
	if _, one.untouched = w.(*writer); one.untouched {
		one.err = c.Next()
		return
	}
	body, err := io.ReadAll(r.Body)
	if err != nil { // it is in memory
		panic(err)
	}
	c.Request().SetBodyRaw(body)
	c.SetContext(r.Context())
	response := c.Response()
	if err := c.Next(); err != nil {
		if response.StatusCode() < fiber.StatusBadRequest { // an answer before the error does not count
			response.SetStatusCode(fiber.StatusOK)
			response.ResetBody()
		}
		if c.App().ErrorHandler(c, err) != nil || unanswered(response) {
			_ = c.SendStatus(fiber.StatusInternalServerError) // never an empty 200
		}
	}
	if c.RequestCtx().Hijacked() || response.IsBodyStream() {
		panic(idempotency.UsageError("idempotency/contrib/fiber3: the handler streams its answer or takes over the conn, which would reach the client before COMMIT: answer as a whole, or leave the middleware out of this route"))
	}
	clear(w.Header())
	addHeaders(w.Header(), &response.Header)
	if !unanswered(response) {
		w.WriteHeader(response.StatusCode())
		_, _ = w.Write(response.Body())
	}
}

// unanswered reports whether the response is still the one that Fiber begins with.
func unanswered(response *fasthttp.Response) bool {
	return response.StatusCode() == fiber.StatusOK && !response.IsBodyStream() && len(response.Body()) == 0
}

func addHeaders(to http.Header, from interface {
	All() iter.Seq2[[]byte, []byte]
}) {
	for name, value := range from.All() {
		to.Add(string(name), string(value)) // copies
	}
	to.Del("Content-Length")
}

// state is a copy of all that handlers may change, from before the first run.
type state struct {
	c        fiber.Ctx
	saved    reflect.Value // all fields: the position in the chain is not exported
	path     string        // its bytes are Fiber's, which c.Path writes over
	header   fasthttp.RequestHeader
	uri      fasthttp.URI
	response fasthttp.Response
	values   map[any]any
}

func snapshot(c fiber.Ctx) *state {
	all := reflect.ValueOf(c).Elem()
	s := &state{c: c, saved: reflect.New(all.Type()).Elem(), path: strings.Clone(c.Path()), values: map[any]any{}}
	s.saved.Set(all)
	c.Request().Header.CopyTo(&s.header)
	c.Request().URI().CopyTo(&s.uri)
	c.Response().CopyTo(&s.response)
	c.RequestCtx().VisitUserValuesAll(func(key, value any) { s.values[key] = value })
	return s
}

// holdsDefaultCtx reports whether a copy of a value of this type has all of Fiber's state. Without
// it the place in the chain can't be restored, and a second run would end in a 404.
func holdsDefaultCtx(ctx reflect.Type) bool {
	if ctx == reflect.TypeFor[fiber.DefaultCtx]() {
		return true
	}
	if ctx.Kind() != reflect.Struct {
		return false
	}
	for field := range ctx.Fields() {
		if field.Anonymous && holdsDefaultCtx(field.Type) {
			return true
		}
	}
	return false
}

// Restore implements middleware.RouterState.
func (s *state) Restore(ctx context.Context) context.Context {
	reflect.ValueOf(s.c).Elem().Set(s.saved)
	s.c.Path(s.path)
	s.header.CopyTo(&s.c.Request().Header)
	s.uri.CopyTo(s.c.Request().URI())
	s.restoreResponse()
	inner := s.c.RequestCtx()
	inner.VisitUserValuesAll(func(key, _ any) { inner.SetUserValue(key, s.values[key]) })
	return ctx
}

func (s *state) restoreResponse() {
	s.response.CopyTo(s.c.Response())
	s.c.RequestCtx().Hijack(nil)
	s.c.RequestCtx().HijackSetNoResponse(false)
}

// Stored implements middleware.RouterState. The routes are not resumable.
func (*state) Stored() []byte { return nil }

// writer holds the answer for the client until the middleware has returned.
type writer struct {
	header http.Header
	status int
	body   []byte
}

func (w *writer) Header() http.Header { return w.header }

func (w *writer) WriteHeader(status int) { w.status = status }

func (w *writer) Write(p []byte) (int, error) {
	w.body = append(w.body, p...)
	return len(p), nil
}

func (w *writer) copyTo(response *fasthttp.Response) {
	var names []string
	for name := range response.Header.All() {
		names = append(names, string(name))
	}
	for _, name := range names {
		response.Header.Del(name)
	}
	for name, values := range w.header {
		for _, value := range values {
			response.Header.Add(name, value)
		}
	}
	response.SetStatusCode(w.status)
	response.SetBodyRaw(w.body)
}
