package middleware

import (
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/paidonce/idempotency"
)

// RecordedHeaders returns the names of the answer headers that are recorded and replayed. What else a handler sets goes
// out with the first answer only.
func RecordedHeaders() []string {
	return []string{
		"Cache-Control", "Content-Disposition", "Content-Encoding", "Content-Language", "Content-Type", "Etag",
		"Link", "Location", "Retry-After", "Vary",
	}
}

// neverRecorded reports whether a header carries a credential, belongs to one connection, or is ours.
func neverRecorded(name string) bool {
	switch name {
	case "Authorization", "Cookie", "Set-Cookie", "Set-Cookie2", "Proxy-Authorization", "Proxy-Authenticate",
		"Proxy-Authentication-Info", "Authentication-Info", "Www-Authenticate",
		"Connection", "Keep-Alive", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade",
		"Content-Length", "Date":
		return true
	}
	return ours(name) || strings.HasPrefix(name, http.TrailerPrefix)
}

// ours reports whether a header is the middleware's to set.
func ours(name string) bool {
	return strings.HasPrefix(name, "Idempotency-") || strings.HasPrefix(name, "Idempotent-")
}

// recordable returns what of an answer's headers is recorded: those of the allow-list that the handler changed, but
// none that Connection names. The values are copies.
func recordable(header, before http.Header, allowed map[string]bool) map[string][]string {
	var named []string
	for spelled, values := range header {
		if http.CanonicalHeaderKey(spelled) != "Connection" {
			continue
		}
		for _, value := range values {
			for name := range strings.SplitSeq(value, ",") {
				named = append(named, http.CanonicalHeaderKey(strings.TrimSpace(name)))
			}
		}
	}
	recorded := make(map[string][]string)
	copies := make([]string, 0, len(header)) // of all values, where each header has one
	for spelled, values := range header {
		name := http.CanonicalHeaderKey(spelled) // a handler may write the map itself: ETag
		if !allowed[name] || neverRecorded(name) || slices.Contains(named, name) || slices.Equal(values, before[name]) {
			continue
		}
		first := len(copies)
		for _, value := range values {
			copies = append(copies, cleanValue(value))
		}
		switch own := copies[first:len(copies):len(copies)]; {
		case len(own) == 0:
		case recorded[name] == nil:
			recorded[name] = own
		default: // spelled in two ways
			recorded[name] = append(recorded[name], own...)
		}
	}
	return recorded
}

// cleanValue makes a value what net/http would send: line breaks become spaces, and it is trimmed. Other control
// characters, which net/http leaves to fail elsewhere, become spaces too.
func cleanValue(value string) string {
	var clean []byte            // a copy, where one is needed
	for i := range len(value) { // not runes: a value need not be UTF-8
		if c := value[i]; c < ' ' && c != '\t' || c == 0x7f {
			if clean == nil {
				clean = []byte(value)
			}
			clean[i] = ' '
		}
	}
	if clean != nil {
		value = string(clean)
	}
	return strings.Trim(value, " \t")
}

// StatusAndLocation is an idempotency.Options.Reduce for routes whose answers hold what must not lie in a table, such as
// a one-time password: of an answer its status and its Location are recorded. The first client gets all of it; a retry
// gets status and Location, and an empty body.
//
//	passwords := idem.With(func(o *middleware.Options) { o.Engine.Reduce = middleware.StatusAndLocation })
func StatusAndLocation(answer idempotency.Answer) idempotency.Answer {
	reduced := idempotency.Answer{Status: answer.Status}
	if location := answer.Header["Location"]; len(location) > 0 {
		reduced.Header = map[string][]string{"Location": slices.Clone(location)}
	}
	return reduced
}

// errHeaderPlanted is why a record is not answered from. Nothing ever recorded such a header.
var errHeaderPlanted = fmt.Errorf("%w: it holds a header that is never recorded", idempotency.ErrRecordCorrupt)

// vet says why a recorded answer may not be replayed, and is nil where it may: it must be one that could have been recorded, whatever the
// store checks, and hold no header that carries a credential, frames the message or speaks for the middleware. Whether
// the route's allow-list has its headers now is not asked: a replay is what was recorded.
func vet(answer *idempotency.Answer) error {
	if err := answer.Validate(); err != nil {
		return fmt.Errorf("%w: %w", idempotency.ErrRecordCorrupt, err)
	}
	for name := range answer.Header {
		if neverRecorded(http.CanonicalHeaderKey(name)) {
			return errHeaderPlanted
		}
	}
	return nil
}
