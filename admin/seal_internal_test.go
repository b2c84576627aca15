package admin

import (
	"strings"
	"testing"
	"unicode/utf8"
)

// Only sealed tokens are opened, only for their purpose, and with the sealed value.
func FuzzOpen(f *testing.F) {
	s := newSealer([]byte(strings.Repeat("s", SecretBytesMin)))
	ref := keyRef{"acme", "key-1"}
	f.Add(s.seal(purposeList, ref), "acme", "key-1")
	f.Add("", "", "")
	f.Add("AAAA", "sc\"ope", "<key>")
	f.Add(strings.Repeat("A", 100), "é", "\\")
	f.Fuzz(func(t *testing.T, token, scope, value string) {
		if err := s.open(purposeKey, token, new(keyRef)); err == nil {
			t.Errorf("%q is opened", token)
		}
		if !utf8.ValidString(scope) || !utf8.ValidString(value) {
			return // no sealed value is a scope or a key
		}
		var got keyRef
		want := keyRef{scope, value}
		sealed := s.seal(purposeKey, want)
		if err := s.open(purposeKey, sealed, &got); err != nil || got != want {
			t.Errorf("%q became %q: %v", want, got, err)
		}
		if strings.Trim(sealed, "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			t.Errorf("%q is not safe in a URL", sealed)
		}
		if newSealer(nil).open(purposeKey, sealed, &got) == nil {
			t.Error("another secret opens it")
		}
		if s.open(purposeKey, sealed+token, &got) == nil && token != "" {
			t.Errorf("it is opened with %q behind it", token)
		}
	})
}
