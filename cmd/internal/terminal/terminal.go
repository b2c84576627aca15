// Package terminal makes untrusted text safe to print at a terminal: a scope, a header or a
// server's message may contain characters that move the cursor, set the window's title or reverse
// the writing direction.
package terminal

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// Clean returns text unchanged if it is all printable, and otherwise as a quoted Go string.
func Clean(text string) string {
	for _, r := range text {
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			return strconv.Quote(text)
		}
	}
	return text
}

// CleanLines applies Clean to each line.
func CleanLines(text string) string {
	lines := strings.Split(text, "\n")
	for i := range lines {
		lines[i] = Clean(lines[i])
	}
	return strings.Join(lines, "\n")
}

// WriteJSON writes value as JSON and a line feed, indented by indent if that is not empty.
// Unprintable characters are escaped: encoding/json does not escape DEL, the controls above it and
// bidirectional marks. The value of the JSON is the same.
func WriteJSON(w io.Writer, value any, indent string) error {
	var plain bytes.Buffer
	encoder := json.NewEncoder(&plain)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", indent)
	if err := encoder.Encode(value); err != nil {
		return err
	}
	_, err := w.Write(escape(plain.Bytes()))
	return err
}

// escape writes unprintable characters as \u, which is valid in JSON strings. Outside strings, the
// only ones in JSON are spaces and line feeds.
func escape(text []byte) []byte {
	escaped := make([]byte, 0, len(text))
	for len(text) > 0 {
		r, size := utf8.DecodeRune(text)
		switch {
		case r == '\n' || unicode.IsPrint(r):
			escaped = append(escaped, text[:size]...)
		case r <= 0xffff:
			escaped = fmt.Appendf(escaped, `\u%04x`, r)
		default:
			high, low := utf16.EncodeRune(r)
			escaped = fmt.Appendf(escaped, `\u%04x\u%04x`, high, low)
		}
		text = text[size:]
	}
	return escaped
}
