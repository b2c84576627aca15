package terminal_test

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"unicode"

	"github.com/paidonce/idempotency/cmd/internal/terminal"
)

// hostile is text that a terminal would obey: CSI, OSC, a bidirectional mark, DEL, and others.
const hostile = "ac\u009b2J\u009d0;title\u009c\u202eme\x7f\x1b[2J\u2066\u200b\u2028\U000e0041\u00ad\ufeff"

func TestCleanTextMovesNoCursor(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"acme": "acme", "Größe 日本": "Größe 日本", "": "", hostile: `"ac\u009b2J\u009d0;title\u009c\u202eme\x7f\x1b[2J\u2066\u200b\u2028\U000e0041\u00ad\ufeff"`,
		"a\xff": `"a\xff"`, "a\tb": `"a\tb"`,
	} {
		if got := terminal.Clean(text); got != want {
			t.Errorf("Clean(%q) = %s, want %s", text, got, want)
		}
	}
}

func TestCleanLines(t *testing.T) {
	t.Parallel()
	if got, want := terminal.CleanLines("one\n\x1b[2Jtwo\nthree"), "one\n\"\\x1b[2Jtwo\"\nthree"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestJSONMovesNoCursor(t *testing.T) {
	t.Parallel()
	check(t, hostile)
	check(t, "acme <&> Größe 日本 😀 \" \\ \\u009b")
}

func FuzzJSONMovesNoCursor(f *testing.F) {
	f.Add(hostile)
	f.Add("a\xff\"\\")
	f.Fuzz(func(t *testing.T, text string) { check(t, text) })
}

// check writes text as a name and a value, and reads the same back.
func check(t *testing.T, text string) {
	t.Helper()
	text = strings.ToValidUTF8(text, "\ufffd") // as encoding/json does
	for _, indent := range []string{"", "  "} {
		var out bytes.Buffer
		if err := terminal.WriteJSON(&out, map[string]string{text: text}, indent); err != nil {
			t.Fatal(err)
		}
		for _, r := range out.String() {
			if r != '\n' && !unicode.IsPrint(r) {
				t.Errorf("%q is written as %q, with %U in it", text, out.String(), r)
			}
		}
		var back map[string]string
		if err := json.Unmarshal(out.Bytes(), &back); err != nil || len(back) != 1 || back[text] != text {
			t.Errorf("%q is written as %s, and reads %q, %v", text, out.String(), back, err)
		}
	}
}
