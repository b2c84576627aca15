package postgres

import (
	"errors"
	"reflect"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency"
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

// FuzzDecodeHeaders: what is read is what was written, byte for byte.
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

func TestLockNumberIsFrozen(t *testing.T) {
	t.Parallel()
	if got := (idempotency.Key{Scope: "acme", Value: "k"}).LockNumber("public." + TableName); got != lockNumberOfAcmeK {
		t.Errorf("lock number %d, want %d: programs of different versions would not meet", got, int64(lockNumberOfAcmeK))
	}
}

const lockNumberOfAcmeK = -4293143674885497847

func TestClassify(t *testing.T) {
	t.Parallel()
	for code, want := range map[string]error{
		"40001": idempotency.ErrNotSerializable, "40P01": idempotency.ErrNotSerializable,
		"08006": idempotency.ErrUnavailable, "53100": idempotency.ErrUnavailable, "53300": idempotency.ErrUnavailable,
		"57014": idempotency.ErrUnavailable, "57P01": idempotency.ErrUnavailable, "58030": idempotency.ErrUnavailable,
		"55P03": idempotency.ErrUnavailable, "25006": idempotency.ErrAborted,
		"23505": idempotency.ErrAborted, "22012": idempotency.ErrAborted, "55000": idempotency.ErrAborted, "": idempotency.ErrAborted,
	} {
		if got := classify(&pgconn.PgError{Code: code}); !errors.Is(got, want) {
			t.Errorf("%q: %v, want %v", code, got, want)
		}
	}
	if got := classify(&pgconn.PgError{Code: "57014", Routine: "CopyGetData"}); !errors.Is(got, idempotency.ErrAborted) {
		t.Errorf("a COPY that the handler's rows ended: %v", got)
	}
	if got := classify(errors.New("unexpected EOF")); !errors.Is(got, idempotency.ErrUnavailable) {
		t.Errorf("an I/O error: %v", got)
	}
}

// A server's message may quote what a client sent; ours may not.
func TestErrorsQuoteNothing(t *testing.T) {
	t.Parallel()
	err := fail("claim", idempotency.ErrUnavailable, &pgconn.PgError{Code: "22P02", Message: `invalid input syntax: "canary"`, Detail: "canary", ConstraintName: "c"})
	if got, want := err.Error(), "claim: store is unavailable: SQLSTATE 22P02 on constraint c"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestRecentKeysAreAboutOneNumber(t *testing.T) {
	t.Parallel()
	h := new(recentKeys)
	one, samePlace := int64(5), int64(5+recentKeysMax)
	h.set(one)
	if !h.has(one) || h.has(samePlace) || h.has(6) {
		t.Error("a recent key is about other numbers")
	}
	h.clear(samePlace)
	if !h.has(one) {
		t.Error("a recent key was cleared for another number")
	}
	h.set(samePlace)
	if h.has(one) || !h.has(samePlace) {
		t.Error("a recent key does not take the place of another")
	}
	if h.clear(samePlace); h.has(samePlace) {
		t.Error("a recent key is there after it was cleared")
	}
	if negative := int64(-7); h.has(negative) {
		t.Error("a recent key with a negative number")
	} else if h.set(negative); !h.has(negative) {
		t.Error("no recent key with a negative number")
	}
}
