package postgres

import "testing"

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
