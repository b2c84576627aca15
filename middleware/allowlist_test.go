package middleware_test

import (
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
)

// spellings writes a name as a handler may that fills the map itself.
func spellings(name string) []string {
	return []string{http.CanonicalHeaderKey(name), strings.ToLower(name), strings.ToUpper(name)}
}

// Whatever headers a handler sets, however it spells them: the record and the replay hold none but the allow-list's and
// the service's own, none that Connection names in any spelling, no credential, and no value that ends its line. The
// first client gets all of it that is not the middleware's own.
func TestReplayHoldsTheAllowListAndNothingElse(t *testing.T) {
	t.Parallel()
	own := []string{"X-Own", "x-request-cost"}
	allowed := []string{
		"cache-control", "content-disposition", "content-encoding", "content-language", "content-type", "etag", "link", "location",
		"retry-after", "vary", "x-own", "x-request-cost",
	}
	names := slices.Concat(allowed, allowed, neverOnTheWire, []string{
		"x-authorization", "x-api-key", "x-amz-security-token", "authorization-info", "set-cookie3", "cookie2", "x-forwarded-authorization",
		"idempotency-status", "idempotent-replayed", "idempotency-key", "location2", "server", "strict-transport-security", "refresh",
		"access-control-allow-origin", "access-control-expose-headers",
	})
	spelled := rapid.OneOf(
		rapid.Custom(func(t *rapid.T) string {
			return rapid.SampledFrom(spellings(rapid.SampledFrom(names).Draw(t, "name"))).Draw(t, "spelling")
		}),
		rapid.StringMatching(`[A-Za-z!#$%&'*+.^_|~-]{1,12}`), // any token
	)
	value := rapid.OneOf(rapid.String(), rapid.SampledFrom([]string{
		"", "x", "session=secret", "a\r\nSet-Cookie: b", "a\nb", "\x00", "close", "close, etag", "Location ,\tVARY", " x-own", "ü",
	}))
	rapid.Check(t, func(t *rapid.T) {
		set := rapid.MapOfN(spelled, rapid.SliceOfN(value, 0, 3), 0, 6).Draw(t, "headers")
		if rapid.Bool().Draw(t, "Connection names one of them") && len(set) > 0 {
			token := rapid.SampledFrom(slices.Sorted(maps.Keys(set))).Draw(t, "which")
			set[rapid.SampledFrom(spellings("Connection")).Draw(t, "spelling")] = []string{"close", "x , " + rapid.SampledFrom(spellings(token)).Draw(t, "token")}
		}
		store := memory.New(nil)
		scope := func(*http.Request) (string, error) { return "acme", nil }
		handler := middleware.New(store, scope, &middleware.Options{RecordHeaders: own, Logger: slog.New(slog.DiscardHandler)}).Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			for name, values := range set {
				w.Header()[name] = values
			}
			w.WriteHeader(http.StatusCreated)
		}))
		send := func() http.Header {
			r := httptest.NewRequest(http.MethodPost, "/", nil)
			r.Header.Set("Idempotency-Key", "k")
			w := httptest.NewRecorder()
			handler.ServeHTTP(w, r)
			if w.Code != http.StatusCreated {
				t.Fatalf("%d %s", w.Code, w.Body)
			}
			return w.Header()
		}
		first, again := send(), send()
		if first.Get("Idempotency-Status") != "executed" || again.Get("Idempotency-Status") != "replayed" {
			t.Fatalf("%v, then %v", first, again)
		}
		var named []string // by Connection
		for name, values := range set {
			if strings.EqualFold(name, "Connection") {
				for _, token := range strings.Split(strings.Join(values, ","), ",") {
					named = append(named, strings.ToLower(strings.TrimSpace(token)))
				}
			}
		}
		ours := []string{"idempotency-status", "idempotent-replayed", "idempotency-created-at", "idempotency-expires-at", "content-length"}
		recorded := store.Records()[idempotency.Key{Scope: "acme", Value: "k"}].Answer.Header
		for where, header := range map[string]map[string][]string{"the record": recorded, "the replay": again} {
			for name, values := range header {
				lower := strings.ToLower(name)
				if where == "the replay" && slices.Contains(ours, lower) {
					continue
				}
				if where == "the replay" && name == "Content-Type" && values == nil { // so that net/http guesses none
					continue
				}
				if !slices.Contains(allowed, lower) || slices.Contains(neverOnTheWire, lower) || slices.Contains(named, lower) {
					t.Fatalf("%s holds %s", where, name)
				}
				if strings.ContainsAny(strings.Join(values, ""), "\r\n\x00") {
					t.Fatalf("%s holds %s: %q", where, name, values)
				}
			}
		}
		if status := again.Values("Idempotency-Status"); len(status) != 1 || len(again.Values("Idempotent-Replayed")) != 1 {
			t.Fatalf("Idempotency-Status %q", status)
		}
		// And nothing of the allow-list is lost.
		for name, values := range set {
			lower := strings.ToLower(name)
			if slices.Contains(allowed, lower) && !slices.Contains(named, lower) && len(values) > 0 && len(recorded[http.CanonicalHeaderKey(name)]) < len(values) {
				t.Fatalf("%s: %q is recorded as %q", name, values, recorded[http.CanonicalHeaderKey(name)])
			}
		}
	})
}
