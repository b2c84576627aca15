package idempotency_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/memory"
)

const uuid = "8e03978e-40d5-43dd-bc93-6894a57f9324"

func TestKeyLimits(t *testing.T) {
	t.Parallel()
	s := func(n int) string { return strings.Repeat("x", n) }
	for name, test := range map[string]struct {
		scope, value string
		want         error
	}{
		"shortest":                      {"s", "v", nil},
		"no scope":                      {"", "v", idempotency.ErrScopeInvalid},
		"no value":                      {"s", "", idempotency.ErrKeyInvalid},
		"longest scope":                 {s(255), "v", nil},
		"scope over the limit":          {s(256), "v", idempotency.ErrScopeInvalid},
		"longest scope in bytes":        {s(252) + "日", "v", nil},
		"scope over the limit in bytes": {s(253) + "日", "v", idempotency.ErrScopeInvalid},
		"longest value":                 {"s", s(255), nil},
		"value over the limit":          {"s", s(256), idempotency.ErrKeyInvalid},
		"scope with NUL":                {"a\x00b", "v", idempotency.ErrScopeInvalid},
		"scope with U+0001":             {"a\x01b", "v", nil},
		"scope that is not UTF-8":       {"a\xffb", "v", idempotency.ErrScopeInvalid},
		"scope with half a rune":        {"a\xe6\x97", "v", idempotency.ErrScopeInvalid},
		"scope with a surrogate":        {"a\xed\xa0\x80", "v", idempotency.ErrScopeInvalid},
		"scope with spaces and quotes":  {` "a", b `, "v", nil},
		"both are wrong":                {"", "", idempotency.ErrScopeInvalid},
	} {
		err := idempotency.Key{Scope: test.scope, Value: test.value}.Validate()
		if !errors.Is(err, test.want) || (err == nil) != (test.want == nil) {
			t.Errorf("%s: %v, want %v", name, err, test.want)
		}
	}
}

func TestKeyCharacters(t *testing.T) {
	t.Parallel()
	for c := range 256 {
		allowed := c >= '!' && c <= '~' && c != ',' && c != '"'
		for _, value := range []string{string([]byte{byte(c)}), "a" + string([]byte{byte(c)}), string([]byte{byte(c)}) + "a"} {
			if err := idempotency.ValidateKeyValue(value); (err == nil) != allowed {
				t.Errorf("byte %#02x: %v", c, err)
			}
		}
	}
}

// No usual way of printing shows a part of a key.
func TestKeyIsNeverPrinted(t *testing.T) {
	t.Parallel()
	key := idempotency.Key{Scope: "scope-canary", Value: "value-canary"}
	const shown = "3ddf2a2a"
	values := map[string]any{
		"key": key, "pointer": &key, "slice": []idempotency.Key{key}, "map": map[idempotency.Key]idempotency.Key{key: key},
		"struct": struct{ Key idempotency.Key }{key}, "request": idempotency.Request{Key: key},
		"start": idempotency.RequestStart{Key: key}, "end": &idempotency.RequestEnd{Key: key},
	}
	var out bytes.Buffer
	for name, value := range values {
		for _, verb := range []string{"%v", "%+v", "%#v", "%q", "%s", "%x", "%d", "%c"} {
			if name == "pointer" && verb == "%#v" {
				verb = "%v" // an address
			}
			_, _ = fmt.Fprintf(&out, "%s "+verb+"\n", name, value)
		}
	}
	for _, handler := range []slog.Handler{slog.NewJSONHandler(&out, nil), slog.NewTextHandler(&out, nil)} {
		log := slog.New(handler)
		log.Info("a key", "key", key, "pointer", &key, slog.Group("group", "key", key), "error", key.Validate())
		log.With("key", key).WithGroup("g").Info("with", slog.Any("key", slog.AnyValue(key)))
	}
	if text := out.String(); strings.Contains(text, "canary") || strings.Contains(text, hex.EncodeToString([]byte("canary"))) {
		for line := range strings.Lines(text) {
			if strings.Contains(line, "canary") || strings.Contains(line, hex.EncodeToString([]byte("canary"))) {
				t.Errorf("a part of the key is shown: %s", line)
			}
		}
	}
	if key.String() != shown || !strings.Contains(out.String(), shown) {
		t.Errorf("the key is shown as %s, want %s", key, shown)
	}
	if other := (idempotency.Key{Scope: "scope-canar", Value: "yvalue-canary"}); other.String() == key.String() {
		t.Error("another key is shown as the same")
	}
}

// A hash in JSON looks like a key and can't be read back; the parts could end in a log.
func TestKeyIsNotEncoded(t *testing.T) {
	t.Parallel()
	key := idempotency.Key{Scope: "scope-canary", Value: "value-canary"}
	for name, value := range map[string]any{
		"key": key, "pointer": &key, "slice": []idempotency.Key{key}, "struct": struct{ Key idempotency.Key }{key},
		"map key": map[idempotency.Key]int{key: 1}, "request": idempotency.RequestStart{Key: key},
	} {
		out, err := json.Marshal(value)
		if err == nil || !strings.Contains(err.Error(), "encode its Scope and Value as fields of your own") {
			t.Errorf("%s: %s, %v, want an error that names the remedy", name, out, err)
		} else if strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: the error quotes the key: %v", name, err)
		}
	}
	var out bytes.Buffer
	slog.New(slog.NewJSONHandler(&out, nil)).Info("a struct", "request", idempotency.RequestStart{Key: key, Route: "POST /"})
	if text := out.String(); strings.Contains(text, "canary") {
		t.Errorf("a part of the key is logged: %s", text)
	}
}

func TestErrorsOfKeysQuoteNothing(t *testing.T) {
	t.Parallel()
	for _, key := range []idempotency.Key{
		{Scope: strings.Repeat("canary", 50), Value: "v"}, {Scope: "canary\xff", Value: "v"}, {Scope: "canary\x00", Value: "v"},
		{Scope: "canary", Value: ""}, {Scope: "canary", Value: "canary canary"}, {Scope: "canary", Value: strings.Repeat("canary", 50)},
	} {
		if err := key.Validate(); err == nil || strings.Contains(err.Error(), "canary") {
			t.Errorf("error %v", err)
		}
	}
}

// The numbers are frozen: programs of different versions must meet at the same lock. A separate
// program computed them. If this test fails, the code is wrong, not the test.
func TestLockNumberIsFrozen(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		table, scope, value string
		want                int64
	}{
		{"public.idempotency_keys", "acme", uuid, -4798804878288060922},
		{"payments.idempotency_keys", "acme", uuid, -4837978548708780599},
		{"public.idempotency_keys", "日本 ", "a:b", 6729151400251985763},
	} {
		key := idempotency.Key{Scope: test.scope, Value: test.value}
		if got := key.LockNumber(test.table); got != test.want {
			t.Errorf("%s, %s, %s: %d, want %d", test.table, test.scope, test.value, got, test.want)
		}
	}
}

func TestLockNumberJoinsNothing(t *testing.T) {
	t.Parallel()
	seen := map[int64]string{}
	for _, parts := range [][3]string{{"t", "a", "bc"}, {"t", "ab", "c"}, {"ta", "b", "c"}, {"t", "abc", ""}, {"t", "", "abc"}, {"tabc", "", ""}} {
		n := idempotency.Key{Scope: parts[1], Value: parts[2]}.LockNumber(parts[0])
		if other, ok := seen[n]; ok {
			t.Errorf("%q and %s have one lock", parts, other)
		}
		seen[n] = fmt.Sprintf("%q", parts)
	}
}

// The sums are frozen: another sum would turn every retry that crosses an upgrade into a mismatch.
// A separate program computed them. If this test fails, the code is wrong, not the test.
func TestFingerprintV1IsFrozen(t *testing.T) {
	t.Parallel()
	for want, got := range map[string]idempotency.Fingerprint{
		"fa3614b87790282aa184d1a4fe64a869c1caeaf6862faf51af459760f32b78ac": idempotency.NewFingerprintV1("POST", "/transfers", "", "application/json", []byte(`{"amount":"10.00"}`)),
		"70ad35c086e37dab24aff74883e1bc7294f3801f22c79df806b30a7660b36523": idempotency.NewFingerprintV1("PATCH", "/orders/%2F1", "a=1&b=%20", "", []byte{0, 255}),
		"2c34ce1df23b838c5abf2a7f6437cca3d3067ed509ff25f11df6b11b582b51eb": idempotency.NewFingerprintV1("", "", "", "", nil),
	} {
		if sum := hex.EncodeToString(got.Sum[:]); sum != want || got.Version != 1 {
			t.Errorf("version %d, %s; want version 1, %s", got.Version, sum, want)
		}
	}
	const want = "e3d38880db9cecf70391f2c3e9a244e63a50f16948937d76c01fec7b7d3f99b1"
	if got := idempotency.NewFingerprint(100, []byte("amount=10.00")); hex.EncodeToString(got.Sum[:]) != want || got.Version != 100 {
		t.Errorf("NewFingerprint: version %d, %x; want version 100, %s", got.Version, got.Sum, want)
	}
}

func TestFingerprintEqual(t *testing.T) {
	t.Parallel()
	one := idempotency.NewFingerprint(100, []byte("a"))
	if !one.Equal(idempotency.NewFingerprint(100, []byte("a"))) {
		t.Error("equal fingerprints differ")
	}
	if one.Equal(idempotency.NewFingerprint(101, []byte("a"))) {
		t.Error("fingerprints of two functions are equal")
	}
	for i := range one.Sum {
		other := one
		other.Sum[i] ^= 0x80
		if one.Equal(other) {
			t.Errorf("byte %d does not count", i)
		}
	}
}

// inHandler calls f with the context of an idempotent handler.
func inHandler(t *testing.T, key idempotency.Key, f func(ctx context.Context)) {
	t.Helper()
	inHandlerOf(t, nil, key, f)
}

func inHandlerOf(t *testing.T, opts *idempotency.Options, key idempotency.Key, f func(ctx context.Context)) {
	t.Helper()
	result := idempotency.NewEngine(memory.New(nil), opts).Do(t.Context(), idempotency.Request{Key: key, Fingerprint: idempotency.NewFingerprint(100, nil)}, func(ctx context.Context) (*idempotency.Answer, error) {
		f(ctx)
		return &idempotency.Answer{Status: 500}, nil
	})
	if result.Err != nil {
		t.Errorf("handler: %v", result.Err)
	}
}

// The keys are frozen: with another key the other service would make another payment. A separate
// program computed them. If this test fails, the code is wrong, not the test.
func TestDerivedKeyIsFrozen(t *testing.T) {
	t.Parallel()
	inHandler(t, idempotency.Key{Scope: "acme", Value: uuid}, func(ctx context.Context) {
		for name, want := range map[string]string{
			"ledger": "69ead1bd-247f-80b9-84ae-99dc207281b8",
			"":       "7d32d534-db72-8fb1-8a03-663198e9e822",
		} {
			if got := idempotency.DerivedKey(ctx, name); got != want {
				t.Errorf("name %q: %s, want %s", name, got, want)
			}
		}
	})
}

// With a service's name the derived keys are different, and frozen too.
func TestDerivedKeyOfAServiceIsFrozen(t *testing.T) {
	t.Parallel()
	for service, want := range map[string][2]string{
		"orders":                       {"84965852-9633-8e90-b0fe-559b571d7596", "8f7e5396-a817-8b8f-b114-89f303b7c0ff"},
		"refunds":                      {"2559c4af-3163-8fbe-8407-7d9fbaaaa9c4", "cab82dbb-31eb-8adc-b85a-634ee1881d42"},
		"acme":                         {"03d49daa-6da2-86e9-ab12-d2de2d06c86d", "d5c2a3f2-b0f7-8152-95f5-14693ed9cd43"},
		strings.Repeat("ü", 127) + "x": {"a6c6ee52-bad0-8dae-9a4a-992651216349", "16d38742-9f14-809b-b131-7d07f269c3d1"},
	} {
		inHandlerOf(t, &idempotency.Options{Service: service}, idempotency.Key{Scope: "acme", Value: uuid}, func(ctx context.Context) {
			for i, name := range []string{"ledger", ""} {
				if got := idempotency.DerivedKey(ctx, name); got != want[i] {
					t.Errorf("service %q, name %q: %s, want %s", service, name, got, want[i])
				}
			}
		})
	}
}

// Two services that share scopes, keys and names derive different keys, whatever they are called,
// and all replicas of one service derive the same.
func TestTwoServicesDeriveTwoKeys(t *testing.T) {
	t.Parallel()
	derive := func(service, scope, value, name string) (key string) {
		inHandlerOf(t, &idempotency.Options{Service: service}, idempotency.Key{Scope: scope, Value: value}, func(ctx context.Context) {
			key = idempotency.DerivedKey(ctx, name)
		})
		return key
	}
	seen := map[string][4]string{}
	for _, parts := range [][4]string{
		{"", "a", "b", "c"}, {"a", "a", "b", "c"}, {"ab", "a", "b", "c"}, {"a", "ba", "b", "c"}, {"b", "a", "b", "c"}, {"a", "b", "c", ""}, {"", "ab", "c", ""},
		{"paidonce derived key 1", "a", "b", "c"},
	} {
		key := derive(parts[0], parts[1], parts[2], parts[3])
		if other, ok := seen[key]; ok {
			t.Errorf("%q and %q derive one key", parts, other)
		}
		seen[key] = parts
		if derive(parts[0], parts[1], parts[2], parts[3]) != key {
			t.Errorf("another replica of %q derives another key", parts)
		}
	}
}

func TestNameOfAService(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ service, refused string }{
		"none":           {"", ""},
		"at the limit":   {strings.Repeat("a", idempotency.ServiceBytesMax), ""},
		"over the limit": {strings.Repeat("a", idempotency.ServiceBytesMax+1), "256 bytes, over the limit of 255"},
		"in bytes":       {strings.Repeat("ü", 128), "256 bytes, over the limit of 255"},
		"no UTF-8":       {"a\xff", "is not UTF-8"},
		"with a NUL":     {"a\x00b", "contains a NUL"},
		"with a space":   {"orders and refunds", ""},
	} {
		func() {
			defer func() {
				value := recover()
				text, _ := value.(string)
				if (value != nil) != (test.refused != "") || value != nil && !(strings.HasPrefix(text, "idempotency: Options.Service ") && strings.HasSuffix(text, test.refused)) {
					t.Errorf("%s: %v", name, value)
				}
			}()
			engine := idempotency.NewEngine(memory.New(nil), &idempotency.Options{Service: test.service})
			if engine.Options().Service != test.service || engine.With(&idempotency.Options{Service: test.service}).Options().Service != test.service {
				t.Errorf("%s: it has become %q", name, engine.Options().Service)
			}
		}()
	}
}

func TestDerivedKeyIsOnePerRequestAndName(t *testing.T) {
	t.Parallel()
	seen := map[string]bool{}
	derive := func(scope, value, name string) (key string) {
		inHandler(t, idempotency.Key{Scope: scope, Value: value}, func(ctx context.Context) {
			key = idempotency.DerivedKey(ctx, name)
			if again := idempotency.DerivedKey(ctx, name); again != key {
				t.Errorf("one attempt derives %s and %s", key, again)
			}
		})
		return key
	}
	for _, parts := range [][3]string{{"a", "bc", "d"}, {"ab", "c", "d"}, {"a", "b", "cd"}, {"a", "bcd", ""}, {"abc", "d", ""}} {
		key := derive(parts[0], parts[1], parts[2])
		if seen[key] {
			t.Errorf("%q derives the key of another", parts)
		}
		if derive(parts[0], parts[1], parts[2]) != key {
			t.Errorf("%q derives another key in another attempt", parts)
		}
		if idempotency.ValidateKeyValue(key) != nil || key[14] != '8' || !strings.Contains("89ab", key[19:20]) {
			t.Errorf("%s is not a version 8 UUID", key)
		}
		seen[key] = true
	}
	if first, second := derive("a", "", "d"), derive("a", "", "d"); first == second {
		t.Error("two requests without a key derive one")
	}
}

func TestDerivedKeyOutsideAHandlerPanics(t *testing.T) {
	t.Parallel()
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	idempotency.DerivedKey(t.Context(), "ledger")
}

func TestContextOutsideAHandler(t *testing.T) {
	t.Parallel()
	if id, ok := idempotency.AttemptIDFrom(t.Context()); ok || !id.IsZero() {
		t.Errorf("attempt %v, %v", id, ok)
	}
	if key, ok := idempotency.KeyFrom(t.Context()); ok || key != (idempotency.Key{}) {
		t.Errorf("key %v, %v", key, ok)
	}
}

func TestAttemptID(t *testing.T) {
	t.Parallel()
	id := idempotency.AttemptID{0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff}
	if got, want := id.String(), "00112233-4455-6677-8899-aabbccddeeff"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if id.IsZero() || !(idempotency.AttemptID{}).IsZero() {
		t.Error("IsZero is wrong")
	}
	seen := map[idempotency.AttemptID]bool{{}: true}
	for range 1000 {
		id := idempotency.NewAttemptID()
		if seen[id] {
			t.Fatalf("%v was drawn before", id)
		}
		seen[id] = true
	}
}
