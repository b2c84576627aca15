package probe

import (
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
)

// publicHeaders are the headers that are printed as they are. All others may be credentials.
var publicHeaders = []string{
	"Accept", "Accept-Language", "Content-Type", "Idempotency-Key", "Prefer", "User-Agent",
}

// public reports whether a header is printed as it is.
func public(name string) bool {
	return slices.ContainsFunc(publicHeaders, func(p string) bool { return strings.EqualFold(p, name) })
}

// The owners of secrets, as they begin the names of variables.
const (
	ofCaller       = ""
	ofSecondCaller = "OTHER_"
	ofURL          = "URL_"
	ofEffectsURL   = "EFFECTS_URL_"
)

// of returns the caller whose header it is.
func of(second bool) string {
	if second {
		return ofSecondCaller
	}
	return ofCaller
}

// variable returns the name of the shell variable that stands for the value of a header or of a
// parameter in a query: AUTHORIZATION, OTHER_AUTHORIZATION, URL_API_KEY.
func variable(owner, name string) string {
	return owner + strings.Map(func(r rune) rune {
		if r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' {
			return r
		}
		return '_'
	}, strings.ToUpper(name))
}

// parameter is a part of a query: name=value. If it is only a value, its name is query.
type parameter struct {
	name, value string
	bare        bool
}

// parameters returns the parts of a query, as they are encoded.
func parameters(query string) (all []parameter) {
	for _, text := range strings.Split(query, "&") {
		name, value, found := strings.Cut(text, "=")
		if !found {
			name, value = "query", text
		}
		all = append(all, parameter{name, value, !found})
	}
	return all
}

// maskedURL returns a URL with variables in place of the values in its query. Between double
// quotes, a shell puts the values in again.
func maskedURL(u *url.URL) string {
	masked := (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}).String()
	if u.RawQuery == "" {
		return masked
	}
	escape := strings.NewReplacer(`\`, `\\`, `"`, `\"`, "`", "\\`", "$", `\$`).Replace
	var query []string
	for _, p := range parameters(u.RawQuery) {
		var text string
		if !p.bare {
			text = escape(p.name) + "="
		}
		if p.value != "" {
			text += "$" + variable(ofURL, p.name)
		}
		query = append(query, text)
	}
	return escape(masked) + "?" + strings.Join(query, "&")
}

const (
	// maskedBytesMin is the minimum length of a secret that is replaced wherever it occurs in a text,
	// for example in an answer that quotes it.
	maskedBytesMin = 4
	// maskedPartBytesMin is the minimum length of a part of a secret that is replaced in answers.
	maskedPartBytesMin = 8
)

// masker replaces secrets in texts by the names of variables: the values of the callers' headers
// and of the queries of URLs, and the credentials inside of them.
type masker struct {
	whole *strings.Replacer
	parts map[string]string // names by each part of maskedPartBytesMin bytes
}

func newMasker(c *Config) *masker {
	names := map[string]string{} // by secret
	add := func(name string, secrets ...string) {
		for _, secret := range secrets {
			if len(secret) >= maskedBytesMin && names[secret] == "" {
				names[secret] = name
			}
		}
	}
	headers := func(owner string, fields []Field) {
		for _, f := range fields {
			if !public(f.Name) {
				add("$"+variable(owner, f.Name), credentials(f)...)
			}
		}
	}
	query := func(owner string, u *url.URL) {
		for _, p := range parameters(u.RawQuery) {
			plain, _ := url.QueryUnescape(p.value)
			for _, value := range []string{p.value, plain} {
				if !strings.Contains(u.Path, value) { // a word of the path is shown in any case
					add("$"+variable(owner, p.name), value)
				}
			}
		}
	}
	headers(ofCaller, c.Header)
	headers(ofSecondCaller, c.SecondHeader)
	query(ofURL, c.URL)
	if c.EffectsURL != nil {
		query(ofEffectsURL, c.EffectsURL)
	}
	m := &masker{parts: map[string]string{}}
	var pairs []string
	for _, secret := range slices.SortedFunc(maps.Keys(names), func(a, b string) int { return len(b) - len(a) }) {
		pairs = append(pairs, secret, names[secret])
		for i := maskedPartBytesMin; i <= len(secret); i++ {
			m.parts[secret[i-maskedPartBytesMin:i]] = names[secret]
		}
	}
	m.whole = strings.NewReplacer(pairs...)
	return m
}

// credentials returns a header's value, and the secrets inside of it: what follows a scheme such as
// Bearer, the values of cookies and of parameters, and the password of Basic.
func credentials(f Field) []string {
	value := strings.TrimSpace(f.Value)
	all := []string{value}
	rest := value
	if scheme, after, found := strings.Cut(value, " "); found && token(scheme) && strings.HasSuffix(strings.ToLower(f.Name), "authorization") {
		rest = after
		request := http.Request{Header: http.Header{"Authorization": {value}}}
		if _, password, ok := request.BasicAuth(); ok {
			all = append(all, password)
		}
	}
	for _, word := range strings.FieldsFunc(rest, func(r rune) bool { return strings.ContainsRune(" \t;,", r) }) {
		_, after, _ := strings.Cut(word, "=")
		all = append(all, strings.Trim(word, `"`), strings.Trim(after, `"`))
	}
	return all
}

// quoted masks a text of an answer. In it a part of a secret is masked too.
func (m *masker) quoted(text string) string {
	text = m.whole.Replace(text)
	var masked strings.Builder
	for at := 0; at < len(text); {
		end, name := at, ""
		for i := at; i <= end && i+maskedPartBytesMin <= len(text); i++ {
			if n := m.parts[text[i:i+maskedPartBytesMin]]; n != "" {
				end, name = i+maskedPartBytesMin, n
			}
		}
		if name == "" {
			masked.WriteByte(text[at])
			at++
			continue
		}
		masked.WriteString(name)
		at = end
	}
	return masked.String()
}
