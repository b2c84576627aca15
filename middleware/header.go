package middleware

import (
	"net/http"
	"slices"
	"strings"
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
	for _, value := range header["Connection"] {
		for name := range strings.SplitSeq(value, ",") {
			named = append(named, http.CanonicalHeaderKey(strings.TrimSpace(name)))
		}
	}
	recorded := make(map[string][]string)
	for spelled, values := range header {
		name := http.CanonicalHeaderKey(spelled) // a handler may write the map itself: ETag
		if !allowed[name] || neverRecorded(name) || slices.Contains(named, name) || slices.Equal(values, before[name]) {
			continue
		}
		for _, value := range values {
			recorded[name] = append(recorded[name], cleanValue(value))
		}
	}
	return recorded
}

// cleanValue makes a value what net/http would send: line breaks become spaces, and it is trimmed. Other control
// characters, which net/http leaves to fail elsewhere, become spaces too.
func cleanValue(value string) string {
	clean := []byte(value) // not runes: a value need not be UTF-8
	for i, c := range clean {
		if c < ' ' && c != '\t' || c == 0x7f {
			clean[i] = ' '
		}
	}
	return strings.Trim(string(clean), " \t")
}
