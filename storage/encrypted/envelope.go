package encrypted

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/envelope"
)

// A body is stored as an envelope: the mark, a version byte, the key's id, then the nonce, the
// ciphertext and the tag. It is [headBytes] + [sealBytes] bytes longer than the body.
const (
	mark            = envelope.Mark
	envelopeVersion = 1
	headBytes       = len(mark) + 2
	sealBytes       = 12 + 16 // nonce and tag
)

// Faults of an envelope. None quotes any of it.
var (
	errUnencrypted = fmt.Errorf("%w: its body is not encrypted; if it is of the time before encryption, Keys.DangerAcceptUnencrypted is for one TTL from then on", idempotency.ErrRecordCorrupt)
	errTruncated   = fmt.Errorf("%w: its body ends within the envelope", idempotency.ErrRecordCorrupt)
	errForged      = fmt.Errorf("%w: its body does not belong to it, or its key's secret is another one", idempotency.ErrRecordCorrupt)
	errVersion     = fmt.Errorf("%w: its envelope is of another version of this program", idempotency.ErrUnknown)
)

// open replaces a record's body by its plaintext. If it fails, the record is unchanged.
func (s *Store) open(key idempotency.Key, record *idempotency.Record) error {
	keyID, sealed, err := parseEnvelope(record.Answer.Body)
	switch {
	case errors.Is(err, errUnencrypted) && s.acceptUnencrypted:
		return nil
	case err != nil:
		return err
	}
	aead := s.ciphers[keyID]
	if aead == nil {
		return fmt.Errorf("%w: it was encrypted with key %d: name that in Keys.Older", idempotency.ErrUnknown, keyID)
	}
	body, err := aead.Open(nil, nil, sealed, bound(keyID, key, record.Fingerprint, record.Attempt, &record.Answer))
	if err != nil {
		return errForged
	}
	record.Answer.Body = body
	return nil
}

// seal returns the answer with its body encrypted. It does not change its argument, which goes to
// the client.
func (s *Store) seal(claim *idempotency.Claim, answer *idempotency.Answer) *idempotency.Answer {
	sealed := *answer
	envelope := make([]byte, 0, headBytes+sealBytes+len(answer.Body))
	envelope = append(envelope, mark...)
	envelope = append(envelope, envelopeVersion, s.current)
	sealed.Body = s.ciphers[s.current].Seal(envelope, nil, answer.Body, bound(s.current, claim.Key, claim.Fingerprint, claim.Attempt, answer))
	return &sealed
}

// parseEnvelope splits an envelope.
func parseEnvelope(stored []byte) (keyID byte, sealed []byte, err error) {
	switch {
	case !strings.HasPrefix(string(stored[:min(len(stored), len(mark))]), mark):
		return 0, nil, errUnencrypted
	case len(stored) < headBytes:
		return 0, nil, errTruncated
	case stored[len(mark)] != envelopeVersion:
		return 0, nil, errVersion
	case len(stored) < headBytes+sealBytes:
		return 0, nil, errTruncated
	}
	return stored[len(mark)+1], stored[headBytes:], nil
}

// bound returns the data that a body is bound to: the row of its key, one request, one attempt, and
// the rest of the answer. Each part is preceded by its length, so that no two rows give the same
// bytes. Two things are left out: the dates, because the store makes them, and the trace id,
// because no answer contains it.
func bound(keyID byte, key idempotency.Key, fingerprint idempotency.Fingerprint, attempt idempotency.AttemptID, answer *idempotency.Answer) []byte {
	out := appendField(nil, "paidonce recorded body")
	out = append(out, envelopeVersion, keyID)
	out = appendField(out, key.Scope)
	out = appendField(out, key.Value)
	out = binary.BigEndian.AppendUint16(out, uint16(fingerprint.Version))
	out = append(out, fingerprint.Sum[:]...)
	out = append(out, attempt[:]...)
	out = binary.BigEndian.AppendUint16(out, uint16(answer.Status))
	names := make([]string, 0, len(answer.Header))
	for name, values := range answer.Header {
		if len(values) > 0 { // a store drops a header without values
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		out = appendField(out, name)
		out = binary.BigEndian.AppendUint64(out, uint64(len(answer.Header[name])))
		for _, value := range answer.Header[name] {
			out = appendField(out, value)
		}
	}
	return out
}

// appendField appends a length and a field.
func appendField(out []byte, field string) []byte {
	return append(binary.BigEndian.AppendUint64(out, uint64(len(field))), field...)
}
