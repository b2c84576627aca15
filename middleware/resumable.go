package middleware

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"github.com/paidonce/idempotency"
)

// A resumable route stores the request, so that its handler can run again without the client. It is
// stored with the first intent or phase, and not before.

// StoredHeaders returns the names of the request headers that a resumed run always has: those that
// say how to read the body and how to answer. Options.StoreHeaders adds to them.
func StoredHeaders() []string {
	return []string{"Accept", "Accept-Language", "Content-Encoding", "Content-Type"}
}

// neverStored reports whether a header carries a credential, or belongs to one connection.
func neverStored(name string) bool {
	switch name {
	case "Authorization", "Proxy-Authorization", "Cookie", "Connection", "Transfer-Encoding", "Upgrade", "Te", "Trailer":
		return true
	}
	return false
}

// storedRequest is a request as it is stored. Fields are only ever added, because a request that is
// open during an upgrade was written by the release before. The client's data is stored as bytes,
// because JSON would change a string that is not UTF-8.
type storedRequest struct {
	Version    int                 `json:"v"`
	Method     string              `json:"method"`
	Host       []byte              `json:"host,omitempty"`
	URI        []byte              `json:"uri,omitempty"` // as it came, before outer middleware
	Path       []byte              `json:"path,omitempty"`
	RawPath    []byte              `json:"raw_path,omitempty"`
	Query      []byte              `json:"query,omitempty"`
	Pattern    string              `json:"pattern,omitempty"`
	PathValues map[string][]byte   `json:"path_values,omitempty"`
	Header     map[string][][]byte `json:"header,omitempty"`
	Router     []byte              `json:"router,omitempty"` // RouterState.Stored
	Body       []byte              `json:"body,omitempty"`
}

const storedVersion = 1

// errStored is the error of a stored request that this program can't read.
var errStored = errors.New("stored request can't be read: another release wrote it, or somebody changed it")

// wildcards returns the names of the path values of a route's pattern, of net/http's ServeMux or of
// chi, where a name may be followed by a regular expression with braces of its own.
func wildcards(pattern string) (names []string) {
	depth, begin := 0, 0
	for i := range len(pattern) {
		switch pattern[i] {
		case '*':
			if depth == 0 { // chi's
				names = append(names, "*")
			}
		case '{':
			if depth++; depth == 1 {
				begin = i + 1
			}
		case '}':
			if depth--; depth == 0 {
				name, _, _ := strings.Cut(pattern[begin:i], ":")
				names = append(names, strings.TrimSuffix(name, "..."))
			}
		}
	}
	return names
}

// storeRequest encodes a request, with the headers of these names.
func storeRequest(r *http.Request, headers []string, router, body []byte) []byte {
	s := storedRequest{
		Version: storedVersion, Method: r.Method, Host: []byte(r.Host), URI: []byte(r.RequestURI), Path: []byte(r.URL.Path),
		RawPath: []byte(r.URL.RawPath), Query: []byte(r.URL.RawQuery), Pattern: r.Pattern,
		PathValues: map[string][]byte{}, Header: map[string][][]byte{}, Router: router, Body: body,
	}
	for _, name := range wildcards(r.Pattern) {
		s.PathValues[name] = []byte(r.PathValue(name))
	}
	for _, name := range headers {
		for _, value := range r.Header[name] {
			s.Header[name] = append(s.Header[name], []byte(value))
		}
	}
	encoded, err := json.Marshal(s)
	if err != nil { // strings and bytes
		panic(err)
	}
	return encoded
}

// restoreRequest returns a stored request, and separately its router's state and its body.
func restoreRequest(encoded []byte) (r *http.Request, router, body []byte, err error) {
	var s storedRequest
	if err := json.Unmarshal(encoded, &s); err != nil || s.Version != storedVersion || s.Method == "" {
		return nil, nil, nil, errStored
	}
	r, err = http.NewRequest(s.Method, "/", nil)
	if err != nil {
		return nil, nil, nil, errStored
	}
	r.URL = &url.URL{Path: string(s.Path), RawPath: string(s.RawPath), RawQuery: string(s.Query)}
	r.RequestURI, r.Host, r.Pattern = string(s.URI), string(s.Host), s.Pattern
	for name, values := range s.Header {
		for _, value := range values {
			r.Header.Add(name, string(value))
		}
	}
	for name, value := range s.PathValues {
		r.SetPathValue(name, string(value))
	}
	return r, s.Router, s.Body, nil
}

// stored encodes the request of this run.
func (run *run) stored() []byte {
	var router []byte
	if run.router != nil {
		router = run.router.Stored()
	}
	return storeRequest(run.request, run.m.stored, router, run.body)
}

// register lets open requests of the route run again on its handler, and be looked up.
func (m *Middleware) register(next http.Handler, at *mount) {
	if m.options.Accepted != nil {
		m.options.Accepted.register(m)
	}
	m.engine.Resumable(m.options.Resumable, func(key idempotency.Key, stored []byte) (idempotency.RunFunc, error) {
		r, router, body, err := restoreRequest(stored)
		if err != nil {
			return nil, err
		}
		run := &run{m: m, next: next, at: at, outer: http.Header{}, request: r, body: body, key: key}
		run.runs = 1 // the router's state is restored for each run from here on
		if m.options.RouterState != nil {
			if run.router, err = m.options.RouterState(r.Context(), router); err != nil {
				return nil, fmt.Errorf("restore the router's state: %w", err)
			}
		}
		return func(ctx context.Context) (*idempotency.Answer, error) {
			if m.options.ResumeContext != nil {
				ctx = m.options.ResumeContext(ctx, key.Scope, r)
			}
			return run.once(ctx)
		}, nil
	})
}

// ResumeContextFunc returns the context of a run without a client. From the scope of the key it
// adds the values that outer middleware would have added, such as the caller. The context must be
// derived from ctx. Options.RouterState restores the router's state after it.
type ResumeContextFunc func(ctx context.Context, scope string, r *http.Request) context.Context

// Completer returns a completer for the open requests of all resumable routes of this middleware,
// and of those made from it by With. It does nothing until its Run is called. Without OnResume it
// logs to Options.Logger.
func (m *Middleware) Completer(opts *idempotency.CompleterOptions) *idempotency.Completer {
	var o idempotency.CompleterOptions
	if opts != nil {
		o = *opts
	}
	if o.Logger == nil {
		o.Logger = m.options.Logger
	}
	return idempotency.NewCompleter(m.engine, &o)
}

// Resume runs the handler of an open request of one of these routes, if it is due, and returns its
// result: see [idempotency.Engine.Resume]. It is for a job queue or a workflow engine that runs
// open requests instead of a completer, or in addition to one. It is safe for concurrent use.
func (m *Middleware) Resume(ctx context.Context, key idempotency.Key) idempotency.Result {
	return m.engine.Resume(ctx, key)
}

// checkResumable panics if the options of a resumable route can't work.
func (o *Options) checkResumable() {
	for _, name := range o.StoreHeaders {
		if neverStored(http.CanonicalHeaderKey(name)) {
			panic(fmt.Sprintf("idempotency/middleware: Options.StoreHeaders names %s, which is never stored: let Options.ResumeContext make what a handler needs from the scope", http.CanonicalHeaderKey(name)))
		}
	}
	if o.Resumable != "" && o.Optional {
		panic("idempotency/middleware: a route with Options.Resumable needs a key: calls to other services can't be repeated without one")
	}
	if o.Accepted != nil && o.Resumable == "" {
		panic("idempotency/middleware: Options.Accepted needs Options.Resumable: the requests of other routes are settled when they are answered")
	}
}
