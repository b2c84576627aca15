package postgres

import (
	"encoding/binary"
	"errors"
	"slices"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// A record is written by one INSERT and read by a look-up, in the claim, in a peek or in Resolve;
// their SQL is in [statements]. This file has the parameters of the INSERT, the columns of the
// look-ups, and the encoding of the headers. resumable.go writes the records of open requests.

// insertParams is the number of parameters of the INSERT.
const insertParams = 12

// headersParam is the index of the headers among the parameters of the INSERT. The body is next.
const headersParam = 9

// insertCall records the answer. claimedAt is nil in a transaction other than that of the claim.
func (a *keyedAttempt) insertCall(claimedAt []byte, answer *idempotency.Answer) wire.Call {
	a.ttl = wire.EncodeInt8(a.claim.TTL.Microseconds())
	a.status = wire.EncodeInt2(int16(answer.Status))
	a.version = wire.EncodeInt2(a.claim.Fingerprint.Version)
	body := answer.Body
	if body == nil {
		body = []byte{} // nil would be NULL
	}
	a.params = [...][]byte{
		claimedAt, a.store.synchronousCommit, a.ttl[:], a.status[:], a.version[:], a.claim.Attempt[:],
		a.scope, a.key, a.claim.Fingerprint.Sum[:], encodeHeaders(a.headers[:0], answer.Header), body, nil,
	}
	if a.claim.TraceID != "" {
		a.params[insertParams-1] = []byte(a.claim.TraceID)
	}
	return wire.Call{Statement: &a.store.statements.insert, Params: a.params[:]}
}

// recordColumns are the columns that [decodeRecord] reads, in its order.
const (
	recordColumns      = "fingerprint_version, fingerprint, attempt_id, status, headers, body, trace_id, created_at, expires_at"
	recordColumnsCount = 9
)

// errRecord marks a record that this program can't read.
var errRecord = errors.New("record can't be read")

// decodeLookUp reads the row of a look-up. The record is nil if there is none, or if row-level
// security hides it.
func decodeLookUp(values [][]byte) (record *idempotency.Record, hidden bool, err error) {
	d := wire.Decoder{Values: values}
	hidden = d.Bool()
	// In a record the version is never NULL.
	if d.Err != nil || len(d.Values) == 0 || d.Values[0] == nil {
		return nil, hidden, d.Err
	}
	record, err = decodeRecord(d.Values)
	return record, hidden, err
}

// recordRow reads the record.
type recordRow struct{ *keyedAttempt }

func (a recordRow) ReadRow(values [][]byte) (err error) {
	a.record, a.hidden, err = decodeLookUp(values)
	if a.hidden { // a plan with policies would outlive them: see [ErrRowSecurityActive]
		a.store.statements.Distrust(a.conn)
	}
	return err
}

func decodeRecord(values [][]byte) (*idempotency.Record, error) {
	d := wire.Decoder{Values: values}
	var r idempotency.Record
	r.Fingerprint.Version = d.Int2()
	copy(r.Fingerprint.Sum[:], d.Next(len(r.Fingerprint.Sum)))
	copy(r.Attempt[:], d.Next(len(r.Attempt)))
	r.Answer.Status = int(d.Int2())
	headers := d.Next(-1)
	r.Answer.Body = d.Bytes()
	r.TraceID = string(d.Next(-1))
	r.CreatedAt = d.Timestamp()
	r.ExpiresAt = d.Timestamp()
	if d.Err != nil {
		return nil, errors.Join(errRecord, d.Err)
	}
	var err error
	if r.Answer.Header, err = decodeHeaders(headers); err != nil {
		return nil, err
	}
	if r.Open = r.Answer.Status == 0; r.Open {
		return &r, nil
	}
	if err := r.Answer.Validate(); err != nil {
		return nil, errors.Join(errRecord, err)
	}
	return &r, nil
}

// Recorded headers are stored as a version byte, the number of (name, value) pairs, and the
// length-prefixed names and values, ordered by name. A header with several values is several pairs:
// values are never joined. Lengths and counts are unsigned varints.
const headersVersion = 1

// encodeHeaders returns the stored form, in buffer if there is room for it. Equal headers give
// equal bytes.
func encodeHeaders(buffer []byte, header map[string][]string) []byte {
	names := make([]string, 0, 16) // more than there are on most answers: it stays on the stack
	pairs, size := 0, 8
	for name, values := range header {
		names = append(names, name)
		pairs += len(values)
		for _, value := range values {
			size += len(name) + len(value) + 4
		}
	}
	slices.Sort(names)
	out := append(slices.Grow(buffer[:0], size), headersVersion)
	out = binary.AppendUvarint(out, uint64(pairs))
	for _, name := range names {
		for _, value := range header[name] {
			out = binary.AppendUvarint(out, uint64(len(name)))
			out = append(out, name...)
			out = binary.AppendUvarint(out, uint64(len(value)))
			out = append(out, value...)
		}
	}
	return out
}

// decodeHeaders reads the stored form. It fails on anything that encodeHeaders does not write: a
// replay must equal the recorded answer.
func decodeHeaders(stored []byte) (map[string][]string, error) {
	if len(stored) < 2 || stored[0] != headersVersion {
		return nil, errRecord
	}
	rest := string(stored[1:]) // the connection's buffer is used again; all parts share this one copy
	pairs, ok := cutUvarint(&rest)
	if !ok || pairs > uint64(len(rest)) {
		return nil, errRecord
	}
	header := make(map[string][]string, pairs)
	values := make([]string, 0, pairs)
	last, first := "", 0 // the name that is read, and the place of its first value
	for range pairs {
		name, ok := cutString(&rest)
		if !ok || name < last {
			return nil, errRecord
		}
		value, ok := cutString(&rest)
		if !ok {
			return nil, errRecord
		}
		if name != last {
			last, first = name, len(values)
		}
		values = append(values, value)
		header[name] = values[first:len(values):len(values)] // nobody's append reaches the next
	}
	if len(rest) != 0 {
		return nil, errRecord
	}
	return header, nil
}

// DecodeHeaders reads the column headers of the table, for tools that look at records outside of a
// request. It fails on anything that a store does not write; the error quotes nothing.
func DecodeHeaders(stored []byte) (map[string][]string, error) { return decodeHeaders(stored) }

// cutUvarint takes a number off the front, in its shortest form only.
func cutUvarint(rest *string) (uint64, bool) {
	v, n := binary.Uvarint([]byte((*rest)[:min(len(*rest), binary.MaxVarintLen64)]))
	if n <= 0 || (n > 1 && (*rest)[n-1] == 0) {
		return 0, false
	}
	*rest = (*rest)[n:]
	return v, true
}

func cutString(rest *string) (string, bool) {
	length, ok := cutUvarint(rest)
	if !ok || length > uint64(len(*rest)) {
		return "", false
	}
	s := (*rest)[:length]
	*rest = (*rest)[length:]
	return s, true
}
