package effect

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"reflect"
	"strconv"
	"strings"
)

// formBytesMax bounds the form of an output in the reason for an operator.
const formBytesMax = 500

// stated records the output that a person stated, as if Do had returned it. If Do could not have
// returned it, the request is left to a person: a wrong form would be decoded to zero values, and
// posted. The reason has nothing of what was typed, which may be private.
func (r *run[In, Out]) stated() (out Out, err error) {
	out, fits := fromStatement[Out](r.effect.Output)
	_, unencodable := encodeOutput(out) // an output may be longer than the text that was typed
	switch {
	case len(r.effect.Output) > OutputBytesMax, fits && unencodable != nil:
		return r.park(fmt.Sprintf("the stated result has over %d bytes, and nothing was sent", OutputBytesMax), nil)
	case fits:
		return r.done(out)
	}
	return r.park("the stated result does not fit, and nothing was sent: state it again (idemctl effect settle --done), with exactly the fields and types of "+formOf[Out](), nil)
}

// fromStatement decodes an output that a person stated, and reports whether it fits: nothing of it
// is lost, and nothing of the output is missing.
func fromStatement[Out any](stated []byte) (out Out, fits bool) {
	out, err := decodeStrictly[Out](stated)
	if err != nil {
		return out, false
	}
	again, err := json.Marshal(out)
	if err != nil {
		return out, false
	}
	a, aTokens := parseJSON(stated)
	b, bTokens := parseJSON(again)
	// A text in which a JSON key comes twice has more tokens. Null decodes to nothing: even a
	// pointer needs a value.
	return out, a != nil && aTokens == bTokens && sameJSON(a, b)
}

// formOf returns an output of this type as JSON, with zero values.
func formOf[Out any]() string {
	var zero any = *new(Out)
	if t := reflect.TypeFor[Out](); t.Kind() == reflect.Pointer {
		zero = reflect.New(t.Elem()).Interface()
	}
	form, err := json.Marshal(zero)
	switch {
	case err != nil:
		return "the output of Do"
	case len(form) > formBytesMax:
		return strings.ToValidUTF8(string(form[:formBytesMax]), "") + " ..."
	}
	return strings.ToValidUTF8(string(form), "")
}

// parseJSON returns the value of a valid text, and the number of its tokens.
func parseJSON(text []byte) (value any, tokens int) {
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber()
	_ = decoder.Decode(&value)
	decoder = json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber()
	for {
		if _, err := decoder.Token(); err != nil {
			return value, tokens
		}
		tokens++
	}
}

// sameJSON reports whether two values of parseJSON are the same, however their numbers are spelt.
func sameJSON(a, b any) bool {
	switch a := a.(type) {
	case map[string]any:
		b, ok := b.(map[string]any)
		for name, value := range a {
			other, has := b[name]
			ok = ok && has && sameJSON(value, other)
		}
		return ok && len(a) == len(b)
	case []any:
		b, ok := b.([]any)
		ok = ok && len(a) == len(b)
		for i := range a {
			ok = ok && sameJSON(a[i], b[i])
		}
		return ok
	case json.Number:
		b, ok := b.(json.Number)
		return ok && decimal(a) == decimal(b)
	}
	return a == b
}

// decimal returns one spelling for all spellings of a number. It is exact: no two numbers have the
// same one, however large they are.
func decimal(number json.Number) string {
	mantissa, power, _ := strings.Cut(strings.ToLower(string(number)), "e")
	exponent, err := strconv.Atoi(cmp.Or(power, "0"))
	mantissa, negative := strings.CutPrefix(mantissa, "-")
	whole, fraction, _ := strings.Cut(mantissa, ".")
	digits := strings.TrimLeft(whole+fraction, "0")
	significant := strings.TrimRight(digits, "0")
	switch {
	case significant == "":
		return "0"
	case err != nil: // an exponent that no number type has
		return string(number)
	}
	return fmt.Sprintf("%t %se%d", negative, significant, exponent-len(fraction)+len(digits)-len(significant))
}
