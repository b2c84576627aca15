package middleware

import (
	"net/http"
	"net/http/httptest"
	"reflect"
	"testing"
)

// The record has an answer's headers on the allow-list, whoever set them, except those that
// Connection names, those that are never recorded, and the encoding of a compressor outside.
func TestRecordable(t *testing.T) {
	t.Parallel()
	allowed := map[string]bool{"Etag": true, "Vary": true, "Location": true, "Set-Cookie": true, "Content-Encoding": true, "Www-Authenticate": true, "Access-Control-Allow-Origin": true}
	for name, c := range map[string]struct {
		header, outer http.Header
		want          map[string][]string
	}{
		"the allow-list alone":         {http.Header{"Location": {"/a"}, "X-Own": {"x"}}, nil, map[string][]string{"Location": {"/a"}}},
		"never, though it is allowed":  {http.Header{"Set-Cookie": {"session=secret"}, "Www-Authenticate": {"Bearer"}, "access-control-allow-origin": {"*"}}, nil, map[string][]string{}},
		"named by Connection":          {http.Header{"Connection": {"close, etag ,VARY"}, "Etag": {"x"}, "Vary": {"y"}, "Location": {"/a"}}, nil, map[string][]string{"Location": {"/a"}}},
		"named by a second Connection": {http.Header{"Connection": {"close", "etag"}, "Etag": {"x"}}, nil, map[string][]string{}},
		"set outside and left alone":   {http.Header{"Vary": {"Origin"}, "Etag": {"x"}}, http.Header{"Vary": {"Origin"}}, map[string][]string{"Etag": {"x"}, "Vary": {"Origin"}}},
		"encoded outside":              {http.Header{"Content-Encoding": {"gzip"}}, http.Header{"Content-Encoding": {"gzip"}}, map[string][]string{}},
		"encoded inside":               {http.Header{"Content-Encoding": {"br"}}, http.Header{"Content-Encoding": {"gzip"}}, map[string][]string{"Content-Encoding": {"br"}}},
		"set outside and added to":     {http.Header{"Vary": {"Origin", "Accept"}}, http.Header{"Vary": {"Origin"}}, map[string][]string{"Vary": {"Origin", "Accept"}}},
	} {
		if got := recordable(c.header, c.outer, allowed); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: recorded %v, want %v", name, got, c.want)
		}
	}
}

// On a replay recorded headers replace those set outside, in any spelling; Vary is the union of
// both.
func TestReplayReplaces(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		outside  http.Header
		recorded map[string][]string
		want     http.Header
	}{
		"what is outside alone stays": {http.Header{"X-Frame-Options": {"DENY"}, "Cache-Control": {"no-store"}}, map[string][]string{"Content-Type": {"a/b"}},
			http.Header{"X-Frame-Options": {"DENY"}, "Cache-Control": {"no-store"}, "Content-Type": {"a/b"}}},
		"replaced":                 {http.Header{"Content-Type": {"a/b"}, "ETag": {"1"}}, map[string][]string{"Content-Type": {"c/d"}, "Etag": {"2"}}, http.Header{"Content-Type": {"c/d"}, "Etag": {"2"}}},
		"no type was recorded":     {http.Header{"Content-Type": {"a/b"}}, nil, http.Header{"Content-Type": nil}},
		"a length outside":         {http.Header{"Content-Length": {"9"}}, map[string][]string{"Content-Type": {"c/d"}}, http.Header{"Content-Type": {"c/d"}}},
		"Vary of both":             {http.Header{"Vary": {"Origin"}, "vary": {"Cookie"}}, map[string][]string{"Content-Type": {"c/d"}, "Vary": {"ORIGIN", "Accept"}}, http.Header{"Content-Type": {"c/d"}, "Vary": {"Origin", "Cookie", "Accept"}}},
		"Vary, a list in a value":  {http.Header{"Vary": {"Origin, Accept"}}, map[string][]string{"Content-Type": {"c/d"}, "Vary": {"accept , origin", "Accept, Cookie"}}, http.Header{"Content-Type": {"c/d"}, "Vary": {"Origin, Accept", "Accept, Cookie"}}},
		"Vary of the record alone": {http.Header{}, map[string][]string{"Content-Type": {"c/d"}, "Vary": {"Accept"}}, http.Header{"Content-Type": {"c/d"}, "Vary": {"Accept"}}},
		"recorded by a release before": {http.Header{"Access-Control-Allow-Origin": {"https://b"}}, map[string][]string{"Content-Type": {"c/d"}, "Access-Control-Allow-Origin": {"https://a"}},
			http.Header{"Content-Type": {"c/d"}, "Access-Control-Allow-Origin": {"https://b"}}},
	} {
		if replay(c.outside, c.recorded); !reflect.DeepEqual(c.outside, c.want) {
			t.Errorf("%s: %v, want %v", name, c.outside, c.want)
		}
	}
}

// The status of a scope function counts if it is a refusal; any other becomes 401.
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
