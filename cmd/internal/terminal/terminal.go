// Package terminal makes text that somebody else wrote fit to be shown at a terminal: a scope, a header or a server's message may
// hold what moves the cursor, sets the window's title or turns the writing around.
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

// Clean returns text as it is if all of it can be seen, and else quoted, as in Go.
func Clean(text string) string {
	for _, r := range text {
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			return strconv.Quote(text)
		}
	}
	return text
}

// CleanLines is Clean of each line.
func CleanLines(text string) string {
	lines := strings.Split(text, "\n")
	for i := range lines {
		lines[i] = Clean(lines[i])
	}
	return strings.Join(lines, "\n")
}

// WriteJSON writes value as JSON and a line feed, indented by indent if that is not empty. What can't be seen is escaped: encoding/json
// leaves DEL, the controls above it and the marks that turn the writing around as they are. The value of the JSON is the same.
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

// escape writes what can't be seen as \u, which JSON takes in strings. Outside of strings JSON has none of it but spaces and line feeds.
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
