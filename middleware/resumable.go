package middleware

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"

	"github.com/paidonce/idempotency"
)

// A resumable route keeps what a handler needs to run again without its client: the request. It is
// kept from the commit of the first call to another service on, and only then.

// StoredHeaders returns the names of the request headers that a resumed run has, beside those in
// Options.StoreHeaders.
func StoredHeaders() []string { return []string{"Accept", "Accept-Language", "Content-Type"} }

// neverStored reports whether a header carries a credential, or belongs to one connection.
func neverStored(name string) bool {
	switch name {
	case "Authorization", "Proxy-Authorization", "Cookie", "Connection", "Transfer-Encoding", "Upgrade", "Te", "Trailer":
		return true
	}
	return false
}

// storedRequest is a request as it is kept. Its fields only grow: requests that are open while a
// service is upgraded were written by the release before.
type storedRequest struct {
	Version    int               `json:"v"`
	Method     string            `json:"method"`
	Host       string            `json:"host,omitempty"`
	URI        string            `json:"uri"` // path and query, escaped
	Pattern    string            `json:"pattern,omitempty"`
	PathValues map[string]string `json:"path_values,omitempty"`
	Header     http.Header       `json:"header,omitempty"`
	Body       []byte            `json:"body,omitempty"`
}

const storedVersion = 1

// errStored is the error of a stored request that this program can't read.
var errStored = errors.New("stored request can't be read: another release wrote it, or somebody changed it")

// wildcard is a name in a route's pattern, of net/http's ServeMux or of chi.
var wildcard = regexp.MustCompile(`\{([A-Za-z_][A-Za-z0-9_]*)(:[^{}]*)?(\.\.\.)?\}`)

// stored returns the request in the form in which it is kept.
func (run *run) stored() []byte {
	r := run.request
	s := storedRequest{
		Version: storedVersion, Method: r.Method, Host: r.Host, URI: r.URL.RequestURI(), Pattern: r.Pattern,
		PathValues: map[string]string{}, Header: http.Header{}, Body: run.body,
	}
	for _, match := range wildcard.FindAllStringSubmatch(r.Pattern, -1) {
		s.PathValues[match[1]] = r.PathValue(match[1])
	}
	for _, name := range run.m.stored {
		if values := r.Header[name]; len(values) > 0 {
			s.Header[name] = slices.Clone(values)
		}
	}
	encoded, err := json.Marshal(s)
	if err != nil { // strings and bytes
		panic(err)
	}
	return encoded
}

// restoreRequest returns the request that was kept, without its body.
func restoreRequest(encoded []byte) (*http.Request, []byte, error) {
	var s storedRequest
	decoder := json.NewDecoder(bytes.NewReader(encoded))
	if err := decoder.Decode(&s); err != nil || s.Version != storedVersion || s.Method == "" || len(s.URI) == 0 || s.URI[0] != '/' {
		return nil, nil, errStored
	}
	target, err := url.ParseRequestURI(s.URI)
	if err != nil {
		return nil, nil, errStored
	}
	r, err := http.NewRequest(s.Method, "/", nil)
	if err != nil {
		return nil, nil, errStored
	}
	r.URL, r.RequestURI, r.Host, r.Pattern = target, s.URI, s.Host, s.Pattern
	for name, values := range s.Header {
		r.Header[http.CanonicalHeaderKey(name)] = values
	}
	for name, value := range s.PathValues {
		r.SetPathValue(name, value)
	}
	return r, s.Body, nil
}

// register lets open requests of the route run again on its handler.
func (m *Middleware) register(next http.Handler, at *mount) {
	m.engine.Resumable(m.options.Resumable, func(key idempotency.Key, stored []byte) (idempotency.RunFunc, error) {
		r, body, err := restoreRequest(stored)
		if err != nil {
			return nil, err
		}
		run := &run{m: m, next: next, at: at, outer: http.Header{}, request: r, body: body, key: key}
		return func(ctx context.Context) (*idempotency.Answer, error) {
			if m.options.ResumeContext != nil {
				ctx = m.options.ResumeContext(ctx, key.Scope, r)
			}
			run.runs = 0 // nothing of a router's is left over from a run before
			return run.once(ctx)
		}, nil
	})
}

// ResumeContextFunc returns the context of a run without a client. It adds the values that
// middleware outside would have added: the caller, by the scope of its key, and the state of a
// router, by the path values and the pattern of the request. It must not replace the context.
type ResumeContextFunc func(ctx context.Context, scope string, r *http.Request) context.Context

// Completer returns a completer of the open requests of all resumable routes that this middleware,
// and those made from it by With, have handlers for. It does nothing until its Run is called.
func (m *Middleware) Completer(opts *idempotency.CompleterOptions) *idempotency.Completer {
	return idempotency.NewCompleter(m.engine, opts)
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
}
