package psp

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestARestartFindsEverything: items, keys, declines, faults and the instance are in the file.
func TestARestartFindsEverything(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "psp")
	b := setup(t, func(c *Config) { c.File = file })
	ch := b.charge("k").field("id")
	b.do("POST", "/refunds", "k", `{"charge":"`+ch+`","amount":1}`)
	b.do("POST", "/payouts", "k", `{"iban":"DE1","amount":1}`)
	b.do("POST", "/mails", "", `{"to":"a","text":"<t> & \u2028 ü"}`)
	b.do("POST", "/charges", "no", `{"card":"0002","amount":1}`)
	b.faults(`{"seed":9,"keeps_declines":false}`)
	instance := b.server.Instance()
	look := func(b *bundle) (all []string) {
		for _, path := range []string{"/charges", "/refunds", "/payouts", "/mails", "/charges?key=k", "/faults", "/instance"} {
			all = append(all, b.do("GET", path, "", "").body)
		}
		return append(all, b.charge("k").body, b.do("POST", "/charges", "no", `{"card":"0002","amount":1}`).body,
			b.do("POST", "/charges", "no", `{"card":"other","amount":1}`).body)
	}
	before := look(b)
	b.stop()
	b = setup(t, func(c *Config) { c.File = file })
	if after := look(b); !slices.Equal(after, before) || b.server.Instance() != instance {
		t.Errorf("before %q, after %q", before, after)
	}
	if r := b.do("POST", "/refunds", "new", `{"charge":"`+ch+`","amount":1}`); !r.is(201, "") {
		t.Errorf("a refund of a charge from before: %+v", r)
	}
	if memory := setup(t); memory.server.Instance() == instance {
		t.Error("two processors have one instance")
	}
}

// TestATornLastLineIsCutOff: it was never acknowledged. Everything before it is kept, and lines
// that are written after it are found again.
func TestATornLastLineIsCutOff(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "psp")
	b := setup(t, func(c *Config) { c.File = file })
	b.charge("one")
	b.charge("two")
	b.stop()
	whole, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	lines := bytes.SplitAfter(bytes.TrimSuffix(whole, []byte("\n")), []byte("\n"))
	last := len(whole) - len(lines[len(lines)-1]) - 1
	for _, torn := range []int{last + 1, last + 10, len(whole) - 1, last} {
		if err := os.WriteFile(file, whole[:torn], 0o600); err != nil {
			t.Fatal(err)
		}
		b := setup(t, func(c *Config) { c.File = file })
		if n := len(b.items("/charges")); n != 1 {
			t.Errorf("torn at %d: %d charges, want the first", torn-last, n)
		}
		id := b.charge("two").field("id")
		b.stop()
		b = setup(t, func(c *Config) { c.File = file })
		if items := b.items("/charges?key=two"); len(items) != 1 || items[0]["id"] != id {
			t.Errorf("torn at %d: the charge after it is %v, want %s", torn-last, items, id)
		}
		b.stop()
	}

	// A file with a torn header counts as new, and so does an empty file.
	for torn := range len(lines[0]) - 1 {
		if err := os.WriteFile(file, whole[:torn], 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := openLedger(&Config{File: file, EntriesMax: 1})
		if err != nil {
			t.Fatalf("a header torn at %d: %v", torn, err)
		}
		if err := l.journal.close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestAFileOfAnotherFormatIsRefused: the error names it, and the file is not changed.
func TestAFileOfAnotherFormatIsRefused(t *testing.T) {
	t.Parallel()
	const good = `{"format":"demo-bank psp","version":1,"instance":"psp_1"}` + "\n"
	for name, content := range map[string]string{
		"text":                "hello\n",
		"text without an end": "hello",
		"one byte":            "x",
		"another JSON":        `{"format":"something","version":1,"instance":"i"}` + "\n",
		"another version":     `{"format":"demo-bank psp","version":2,"instance":"psp_1"}` + "\n",
		"no instance":         `{"format":"demo-bank psp","version":1}` + "\n",
		"one long line":       strings.Repeat("x", lineBytesMax+1),
		"a broken line":       good + "{\n" + `{"faults":{}}` + "\n",
		"an empty line":       good + "\n",
		"neither":             good + "{}\n",
		"both":                good + `{"faults":{},"entry":{"kind":"charges","key":"k","digest":"d","at":"2026-03-01T12:00:00Z","status":402,"error":"e"}}` + "\n",
		"unknown kind":        good + `{"entry":{"kind":"loans","key":"k","digest":"d","at":"2026-03-01T12:00:00Z","status":402,"error":"e"}}` + "\n",
		"no key":              good + `{"entry":{"kind":"charges","digest":"d","at":"2026-03-01T12:00:00Z","status":402,"error":"e"}}` + "\n",
		"no outcome":          good + `{"entry":{"kind":"charges","key":"k","digest":"d","at":"2026-03-01T12:00:00Z","status":402}}` + "\n",
		"unknown field":       good + `{"entry":{"kind":"charges","key":"k","digest":"d","at":"2026-03-01T12:00:00Z","status":402,"error":"e","more":1}}` + "\n",
		"senseless faults":    good + `{"faults":{"late":2}}` + "\n",
		"long line":           good + strings.Repeat("x", lineBytesMax+1) + "\n",
	} {
		file := filepath.Join(t.TempDir(), "psp")
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		// If the processor serves, Run ends without an error at the timeout.
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		err := New(Config{Addr: "127.0.0.1:0", File: file}).Run(ctx)
		cancel()
		if err == nil || !strings.Contains(err.Error(), ErrFileFormat.Error()) {
			t.Errorf("%s: %v", name, err)
		} else if !strings.Contains(err.Error(), file) || !strings.Contains(err.Error(), "--file") || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: the error does not name the remedy in one line: %v", name, err)
		}
		if after, err := os.ReadFile(file); err != nil || string(after) != content {
			t.Errorf("%s: the file was changed to %.100q (%v)", name, after, err)
		}
	}
}

// TestAFileThatCannotBeWrittenEndsTheProcessor: after a failed write the content of the disk is
// unknown. So the request gets no answer that states an outcome, later requests are not applied,
// and Run ends.
func TestAFileThatCannotBeWrittenEndsTheProcessor(t *testing.T) {
	t.Parallel()
	config := New(Config{File: filepath.Join(t.TempDir(), "psp"), EntriesMax: 10}).config
	l, err := openLedger(&config)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.journal.file.Close(); err != nil {
		t.Fatal(err)
	}
	for n := range 2 {
		if n == 1 { // the disk works again, but its content is unknown
			if l.journal.file, err = os.OpenFile(config.File, os.O_RDWR, 0); err != nil {
				t.Fatal(err)
			}
		}
		c, _, err := l.claim(keyName{charges, "k"}, &charge{Card: "tok", Amount: 1})
		if err != nil {
			t.Fatal(err)
		}
		if e, err := l.finish(c, false); !errors.Is(err, os.ErrClosed) {
			t.Errorf("it answered %+v, %v", e, err)
		}
	}
	if n := len(l.list(charges)); n != 0 {
		t.Errorf("%d charges", n)
	}
	if err := l.setFaults(FaultsDefault()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("the faults were set: %v", err)
	}

	p := newProcessor(l, New(Config{}).logger)
	s := New(Config{Addr: "127.0.0.1:0", File: "/disk/psp"})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if err := s.serve(ctx, listener, p); err == nil || !strings.Contains(err.Error(), "/disk/psp") || !strings.Contains(err.Error(), "start again") {
		t.Errorf("it ended with %v", err)
	}
}

// FuzzReadJournal: no content of a file makes it panic, and content that it accepts as complete is
// accepted again, whatever torn tail follows it.
func FuzzReadJournal(f *testing.F) {
	const good = `{"format":"demo-bank psp","version":1,"instance":"psp_1"}` + "\n"
	for _, seed := range []string{
		"", "x", "\n", good, good[:20], good + `{"faults":{"late":0.5}}` + "\n",
		good + `{"entry":{"kind":"charges","key":"k","digest":"d","at":"2026-03-01T12:00:00Z","status":201,"id":"ch_1","item":{"id":"ch_1"}}}` + "\n" + `{"entry":`,
		good + "null\n", good + "\xff\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, content []byte) {
		count := 0
		read := func(l line) error {
			count++
			if l.Entry != nil {
				return l.Entry.validate()
			}
			return nil
		}
		instance, end, err := readJournal(bytes.NewReader(content), read)
		if err != nil {
			return
		}
		if end > int64(len(content)) || end > 0 && content[end-1] != '\n' || (instance == "") != (end == 0) {
			t.Fatalf("%q: instance %q, end %d", content, instance, end)
		}
		lines := count
		count = 0
		again, endAgain, err := readJournal(bytes.NewReader(content[:end]), read)
		if err != nil || again != instance || endAgain != end || count != lines {
			t.Fatalf("%q: without the torn line %q, %d, %d lines, %v", content, again, endAgain, count, err)
		}
	})
}
