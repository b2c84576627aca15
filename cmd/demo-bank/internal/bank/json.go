package bank

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
)

// integer is a JSON number written as an integer: 100, but not 100.0, 1e2 or "100".
type integer struct {
	value int64
	set   bool
}

func (n *integer) UnmarshalJSON(data []byte) error {
	value, err := strconv.ParseInt(string(data), 10, 64)
	if err != nil {
		return errors.New("it must be an integer of at most 64 bits")
	}
	n.value, n.set = value, true
	return nil
}

// text is a JSON string. Null is refused: nothing in the bank's requests is nullable.
type text string

func (t *text) UnmarshalJSON(data []byte) error {
	var s *string
	if err := json.Unmarshal(data, &s); err != nil || s == nil {
		return errors.New("it must be a string")
	}
	*t = text(*s)
	return nil
}

// decodeObject reads one JSON object into fields, by exact name. It is stricter than encoding/json:
// it refuses a field that is unknown, duplicated or spelled in another case, and anything after the
// object. The error is an `invalid-json` problem if the body is not a JSON object, and otherwise a
// problem with the given slug.
func decodeObject(body []byte, slug string, fields map[string]json.Unmarshaler) error {
	if !json.Valid(body) {
		return invalid("invalid-json", "The body is not one JSON value.")
	}
	decoder := json.NewDecoder(bytes.NewReader(body))
	if token, err := decoder.Token(); err != nil || token != json.Delim('{') {
		return invalid("invalid-json", "The body is not a JSON object.")
	}
	seen := make(map[string]bool, len(fields))
	for decoder.More() {
		token, err := decoder.Token()
		name, ok := token.(string)
		if err != nil || !ok {
			return invalid("invalid-json", "The body is not a JSON object.")
		}
		field, known := fields[name]
		switch {
		case !known:
			return invalid(slug, fmt.Sprintf("The field %.64q is unknown.", name))
		case seen[name]:
			return invalid(slug, fmt.Sprintf("The field %q is given twice.", name))
		}
		seen[name] = true
		var raw json.RawMessage
		if err := decoder.Decode(&raw); err != nil {
			return invalid("invalid-json", "The body is not a JSON object.")
		}
		if err := field.UnmarshalJSON(raw); err != nil {
			return invalid(slug, fmt.Sprintf("The field %q is refused: %v.", name, err))
		}
	}
	return nil
}

// bodyBytesMax limits a body that the middleware does not read. The middleware has its own limit.
const bodyBytesMax = 1 << 20

func readBody(r io.Reader) ([]byte, error) {
	body, err := io.ReadAll(io.LimitReader(r, bodyBytesMax+1))
	switch {
	case err != nil:
		return nil, invalid("body-unread", "The body could not be read.")
	case len(body) > bodyBytesMax:
		return nil, refusal(413, "body-too-large", "The body is too large", fmt.Sprintf("The body is over %d bytes.", bodyBytesMax))
	}
	return body, nil
}
