package middleware

import (
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/paidonce/idempotency"
)

// RecordedHeaders returns the names of the answer headers that are recorded and replayed. Their
// values are those at the end of the handler, including values that outer middleware set before it.
// All other headers go out with the first answer only. Content-Encoding is recorded if the handler
// set it: a compressor outside encodes a replay too.
func RecordedHeaders() []string {
	return []string{
		"Cache-Control", "Content-Disposition", "Content-Encoding", "Content-Language", "Content-Type", "Etag",
		"Link", "Location", "Retry-After", "Vary",
	}
}

// neverRecorded reports whether a header carries a credential, belongs to one connection or one
// origin, or is ours.
func neverRecorded(name string) bool {
	switch name {
	case "Authorization", "Cookie", "Set-Cookie", "Set-Cookie2", "Proxy-Authorization", "Proxy-Authenticate",
		"Proxy-Authentication-Info", "Authentication-Info", "Www-Authenticate",
		"Connection", "Keep-Alive", "Proxy-Connection", "Te", "Trailer", "Transfer-Encoding", "Upgrade",
		"Content-Length", "Date":
		return true
	}
	return ours(name) || ofOrigin(name) || strings.HasPrefix(name, http.TrailerPrefix)
}

// ofOrigin reports whether a header tells a browser which site may read the answer: a retry may
// come from another site.
func ofOrigin(name string) bool { return strings.HasPrefix(name, "Access-Control-") }

// ours reports whether a header is the middleware's to set.
func ours(name string) bool {
	return strings.HasPrefix(name, "Idempotency-") || strings.HasPrefix(name, "Idempotent-")
}

// recordable returns the headers of an answer that are recorded: those on the allow-list, even if
// outer middleware set them, so that the record is the whole answer and does not depend on today's
// outer middleware. It leaves out headers that Connection names, and a Content-Encoding that was
// set outside. The values are copies.
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
	copies := make([]string, 0, len(header)) // of all values, if each header has one
	for spelled, values := range header {
		name := http.CanonicalHeaderKey(spelled) // a handler may write the map itself: ETag
		if !allowed[name] || neverRecorded(name) || slices.Contains(named, name) {
			continue
		}
		if name == "Content-Encoding" && slices.Equal(values, before[spelled]) {
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

// replay merges recorded headers into those that are set outside. They replace them, in any
// spelling, except Vary, which becomes the union of both. An answer without a Content-Type is
// replayed without one: net/http, or middleware by the retry's Accept header, would make one up.
func replay(outside http.Header, recorded map[string][]string) {
	for spelled := range outside {
		name := http.CanonicalHeaderKey(spelled)
		if _, replaced := recorded[name]; replaced && name != spelled {
			if name == "Vary" {
				outside[name] = append(slices.Clip(outside[name]), outside[spelled]...)
			}
			delete(outside, spelled)
		}
	}
	for name, values := range recorded {
		switch {
		case ofOrigin(http.CanonicalHeaderKey(name)):
			// Earlier releases recorded these headers if RecordHeaders listed them.
		case name == "Vary":
			outside[name] = mergeVary(outside[name], values)
		default:
			outside[name] = values
		}
	}
	if _, set := recorded["Content-Type"]; !set {
		outside["Content-Type"] = nil
	}
	delete(outside, "Content-Length")
}

// mergeVary returns the outside values, followed by each recorded value that contains a name which
// the outside values lack.
func mergeVary(outside, recorded []string) []string {
	merged := slices.Clip(outside)
	for _, value := range recorded {
		for name := range strings.SplitSeq(value, ",") {
			if !slices.ContainsFunc(outside, func(list string) bool { return listed(list, name) }) {
				merged = append(merged, value)
				break
			}
		}
	}
	return merged
}

// listed reports whether a comma-separated list contains a name, ignoring case.
func listed(list, name string) bool {
	for one := range strings.SplitSeq(list, ",") {
		if strings.EqualFold(strings.TrimSpace(one), strings.TrimSpace(name)) {
			return true
		}
	}
	return false
}

// cleanValue returns the value as net/http would send it: with spaces for line breaks, and trimmed.
// Other control characters become spaces too: net/http would send them, and they would fail
// elsewhere.
func cleanValue(value string) string {
	var clean []byte            // a copy, if one is needed
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

// StatusAndLocation is an [Options].Reduce for answers that contain a secret, such as a one-time
// password. It records the answer's status and its Location. The first client gets the whole
// answer; a retry gets status and Location, and an empty body.
//
//	passwords := idem.With(func(o *middleware.Options) { o.Reduce = middleware.StatusAndLocation })
func StatusAndLocation(answer idempotency.Answer) idempotency.Answer {
	reduced := idempotency.Answer{Status: answer.Status}
	if location := answer.Header["Location"]; len(location) > 0 {
		reduced.Header = map[string][]string{"Location": slices.Clone(location)}
	}
	return reduced
}

// errHeaderPlanted is the error of a record that is not replayed, because no attempt records such a
// header.
var errHeaderPlanted = fmt.Errorf("%w: it holds a header that is never recorded", idempotency.ErrRecordCorrupt)

// vet returns an error if a recorded answer must not be replayed. It must be an answer that could
// have been recorded, whatever the store checks, and have no header that carries a credential,
// frames the message or belongs to the middleware. The route's allow-list does not matter: it may
// have changed since the answer was recorded.
func vet(answer *idempotency.Answer) error {
	if err := answer.Validate(); err != nil {
		return fmt.Errorf("%w: %w", idempotency.ErrRecordCorrupt, err)
	}
	for name := range answer.Header {
		if name = http.CanonicalHeaderKey(name); neverRecorded(name) && !ofOrigin(name) {
			return errHeaderPlanted
		}
	}
	return nil
}
