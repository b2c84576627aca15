package idempotency

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"regexp"
	"strings"
	"testing"
	"unicode/utf8"
)

// FuzzFingerprintV1 shows that no two requests give the same bytes to the hash: the bytes can be
// split into the five fields again, and the hash is over exactly these bytes.
func FuzzFingerprintV1(f *testing.F) {
	f.Add("POST", "/transfers", "", "application/json", []byte(`{}`))
	f.Fuzz(func(t *testing.T, method, path, query, contentType string, body []byte) {
		fields := []string{method, path, query, contentType, string(body)}
		var fed []byte
		for _, field := range fields {
			fed = appendField(fed, field)
		}
		rest := fed
		for i, want := range fields {
			if len(rest) < 8 || binary.BigEndian.Uint64(rest) > uint64(len(rest)-8) {
				t.Fatalf("field %d has no length: %x", i, rest)
			}
			end := 8 + binary.BigEndian.Uint64(rest)
			if got := string(rest[8:end]); got != want {
				t.Fatalf("field %d is %q, want %q", i, got, want)
			}
			rest = rest[end:]
		}
		if len(rest) > 0 {
			t.Fatalf("%d bytes belong to no field", len(rest))
		}
		fingerprint := NewFingerprintV1(method, path, query, contentType, body)
		if fingerprint.Version != 1 || fingerprint.Sum != sha256.Sum256(fed) {
			t.Fatalf("version %d, %x is not the hash of the fields", fingerprint.Version, fingerprint.Sum)
		}
		// If a byte moves from one field to the next, that is another request.
		for i := range 4 {
			moved := append([]string{}, fields...)
			if moved[i] == "" {
				continue
			}
			moved[i+1] = moved[i][len(moved[i])-1:] + moved[i+1]
			moved[i] = moved[i][:len(moved[i])-1]
			if fingerprint.Equal(NewFingerprintV1(moved[0], moved[1], moved[2], moved[3], []byte(moved[4]))) {
				t.Fatalf("%q and %q have one fingerprint", fields, moved)
			}
		}
	})
}

var keyValueRule = regexp.MustCompile(`\A[!#-+\x2d-~]{1,255}\z`)

// FuzzKeyValidate compares Validate with the same rule in another form, and each valid key with the
// requirements of a store.
func FuzzKeyValidate(f *testing.F) {
	f.Add("acme", "8e03978e-40d5-43dd-bc93-6894a57f9324")
	f.Fuzz(func(t *testing.T, scope, value string) {
		key := Key{Scope: scope, Value: value}
		err := key.Validate()
		scopeOK := scope != "" && len(scope) <= 255 && utf8.ValidString(scope) && !strings.Contains(scope, "\x00")
		valueOK := keyValueRule.MatchString(value)
		switch {
		case !scopeOK && !errors.Is(err, ErrScopeInvalid):
			t.Errorf("scope %q: %v", scope, err)
		case scopeOK && !valueOK && !errors.Is(err, ErrKeyInvalid):
			t.Errorf("value %q: %v", value, err)
		case scopeOK && valueOK && err != nil:
			t.Errorf("%q, %q: %v", scope, value, err)
		}
		if err != nil && (len(scope) > 80 && strings.Contains(err.Error(), scope) || len(value) > 80 && strings.Contains(err.Error(), value)) {
			t.Errorf("the error quotes the key: %v", err)
		}
		if shown := key.String(); len(shown) != 8 || strings.Trim(shown, "0123456789abcdef") != "" {
			t.Errorf("the key is shown as %q", shown)
		}
	})
}
