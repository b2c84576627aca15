package effect

import (
	"encoding/json"
	"strings"
	"testing"
)

type paid struct {
	ID     string `json:"id"`
	Amount int64  `json:"amount"`
}

// A person's JSON fits only if the output of Do could have been recorded as it, number by number.
func TestStatementFitsOnlyIfNothingIsLostOrMissing(t *testing.T) {
	t.Parallel()
	type fee struct {
		Rate float64 `json:"rate"`
		Note string  `json:"note,omitempty"`
	}
	type nested struct {
		Of   paid           `json:"of"`
		Tags map[string]int `json:"tags"`
		List []paid         `json:"list"`
		Next *paid          `json:"next"`
	}
	ofPaid, ofFee, ofNested := fits[paid], fits[fee], fits[nested]
	for _, c := range []struct {
		fits func(string) bool
		text string
		want bool
	}{
		{ofPaid, `{"id":"ch_1","amount":900}`, true},
		{ofPaid, " { \"amount\" : 900,\n\"id\":\"ch_\\u0031\" } ", true},
		{ofPaid, `{"id":"","amount":0}`, true},
		{ofPaid, `{"id":"ch_1","amount":-0}`, true},
		{ofPaid, `{"id":"ch_1","amount":9007199254740993}`, true},
		{ofPaid, `{"id":"ch_1","amount":9223372036854775807}`, true},
		{ofPaid, `{"id":"ch_1","amount":9223372036854775808}`, false},
		{ofPaid, `{"id":"ch_1","amount":1e400}`, false},
		{ofPaid, `{"id":"ch_1","amount":900.5}`, false},
		{ofPaid, `{"id":"ch_1","amount":"900"}`, false},
		{ofPaid, `{"id":17,"amount":900}`, false},
		{ofPaid, `{"id":null,"amount":900}`, false},
		{ofPaid, `{"id":"ch_1","amount":900,"currency":"EUR"}`, false},
		{ofPaid, `{"id":"ch_1"}`, false},
		{ofPaid, `{"amount":900}`, false},
		{ofPaid, `{"ID":"ch_1","Amount":900}`, false},
		{ofPaid, `{"id":"ch_1","amount":1,"amount":900}`, false},
		{ofPaid, `{"id":"ch_1","amount":900}{}`, false},
		{ofPaid, `{"id":"ch_1","amount":900} x`, false},
		{ofPaid, `{}`, false},
		{ofPaid, `[]`, false},
		{ofPaid, `"ch_1"`, false},
		{ofPaid, `null`, false},
		{ofPaid, ``, false},
		{fits[*paid], `{"id":"ch_1","amount":900}`, true},
		{fits[*paid], `{"id":"ch_1"}`, false},
		{fits[*paid], `null`, false}, // a pointer could be nil: its handler would fail in every run
		{ofFee, `{"rate":1.50}`, true},
		{ofFee, `{"rate":15e-1,"note":"x"}`, true},
		{ofFee, `{"rate":1e21}`, true},
		{ofFee, `{"rate":0.1}`, true},
		{ofFee, `{"rate":9007199254740993}`, false}, // it would become ...992
		{ofFee, `{"rate":1e400}`, false},
		{ofFee, `{"rate":1.5,"note":""}`, false},
		{ofNested, `{"of":{"id":"a","amount":1},"tags":{"b":2,"a":1},"list":[{"amount":2,"id":"b"}],"next":null}`, true},
		{ofNested, `{"of":{"id":"a","amount":1},"tags":{},"list":[],"next":{"id":"c","amount":3}}`, true},
		{ofNested, `{"of":{"id":"a"},"tags":{},"list":[],"next":null}`, false},
		{ofNested, `{"of":{"id":"a","amount":1},"tags":{"a":1,"a":2},"list":[],"next":null}`, false},
		{ofNested, `{"of":{"id":"a","amount":1},"tags":{},"list":[{"id":"b"}],"next":null}`, false},
		{ofNested, `{"of":{"id":"a","amount":1},"tags":{},"list":[]}`, false},
		{fits[struct{}], `{}`, true},
		{fits[struct{}], `{"id":"ch_1"}`, false},
		{fits[[]int], `[1,2]`, true},
		{fits[[2]int], `[1]`, false},
		{fits[[2]int], `[1,2,3]`, false},
		{fits[bool], `true`, true},
		{fits[any], `{"n":1e999999999999999999999}`, false},
		{fits[json.RawMessage], `{"n":1e999999999999999999999}`, true},
	} {
		if got := c.fits(c.text); got != c.want {
			t.Errorf("%s: fits %v, want %v", c.text, got, c.want)
		}
	}
}

func fits[Out any](text string) bool {
	_, ok := fromStatement[Out]([]byte(text))
	return ok
}

func TestDecimalIsOneSpellingOfANumber(t *testing.T) {
	t.Parallel()
	seen := map[string]json.Number{}
	for _, same := range [][]json.Number{
		{"0", "-0", "0.0", "0e7", "-0.00E-3"}, {"900", "9e2", "900.00", "0.9E+3", "9000e-1"}, {"-1.5", "-15e-1"}, {"15", "1.5e1"}, {"1.5", "0.15e1"},
		{"9007199254740993"}, {"9007199254740992"}, {"1e999999999"}, {"1e1000000000"}, {"1e99999999999999999999"}, {"2e99999999999999999999"},
	} {
		for _, number := range same {
			if decimal(number) != decimal(same[0]) {
				t.Errorf("%s and %s are the same number", number, same[0])
			}
		}
		if other, taken := seen[decimal(same[0])]; taken {
			t.Errorf("%s and %s are different numbers", same[0], other)
		}
		seen[decimal(same[0])] = same[0]
	}
}

// The form comes from the type alone, and has a bounded length.
func TestFormOfAnOutput(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ got, want string }{
		{formOf[paid](), `{"id":"","amount":0}`},
		{formOf[*paid](), `{"id":"","amount":0}`},
		{formOf[struct{}](), `{}`},
		{formOf[chan int](), "the output of Do"},
		{formOf[[249]int](), "[" + strings.Repeat("0,", 248) + "0]"}, // 499 bytes
		{formOf[[250]int](), "[" + strings.Repeat("0,", 249) + "0 ..."},
	} {
		if c.got != c.want {
			t.Errorf("%s, want %s", c.got, c.want)
		}
	}
}
