package middleware

import (
	"net/http"
	"strings"
)

const respondAsync = "respond-async"

// prefersAsync reports whether a request prefers an asynchronous answer (RFC 7240). Parameters and
// other preferences are ignored.
func prefersAsync(header http.Header) bool {
	for _, value := range header.Values("Prefer") {
		for more := true; more; {
			var preference string
			preference, value, more = cutUnquoted(value, ',')
			preference, _, _ = cutUnquoted(preference, ';')
			name, word, _ := strings.Cut(preference, "=")
			// An empty word is none.
			if word = strings.Trim(word, " \t"); word != "" && word != `""` {
				continue
			}
			if strings.EqualFold(strings.Trim(name, " \t"), respondAsync) {
				return true
			}
		}
	}
	return false
}

// cutUnquoted is strings.Cut for a separator outside of quoted strings (RFC 9110, section 5.6.4).
func cutUnquoted(s string, separator byte) (before, after string, found bool) {
	quoted := false
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '"':
			quoted = !quoted
		case quoted && s[i] == '\\':
			i++
		case !quoted && s[i] == separator:
			return s[:i], s[i+1:], true
		}
	}
	return s, "", false
}
