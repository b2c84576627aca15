package middleware_test

import (
	"bufio"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
)

// Keys that are refused, each as the bytes of its header lines.
func TestKeyInvalid(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, transfer)
	for name, lines := range map[string]string{
		"empty":                      "Idempotency-Key:",
		"spaces":                     "Idempotency-Key:   ",
		"empty string":               `Idempotency-Key: ""`,
		"two headers":                "Idempotency-Key: a\r\nIdempotency-Key: b",
		"two equal headers":          "Idempotency-Key: a\r\nIdempotency-Key: a",
		"a list":                     "Idempotency-Key: a, b",
		"a list of strings":          `Idempotency-Key: "a", "b"`,
		"256 characters":             "Idempotency-Key: " + strings.Repeat("k", 256),
		"256 characters quoted":      `Idempotency-Key: "` + strings.Repeat("k", 256) + `"`,
		"byte 0x80":                  "Idempotency-Key: a\x80",
		"UTF-8":                      "Idempotency-Key: schlüssel",
		"UTF-8 quoted":               `Idempotency-Key: "schlüssel"`,
		"inner tab":                  "Idempotency-Key: a\tb",
		"inner space":                "Idempotency-Key: a b",
		"inner space, quoted":        `Idempotency-Key: "a b"`,
		"folded":                     "Idempotency-Key: a\r\n b",
		"comma":                      "Idempotency-Key: a,b",
		"comma, quoted":              `Idempotency-Key: "a,b"`,
		"quote inside":               `Idempotency-Key: a"b`,
		"quote inside, quoted":       `Idempotency-Key: "a\"b"`,
		"unterminated quote":         `Idempotency-Key: "a`,
		"only a quote":               `Idempotency-Key: "`,
		"quote at the end":           `Idempotency-Key: a"`,
		"parameters":                 `Idempotency-Key: "a";version=1`,
		"something after the string": `Idempotency-Key: "a"b`,
	} {
		t.Run(name, func(t *testing.T) {
			got := b.raw(t, "POST / HTTP/1.1\r\nHost: x\r\nAccount: acme\r\n"+lines+"\r\nContent-Length: 2\r\n\r\n{}")
			want(t, got, 400, idempotency.OutcomeNotExecuted, idempotency.ReasonKeyInvalid)
		})
	}
	// net/http refuses these itself, before any handler.
	for name, key := range map[string]string{"NUL": "a\x00b", "DEL": "a\x7fb", "ESC": "a\x1bb", "bare CR": "a\rb", "900 KB": strings.Repeat("k", 900_000)} {
		t.Run(name, func(t *testing.T) {
			conn := b.dial(t)
			_, _ = io.WriteString(conn, "POST / HTTP/1.1\r\nHost: x\r\nAccount: acme\r\nIdempotency-Key: "+key+"\r\nContent-Length: 2\r\n\r\n{}")
			response, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil {
				return // cut off before it was read to the end
			}
			_ = response.Body.Close()
			if response.StatusCode != 400 && response.StatusCode != 431 {
				t.Errorf("status %d", response.StatusCode)
			}
		})
	}
	if b.runs.Load() != 0 || b.records(t) != 0 {
		t.Errorf("%d runs, %d records", b.runs.Load(), b.records(t))
	}
}

func TestKeysThatAreFine(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, transfer)
	for i, spellings := range [][]string{
		{"k", `"k"`, "  k  ", "\t\"k\" "},
		{"8e03978e-40d5-43e8-bc93-6894a57f9324", `"8e03978e-40d5-43e8-bc93-6894a57f9324"`},
		{strings.Repeat("k", 255), `"` + strings.Repeat("k", 255) + `"`},
		{"';DROP-TABLE-idempotency_keys;--", `"';DROP-TABLE-idempotency_keys;--"`},
		{`a\b`, `"a\\b"`},
		{"!#$%&'()*+-./:;<=>?@[]^_`{|}~", "\"!#$%&'()*+-./:;<=>?@[]^_`{|}~\""},
	} {
		for n, spelling := range spellings {
			outcome := idempotency.OutcomeReplayed
			if n == 0 {
				outcome = idempotency.OutcomeExecuted
			}
			got := b.raw(t, "POST / HTTP/1.1\r\nHost: x\r\nAccount: acme\r\nIdempotency-Key:"+spelling+"\r\nContent-Length: 2\r\n\r\n{}")
			want(t, got, 201, outcome, "")
		}
		if b.records(t) != i+1 {
			t.Errorf("%d records after %q", b.records(t), spellings)
		}
	}
}

func TestKeyLengthLimitsOfARoute(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{middleware: &middleware.Options{KeyBytesMin: 8, KeyBytesMax: 10}}, transfer)
	for length, status := range map[int]int{7: 400, 8: 201, 10: 201, 11: 400} {
		if got := b.post(t, "/", "{}", "Idempotency-Key", `"`+strings.Repeat("k", length)+`"`); got.status != status {
			t.Errorf("%d characters: %d, want %d", length, got.status, status)
		}
	}
}

func TestKeyMissing(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, transfer)
	want(t, b.post(t, "/transfers", "{}"), 400, idempotency.OutcomeNotExecuted, idempotency.ReasonKeyMissing)
	want(t, b.post(t, "/transfers?idempotency-key=k", `{"idempotency_key":"k"}`, "Idempotency_Key", "k"), 400, idempotency.OutcomeNotExecuted, idempotency.ReasonKeyMissing)
	trailer := b.raw(t, "POST /transfers HTTP/1.1\r\nHost: x\r\nAccount: acme\r\nTransfer-Encoding: chunked\r\nTrailer: Idempotency-Key\r\n\r\n2\r\n{}\r\n0\r\nIdempotency-Key: k\r\n\r\n")
	want(t, trailer, 400, idempotency.OutcomeNotExecuted, idempotency.ReasonKeyMissing)
	if b.runs.Load() != 0 {
		t.Error("the handler ran")
	}
}

func TestOptionalKey(t *testing.T) {
	t.Parallel()
	status := http.StatusCreated
	b := setup(t, setupOptions{middleware: &middleware.Options{Optional: true}}, func(w http.ResponseWriter, r *http.Request) {
		transfer(&headerless{w}, r)
		w.WriteHeader(status)
	})
	want(t, b.post(t, "/", "{}"), 201, idempotency.OutcomeExecuted, "")
	want(t, b.post(t, "/", "{}"), 201, idempotency.OutcomeExecuted, "")
	status = http.StatusPaymentRequired
	want(t, b.post(t, "/", "{}"), 402, idempotency.OutcomeNotExecuted, "")
	status = http.StatusInternalServerError
	want(t, b.post(t, "/", "{}"), 500, idempotency.OutcomeNotExecuted, "")
	if b.effects(t) != 2 || b.records(t) != 0 {
		t.Errorf("%d effects, %d records; want 2 and none", b.effects(t), b.records(t))
	}
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "a b"), 400, idempotency.OutcomeNotExecuted, idempotency.ReasonKeyInvalid)
	status = http.StatusCreated
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 201, idempotency.OutcomeExecuted, "")
	want(t, b.post(t, "/", "{}", "Idempotency-Key", "k"), 201, idempotency.OutcomeReplayed, "")
}

// Two spellings of the header's name are two headers.
func TestKeyTwiceInTwoSpellingsIsInvalid(t *testing.T) {
	t.Parallel()
	b := setup(t, setupOptions{}, transfer)
	got := b.raw(t, "POST / HTTP/1.1\r\nHost: x\r\nAccount: acme\r\nIdempotency-Key: k\r\nidempotency-key: k\r\nContent-Length: 2\r\n\r\n{}")
	want(t, got, 400, idempotency.OutcomeNotExecuted, idempotency.ReasonKeyInvalid)
}
