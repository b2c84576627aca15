package postgres

import (
	"reflect"
	"testing"
)

func TestHeadersRoundTrip(t *testing.T) {
	t.Parallel()
	for _, header := range []map[string][]string{
		{},
		{"A": {""}},
		{"Vary": {"a", "b, c"}, "Content-Type": {"text/plain"}, "X": {"\tü\xff"}},
	} {
		decoded, err := decodeHeaders(encodeHeaders(nil, header))
		if err != nil || !reflect.DeepEqual(decoded, header) {
			t.Errorf("%v became %v, %v", header, decoded, err)
		}
	}
	for _, stored := range []string{"", "\x01", "\x02\x00", "\x01\x01", "\x01\x00\x00", "\x01\x80\x00", "\x01\x02\x01B\x00\x01A\x00", "\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"} {
		if _, err := decodeHeaders([]byte(stored)); err == nil {
			t.Errorf("%q is read", stored)
		}
	}
}

// FuzzDecodeHeaders: headers that are decoded encode to the same bytes.
func FuzzDecodeHeaders(f *testing.F) {
	for _, header := range []map[string][]string{{}, {"A": {"b"}}, {"A": {"b", "c"}, "D": {""}}} {
		f.Add(encodeHeaders(nil, header))
	}
	f.Fuzz(func(t *testing.T, stored []byte) {
		header, err := decodeHeaders(stored)
		if err != nil {
			return
		}
		if again := encodeHeaders(nil, header); string(again) != string(stored) {
			t.Errorf("%q was read, and is written as %q", stored, again)
		}
	})
}

var recordedHeader = map[string][]string{
	"Content-Type": {"application/json"}, "Location": {"/transfers/1860012345678901234"}, "Vary": {"Accept", "Origin"},
}

func BenchmarkEncodeHeaders(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		encodeHeaders(nil, recordedHeader)
	}
}

func BenchmarkDecodeHeaders(b *testing.B) {
	stored := encodeHeaders(nil, recordedHeader)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := decodeHeaders(stored); err != nil {
			b.Fatal(err)
		}
	}
}
