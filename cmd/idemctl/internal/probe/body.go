package probe

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"regexp"
	"strconv"
	"strings"
)

// The placeholders of a body. A logical request is a request with all of its retries. Each has
// values of its own.
const (
	placeholderInt  = "{{int}}"  // 1, 3, 5, ..., because ids may be 1, 2, 3
	placeholderUUID = "{{uuid}}" // a random UUID
)

// bodies makes the bodies of logical requests.
type bodies struct {
	template string
	values   [][]string // the values that were filled in, one slice per body
}

// next returns the body of a new logical request.
func (b *bodies) next() []byte {
	number, id := strconv.Itoa(2*len(b.values)+1), newUUID()
	b.values = append(b.values, []string{number, id})
	return []byte(strings.NewReplacer(placeholderInt, number, placeholderUUID, id).Replace(b.template))
}

// varies reports whether two logical requests have different bodies.
func (b *bodies) varies() bool {
	return strings.Contains(b.template, placeholderInt) || strings.Contains(b.template, placeholderUUID)
}

// addedField is the field that is added to a JSON body without a number to change.
const addedField = `"probe"`

// onlyAdds reports whether another body only has a field more, which an API may ignore.
func (b *bodies) onlyAdds(other []byte) bool {
	return bytes.Contains(other, []byte(addedField)) && !strings.Contains(b.template, addedField)
}

var digits = regexp.MustCompile(`[0-9]+`)

// others returns other bodies for a template without placeholders. They differ in their meaning,
// and not only in their spelling. The likeliest to be valid comes first.
func (b *bodies) others() [][]byte {
	var others [][]byte
	add := func(other string) { others = append(others, []byte(other)) }
	var object map[string]json.RawMessage
	decoder := json.NewDecoder(strings.NewReader(b.template))
	decoder.UseNumber()
	switch {
	case strings.TrimSpace(b.template) == "":
		add(`{` + addedField + `:1}`)
	case json.Valid([]byte(b.template)):
		for {
			value, err := decoder.Token()
			if err != nil {
				break
			}
			number, _ := value.(json.Number)
			if n, err := strconv.ParseInt(number.String(), 10, 64); err == nil {
				end := int(decoder.InputOffset())
				add(b.template[:end-len(number)] + strconv.FormatInt(n+1, 10) + b.template[end:])
			}
		}
		if json.Unmarshal([]byte(b.template), &object) == nil && object != nil {
			object[strings.Trim(addedField, `"`)] = json.RawMessage("1")
			if text, err := json.Marshal(object); err == nil {
				add(string(text))
			}
		}
	default: // a form, for example
		for _, at := range digits.FindAllStringIndex(b.template, -1) {
			if n, err := strconv.ParseInt(b.template[at[0]:at[1]], 10, 64); err == nil {
				add(b.template[:at[0]] + strconv.FormatInt(n+1, 10) + b.template[at[1]:])
			}
		}
		add(b.template + "1")
	}
	const othersMax = 4
	return others[:min(len(others), othersMax)]
}

// contentType returns the type of a body, if the user gives none.
func contentType(body []byte) string {
	if json.Valid(bytes.TrimSpace(body)) {
		return "application/json"
	}
	return "application/x-www-form-urlencoded"
}

// newUUID returns a random UUID (RFC 9562, version 4) with at least one letter.
func newUUID() string {
	for {
		var u [16]byte
		_, _ = rand.Read(u[:]) // never fails: crypto/rand ends the process instead
		u[6], u[8] = u[6]&0x0f|0x40, u[8]&0x3f|0x80
		if text := fmt.Sprintf("%x-%x-%x-%x-%x", u[0:4], u[4:6], u[6:8], u[8:10], u[10:]); strings.ContainsAny(text, "abcdef") {
			return text
		}
	}
}
