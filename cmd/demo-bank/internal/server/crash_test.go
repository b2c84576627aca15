package server

import (
	"bytes"
	"encoding/binary"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/paidonce/idempotency/internal/crashpoint"
)

func TestTheSwitchNamesAPointAndACount(t *testing.T) {
	t.Parallel()
	for _, name := range append(crashpoint.Bank(), crashpoint.BankCalls()...) {
		for _, count := range []string{"1", "9223372036854775807"} {
			point, err := parseCrashPoint(name+":"+count, io.Discard)
			if err != nil || point.String() != name+":"+count {
				t.Errorf("%s:%s: %v %v", name, count, point, err)
			}
		}
	}
	for _, value := range []string{
		"", ":", ":1", "after_body", "after_body:", "after_body:0", "after_body:-1", "after_body:x", "after_body:1:1",
		"after_body:1 ", "after_body:9223372036854775808", "nowhere:1", "AFTER_BODY:1", " after_body:1",
	} {
		point, err := parseCrashPoint(value, io.Discard)
		if err == nil || point != nil {
			t.Errorf("%q is taken for %v", value, point)
			continue
		}
		if text := err.Error(); !strings.HasPrefix(text, crashpoint.BankVariable+" ") || strings.Contains(text, "\n") {
			t.Errorf("%q: %s", value, text)
		}
	}
}

func TestUnsetIsNoPoint(t *testing.T) {
	t.Setenv(crashpoint.BankVariable, "after_body:1") // Setenv restores the environment at the end
	if point, err := CrashPointFromEnvironment(io.Discard); err != nil || point == nil || point.String() != "after_body:1" {
		t.Errorf("set: %v %v", point, err)
	}
	t.Setenv(crashpoint.BankVariable, "")
	if point, err := CrashPointFromEnvironment(io.Discard); err == nil {
		t.Errorf("set to nothing: %v", point)
	}
	if err := os.Unsetenv(crashpoint.BankVariable); err != nil {
		t.Fatal(err)
	}
	if point, err := CrashPointFromEnvironment(io.Discard); err != nil || point != nil {
		t.Errorf("unset: %v %v", point, err)
	}
}

// TestOthersDoNotCount: only visits to the named point count, and only the n-th kills.
func TestOthersDoNotCount(t *testing.T) {
	t.Parallel()
	var stderr bytes.Buffer
	point, err := parseCrashPoint(crashpoint.AfterBody+":3", &stderr)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range crashpoint.Bank() {
		if name != crashpoint.AfterBody {
			for range 3 {
				point.reached(name)
			}
		}
	}
	point.reached(crashpoint.AfterBody)
	point.reached(crashpoint.AfterBody)
	if point.hits.Load() != 2 || stderr.Len() > 0 {
		t.Errorf("%d hits, and on stderr %q", point.hits.Load(), stderr.String())
	}
}

func TestOnlyWhatExecutesIsABatch(t *testing.T) {
	t.Parallel()
	message := func(kind byte, body string) string {
		return string(kind) + string(binary.BigEndian.AppendUint32(nil, uint32(4+len(body)))) + body
	}
	prepare := message('P', "name\x00DELETE\x00E\x00\x00") + message('D', "Sname\x00") + message('S', "")
	for _, test := range []struct {
		messages string
		want     bool
	}{
		{"", false},
		{"E", false},
		{prepare, false},
		{prepare[:len(prepare)-1], false},
		// An impossible length.
		{"P\x00\x00\x00\x00" + message('E', "\x00\x00\x00\x00\x00"), false},
		{prepare + message('B', "\x00name\x00\x00\x00\x00\x00\x00\x00") + message('E', "\x00\x00\x00\x00\x00"), true},
		{message('B', "\x00name\x00\x00\x00\x00\x00\x00\x00") + message('E', "\x00\x00\x00\x00\x00") + message('S', ""), true},
		{message('Q', "DELETE\x00"), true},
	} {
		if got := executes([]byte(test.messages)); got != test.want {
			t.Errorf("%q: %t", test.messages, got)
		}
	}
}
