package encrypted

import (
	"bytes"
	"encoding/hex"
	"errors"
	"maps"
	"reflect"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/paidonce/idempotency"
)

var (
	fixedKey   = Key{ID: 7, Secret: [SecretBytes]byte{1, 2, 3}}
	fixedClaim = idempotency.Claim{
		Key:         idempotency.Key{Scope: "acme", Value: "k"},
		Fingerprint: idempotency.NewFingerprintV1("POST", "/", "", "", nil),
		Attempt:     idempotency.AttemptID{0: 1, 15: 2},
	}
	fixedAnswer = idempotency.Answer{Status: 201, Header: map[string][]string{"Location": {"/1"}, "Link": {"<a>", "<b>"}}, Body: []byte("done")}
)

// stub stands for a store that is never called.
type stub struct{ idempotency.Store }

func fixedStore() *Store { return New(stub{}, Keys{Current: fixedKey}) }

func recordOf(body []byte) *idempotency.Record {
	answer := fixedAnswer
	answer.Body = body
	return &idempotency.Record{Fingerprint: fixedClaim.Fingerprint, Attempt: fixedClaim.Attempt, Answer: answer}
}

// The envelope is frozen: a record outlives the program that made it.
func TestEnvelopeIsFrozen(t *testing.T) {
	t.Parallel()
	stored, err := hex.DecodeString("00656e63010701604049b40a552ad1eb0911d2e2a48c195107a6e8381b79ff57b96e8bd71507")
	if err != nil {
		t.Fatal(err)
	}
	record := recordOf(stored)
	if err := fixedStore().open(fixedClaim.Key, record); err != nil || string(record.Answer.Body) != "done" {
		t.Fatalf("%q, %v; a new one is %x", record.Answer.Body, err, fixedStore().seal(&fixedClaim, &fixedAnswer).Body)
	}
}

// FuzzOpen: whatever bytes the table has, they are opened only if they were sealed for that very
// row.
func FuzzOpen(f *testing.F) {
	store := fixedStore()
	accepting := New(stub{}, Keys{Current: fixedKey, DangerAcceptUnencrypted: true})
	sealed := store.seal(&fixedClaim, &fixedAnswer).Body
	f.Add(sealed, 0, byte(0))
	f.Add(sealed, 5, byte(1))
	f.Add([]byte{}, 0, byte(0))
	f.Add([]byte(mark), 3, byte(1))
	f.Fuzz(func(t *testing.T, stored []byte, at int, flip byte) {
		check := func(stored []byte) {
			record := recordOf(stored)
			err := store.open(fixedClaim.Key, record)
			switch {
			case err == nil && !bytes.Equal(stored, sealed) && string(record.Answer.Body) != "done":
				t.Fatalf("%x is answered %q", stored, record.Answer.Body)
			case err != nil && !errors.Is(err, idempotency.ErrRecordCorrupt) && !errors.Is(err, idempotency.ErrUnknown):
				t.Fatalf("%x: %v", stored, err)
			case err != nil && !bytes.Equal(record.Answer.Body, stored):
				t.Fatalf("%x became %x with %v", stored, record.Answer.Body, err)
			}
			plain := recordOf(stored)
			if accepted := accepting.open(fixedClaim.Key, plain); accepted == nil && err != nil &&
				(bytes.HasPrefix(stored, []byte(mark)) || !bytes.Equal(plain.Answer.Body, stored)) {
				t.Fatalf("%x is accepted as not encrypted", stored)
			}
		}
		check(stored)
		changed := slices.Clone(sealed)
		changed[uint(at)%uint(len(changed))] ^= flip
		check(changed)
		if flip != 0 {
			if err := store.open(fixedClaim.Key, recordOf(changed)); err == nil {
				t.Fatalf("%x is answered", changed)
			}
		}
	})
}

// row has all that a body is bound to.
type row struct {
	keyID       byte
	key         idempotency.Key
	fingerprint idempotency.Fingerprint
	attempt     idempotency.AttemptID
	answer      idempotency.Answer
}

func (r row) bound() []byte {
	return bound(r.keyID, r.key, r.fingerprint, r.attempt, &r.answer)
}

// Two rows are bound to the same bytes only if they are equal, wherever one part ends and the next
// begins.
func TestBoundIsInjective(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		text := rapid.SampledFrom([]string{"", "a", "b", "ab", "aa", "\x00", "a\x00"})
		draw := func(name string) row {
			header := rapid.MapOfN(text, rapid.SliceOfN(text, 0, 2), 0, 2).Draw(t, name+" header")
			maps.DeleteFunc(header, func(_ string, values []string) bool { return len(values) == 0 })
			r := row{
				keyID:  rapid.ByteRange(0, 1).Draw(t, name+" key id"),
				key:    idempotency.Key{Scope: text.Draw(t, name+" scope"), Value: text.Draw(t, name+" key")},
				answer: idempotency.Answer{Status: rapid.SampledFrom([]int{200, 201}).Draw(t, name+" status"), Header: header},
			}
			r.fingerprint.Version = rapid.SampledFrom([]int16{1, 100}).Draw(t, name+" version")
			r.fingerprint.Sum[0] = rapid.ByteRange(0, 1).Draw(t, name+" sum")
			r.attempt[15] = rapid.ByteRange(0, 1).Draw(t, name+" attempt")
			return r
		}
		a, b := draw("a"), draw("b")
		if rapid.Bool().Draw(t, "the same but for the header") {
			header := b.answer.Header
			b = a
			b.answer.Header = header
		}
		if rapid.Bool().Draw(t, "the same but for the key") {
			key := b.key
			b = a
			b.key = key
		}
		if same := bytes.Equal(a.bound(), b.bound()); same != reflect.DeepEqual(a, b) {
			t.Fatalf("%+v and %+v are bound to the same bytes: %v", a, b, same)
		}
	})
}

// Each part of a row counts.
func TestEveryPartIsBound(t *testing.T) {
	t.Parallel()
	base := func() row {
		return row{7, fixedClaim.Key, fixedClaim.Fingerprint, fixedClaim.Attempt, idempotency.Answer{Status: 201, Header: map[string][]string{"Link": {"<a>", "<b>"}}}}
	}
	for name, change := range map[string]func(r *row){
		"key id":              func(r *row) { r.keyID++ },
		"scope":               func(r *row) { r.key.Scope = "globex" },
		"key":                 func(r *row) { r.key.Value = "K" },
		"scope and key":       func(r *row) { r.key = idempotency.Key{Scope: "acm", Value: "ek"} },
		"fingerprint version": func(r *row) { r.fingerprint.Version = 100 },
		"fingerprint":         func(r *row) { r.fingerprint.Sum[31] ^= 1 },
		"attempt":             func(r *row) { r.attempt[0] ^= 1 },
		"status":              func(r *row) { r.answer.Status = 202 },
		"a header's name":     func(r *row) { r.answer.Header = map[string][]string{"Linked": {"<a>", "<b>"}} },
		"a header's order":    func(r *row) { r.answer.Header = map[string][]string{"Link": {"<b>", "<a>"}} },
		"values joined":       func(r *row) { r.answer.Header = map[string][]string{"Link": {"<a><b>"}} },
		"one header more":     func(r *row) { r.answer.Header = map[string][]string{"Link": {"<a>", "<b>"}, "Etag": {""}} },
		"no header":           func(r *row) { r.answer.Header = nil },
	} {
		changed := base()
		change(&changed)
		if bytes.Equal(base().bound(), changed.bound()) {
			t.Errorf("%s is not bound", name)
		}
	}
	same := base()
	same.answer.Header["Vary"] = nil // it leaves no trace in a store
	if !bytes.Equal(base().bound(), same.bound()) {
		t.Error("a header without values counts")
	}
}
