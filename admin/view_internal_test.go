package admin

import (
	"bytes"
	"math"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/paidonce/idempotency/storage/postgres/operator"
)

func TestFormats(t *testing.T) {
	t.Parallel()
	for n, want := range map[int64]string{0: "0", 999: "999", 1000: "1,000", 10_000_000: "10,000,000", -1234: "-1,234"} {
		if got := formatNumber(n); got != want {
			t.Errorf("%d is %s, want %s", n, got, want)
		}
	}
	for n, want := range map[int64]string{0: "0", 999: "about 999", 1234: "about 1,230", 9_996_000: "about 10,000,000", 9_876_543: "about 9,880,000"} {
		count := operator.Count{Rows: n, Estimated: n > 0}
		if got := formatCount(count); got != want {
			t.Errorf("%d is %s, want %s", n, got, want)
		}
	}
	for n, want := range map[int64]string{0: "0 B", 999: "999 B", 1000: "1.0 kB", 9949: "9.9 kB", 12_345: "12 kB", 999_499: "999 kB", 999_500: "1.0 MB", 3_400_000_000: "3.4 GB"} {
		if got := formatBytes(n); got != want {
			t.Errorf("%d bytes are %s, want %s", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{
		0: "0 µs", 1500 * time.Nanosecond: "1 µs", 2500 * time.Microsecond: "2.5 ms", 999 * time.Millisecond: "999 ms", 1500 * time.Millisecond: "1.5 s",
		59 * time.Second: "59 s", time.Minute: "1 min", 47 * time.Hour: "47 h", 48 * time.Hour: "2 days", -time.Minute: "-1 min",
		math.MaxInt64: "106,751 days", math.MinInt64: "-106,751 days",
	} {
		if got := formatDuration(d); got != want {
			t.Errorf("%d ns are %s, want %s", d, got, want)
		}
	}
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for d, want := range map[time.Duration]string{0: "just now", 1500 * time.Millisecond: "1 s ago", 3 * time.Minute: "3 min ago", -5 * time.Second: "in 5 s", -23 * time.Hour: "in 23 h"} {
		if got := formatAgo(now, now.Add(-d)); got != want {
			t.Errorf("%v is %s, want %s", d, got, want)
		}
	}
	if got := formatAgo(now, time.Date(9999, 12, 31, 0, 0, 0, 0, time.UTC)); got != "in 106,751 days" {
		t.Errorf("the end of time is %s", got)
	}
	if got := formatStamp(now.In(time.FixedZone("", 3600))); got != `<time datetime="2026-01-02T03:04:05Z">2026-01-02 03:04:05 UTC</time>` {
		t.Errorf("a time is %s", got)
	}
}

// A body that is nested too deeply to be indented is shown unchanged, and costs no more than its
// size.
func TestDeepBodyIsNotIndented(t *testing.T) {
	t.Parallel()
	recorded := map[string][]string{"Content-Type": {"application/json"}}
	for depth, want := range map[int]string{bodyNestingMax: formJSON, bodyNestingMax + 1: formText} {
		body := strings.Repeat("[", depth-1) + `["\\[[[\"[[["]` + strings.Repeat("]", depth-1)
		if _, form, _ := showBody([]byte(body), recorded); form != want {
			t.Errorf("%d deep it is shown as %s, want %s", depth, form, want)
		}
	}
	body := []byte(strings.Repeat("[", bodyShownBytesMax/2) + strings.Repeat("]", bodyShownBytesMax/2))
	if bytes := testing.Benchmark(func(b *testing.B) {
		for b.Loop() {
			showBody(body, recorded)
		}
	}).AllocedBytesPerOp(); bytes > 4*bodyShownBytesMax {
		t.Errorf("it costs %d bytes", bytes)
	}
}

// Of every body a bounded beginning is shown, as text.
func FuzzShowBody(f *testing.F) {
	f.Add([]byte(`{"a":[1,2]}`), "application/json")
	f.Add([]byte("\xff\xfe"), "text/plain")
	f.Add([]byte("[[[[[[[["), "application/problem+json")
	f.Add(bytes.Repeat([]byte("[1,"), bodyShownBytesMax/4), "application/json")
	f.Add(bytes.Repeat([]byte("é"), bodyShownBytesMax), "")
	f.Fuzz(func(t *testing.T, body []byte, kind string) {
		text, form, shown := showBody(body, map[string][]string{"Content-Type": {kind}})
		if shown < 0 || shown > len(body) || shown > bodyShownBytesMax || len(text) > 5*bodyShownBytesMax || !utf8.ValidString(text) {
			t.Errorf("%d of %d bytes are shown in %d", shown, len(body), len(text))
		}
		if form == formText && text != string(body[:shown]) {
			t.Error("it is not what was recorded")
		}
	})
}
