package middleware_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/paidonce/idempotency"
)

// encodeRecorded returns headers in the stored form, without any checks: a version byte, the number
// of pairs, then names and values, each after its length.
func encodeRecorded(pairs ...string) []byte {
	out := binary.AppendUvarint([]byte{1}, uint64(len(pairs)/2))
	for _, part := range pairs {
		out = append(binary.AppendUvarint(out, uint64(len(part))), part...)
	}
	return out
}

// decodeRecorded reads the stored form. ok is false if no release could have written it.
func decodeRecorded(stored []byte) (pairs []string, ok bool) {
	if len(stored) < 2 || stored[0] != 1 {
		return nil, false
	}
	rest := stored[1:]
	count, n := binary.Uvarint(rest)
	if n <= 0 {
		return nil, false
	}
	for rest = rest[n:]; len(rest) > 0; {
		length, n := binary.Uvarint(rest)
		if n <= 0 || length > uint64(len(rest)-n) {
			return nil, false
		}
		pairs = append(pairs, string(rest[n:n+int(length)]))
		rest = rest[n+int(length):]
	}
	if uint64(len(pairs)) != 2*count || !bytes.Equal(encodeRecorded(pairs...), stored) {
		return nil, false
	}
	for i := 2; i < len(pairs); i += 2 {
		if pairs[i] < pairs[i-2] {
			return nil, false
		}
	}
	return pairs, true
}

// neverOnTheWire are the headers that no replay may carry.
var neverOnTheWire = []string{
	"authorization", "cookie", "set-cookie", "set-cookie2", "proxy-authorization", "proxy-authenticate", "proxy-authentication-info",
	"authentication-info", "www-authenticate", "connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding",
	"upgrade", "content-length", "date",
}

// mayBeReplayed reports whether headers may be sent: names are tokens, values have no line breaks
// and no other control characters, and none is in neverOnTheWire or one of the middleware's own.
func mayBeReplayed(pairs []string) bool {
	size := 0
	for i := 0; i < len(pairs); i += 2 {
		name, value := strings.ToLower(pairs[i]), pairs[i+1]
		size += len(name) + len(value)
		if name == "" || strings.Trim(name, "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz") != "" || slices.Contains(neverOnTheWire, name) ||
			strings.HasPrefix(name, "idempotency-") || strings.HasPrefix(name, "idempotent-") || strings.HasPrefix(name, "trailer:") {
			return false
		}
		if strings.ContainsFunc(value, func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }) {
			return false
		}
	}
	return size <= idempotency.HeaderBytesMax
}

// FuzzRecordChangedInTheTable: whatever a record's status and headers are overwritten with, a
// replay carries exactly the recorded ones, and only if they could have been recorded; otherwise
// the outcome is unknown. No header ends its line early.
func FuzzRecordChangedInTheTable(f *testing.F) {
	for _, pairs := range [][]string{
		{}, {"Etag", "x"}, {"Content-Type", "text/plain", "Location", "/1"}, {"Link", "<a>", "Link", "<b>"},
		{"Location", "/1\r\nX-Injected: 1"}, {"Location", "/1\nX-Injected: 1"}, {"Location", "/1\r\n\r\n<script>"}, {"X-A\r\nX-Injected", "1"},
		{"X-A: 1\r\nX-Injected", "1"}, {"Set-Cookie", "s=1"}, {"Transfer-Encoding", "chunked"}, {"Content-Length", "0"}, {"Connection", "close"},
		{"", "x"}, {"A", "\x00"}, {"A b", "x"}, {"Idempotency-Status", "executed"}, {"Trailer:Etag", "x"}, {"Etag", "ü\xff\ttab"},
		{"Access-Control-Allow-Origin", "*", "access-control-allow-credentials", "true", "Vary", "Origin"},
	} {
		f.Add(int16(201), encodeRecorded(pairs...))
	}
	f.Add(int16(204), encodeRecorded("Etag", "x"))
	f.Add(int16(101), encodeRecorded())
	f.Add(int16(-1), encodeRecorded())
	f.Add(int16(999), encodeRecorded("Etag", "x"))
	f.Add(int16(201), []byte{2, 0})
	f.Add(int16(201), []byte{1, 1, 4, 'E', 't', 'a', 'g', 200})
	b := setup(f, setupOptions{}, transfer)
	const request = "POST / HTTP/1.1\r\nHost: x\r\nAccount: acme\r\nContent-Type: application/json\r\nIdempotency-Key: k\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
	f.Fuzz(func(t *testing.T, status int16, headers []byte) {
		if b.raw(t, request).outcome == "" {
			t.Fatal("no outcome")
		}
		if _, err := b.pool.Exec(context.Background(), "UPDATE idempotency_keys SET status = $1, headers = $2", status, headers); err != nil {
			t.Fatal(err)
		}
		got := b.raw(t, request)
		pairs, ok := decodeRecorded(headers)
		if !ok || !mayBeReplayed(pairs) || status < idempotency.StatusMin || status > idempotency.StatusMax {
			if got.outcome != string(idempotency.OutcomeUnknown) || got.status != 503 && got.status != 500 {
				t.Fatalf("status %d, headers %q are answered with %d %q %v", status, headers, got.status, got.outcome, got.header)
			}
			pairs = nil
		} else if got.outcome != string(idempotency.OutcomeReplayed) || got.status != int(status) {
			t.Fatalf("status %d, headers %q are answered with %d %q", status, headers, got.status, got.outcome)
		}
		recorded := http.Header{}
		for i := 0; i < len(pairs); i += 2 {
			// These belong to the origin of the request, and are left out.
			if strings.HasPrefix(strings.ToLower(pairs[i]), "access-control-") {
				continue
			}
			recorded.Add(pairs[i], strings.Trim(pairs[i+1], " \t"))
		}
		for name, values := range got.header {
			switch name {
			case "Idempotency-Status", "Idempotent-Replayed", "Idempotency-Created-At", "Idempotency-Expires-At", "Date", "Content-Length", "Connection":
				continue
			case "Content-Type", "Link", "Cache-Control", "Retry-After":
				// They are the problem document's.
				if pairs == nil && got.outcome == string(idempotency.OutcomeUnknown) {
					continue
				}
			}
			sent, kept := slices.Sorted(slices.Values(values)), slices.Sorted(slices.Values(recorded[name]))
			if fmt.Sprintf("%q", sent) != fmt.Sprintf("%q", kept) {
				t.Fatalf("header %s is sent as %q, and recorded as %q", name, sent, kept)
			}
			delete(recorded, name)
		}
		if len(recorded) > 0 {
			t.Fatalf("recorded and not sent: %q of %v", recorded, got.header)
		}
	})
}
