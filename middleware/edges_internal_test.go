package middleware

import (
	"net/http"
	"net/http/httptest"
	"reflect"
	"testing"
)

// What is recorded is what the handler changed of the allow-list, without what Connection names and what is never recorded.
func TestRecordable(t *testing.T) {
	t.Parallel()
	allowed := map[string]bool{"Etag": true, "Vary": true, "Location": true, "Set-Cookie": true}
	for name, c := range map[string]struct {
		header, outer http.Header
		want          map[string][]string
	}{
		"the allow-list alone":         {http.Header{"Location": {"/a"}, "X-Own": {"x"}}, nil, map[string][]string{"Location": {"/a"}}},
		"never, though it is allowed":  {http.Header{"Set-Cookie": {"session=secret"}}, nil, map[string][]string{}},
		"named by Connection":          {http.Header{"Connection": {"close, etag ,VARY"}, "Etag": {"x"}, "Vary": {"y"}, "Location": {"/a"}}, nil, map[string][]string{"Location": {"/a"}}},
		"named by a second Connection": {http.Header{"Connection": {"close", "etag"}, "Etag": {"x"}}, nil, map[string][]string{}},
		"set outside and left alone":   {http.Header{"Vary": {"Origin"}, "Etag": {"x"}}, http.Header{"Vary": {"Origin"}}, map[string][]string{"Etag": {"x"}}},
		"set outside and added to":     {http.Header{"Vary": {"Origin", "Accept"}}, http.Header{"Vary": {"Origin"}}, map[string][]string{"Vary": {"Origin", "Accept"}}},
	} {
		if got := recordable(c.header, c.outer, allowed); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: recorded %v, want %v", name, got, c.want)
		}
	}
}

// A scope function's status counts where it is a refusal; nothing else can be made of it.
func TestStatusOfAScopeError(t *testing.T) {
	t.Parallel()
	for status, want := range map[int]int{0: 401, 200: 401, 399: 401, 400: 400, 429: 429, 599: 599, 600: 401} {
		m := New(stubStore{}, func(*http.Request) (string, error) { return "", &StatusError{Status: status} }, nil)
		w, r := httptest.NewRecorder(), httptest.NewRequest("POST", "/", nil)
		r.Header.Set("Idempotency-Key", "k")
		m.Handler(http.NotFoundHandler()).ServeHTTP(w, r)
		if w.Code != want {
			t.Errorf("status %d became %d, want %d", status, w.Code, want)
		}
	}
}
