package bank

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"testing"
)

// FuzzDecodeTransfer: if decodeTransfer accepts a body, so does strict encoding/json, with the same
// result. Otherwise it returns a problem. It never panics.
func FuzzDecodeTransfer(f *testing.F) {
	for _, seed := range []string{
		`{"from":"alice","to":"bob","amount":1250}`,
		`{"from":"alice","to":"bob","amount":1,"currency":"EUR","reference":"Rent \u00fc \ud83d\ude00"}`,
		` {"amount":9223372036854775807,"to":"a","from":"b"} `,
		`{"from":"alice","to":"bob","amount":1e2}`,
		`{"from":"alice","to":"bob","amount":-0}`,
		`{"from":"alice","From":"bob","amount":1}`,
		`{"from":"alice","to":"bob","amount":1}{}`,
		`{"from":"\ud800","to":"bob","amount":1}`,
		`[{"from":1}]`, `{"a":{"b":[1,2,{"c":null}]}}`, `"`, "\xff",
	} {
		f.Add([]byte(seed))
	}
	type plain struct {
		From      string `json:"from"`
		To        string `json:"to"`
		Amount    int64  `json:"amount"`
		Currency  string `json:"currency"`
		Reference string `json:"reference"`
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var from, to, currency, reference text
		var amount integer
		err := decodeObject(body, "invalid-transfer", map[string]json.Unmarshaler{
			"from": &from, "to": &to, "amount": &amount, "currency": &currency, "reference": &reference,
		})
		if _, workErr := (&Bank{}).decodeTransfer(body); err != nil && workErr == nil {
			t.Fatalf("%q: decodeTransfer takes what decodeObject refuses: %v", body, err)
		}
		if err != nil {
			var problem *Problem
			if !errors.As(err, &problem) || problem.Status != 400 {
				t.Fatalf("%q: %v is not a problem with 400", body, err)
			}
			return
		}
		decoder := json.NewDecoder(bytes.NewReader(body))
		decoder.DisallowUnknownFields()
		var want plain
		if err := decoder.Decode(&want); err != nil {
			t.Fatalf("%q is taken, and is not what encoding/json takes: %v", body, err)
		}
		if _, err := decoder.Token(); err != io.EOF {
			t.Fatalf("%q is taken, with something behind the object", body)
		}
		if got := (plain{string(from), string(to), amount.value, string(currency), string(reference)}); got != want {
			t.Fatalf("%q reads as %+v, encoding/json reads %+v", body, got, want)
		}
	})
}

func TestOnlyTheBanksOwnSpellingIsAnID(t *testing.T) {
	t.Parallel()
	for text, ok := range map[string]bool{
		"0": true, "1": true, "9223372036854775807": true,
		"": false, "01": false, "+1": false, "-1": false, "1.0": false, "9223372036854775808": false, " 1": false, "1_0": false,
	} {
		if _, err := parseID(text); (err == nil) != ok {
			t.Errorf("parseID(%q): %v", text, err)
		}
	}
}
