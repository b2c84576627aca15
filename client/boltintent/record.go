package boltintent

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"encoding/gob"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"time"

	"go.etcd.io/bbolt"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
)

// The file has two buckets: the intents by their keys, and one with the sum over all of them.
var (
	bucketIntents = []byte("idempotency intents 1")
	bucketSum     = []byte("idempotency sum 1")
	keySum        = []byte("sum")
)

// content is the intent in a record, encoded by gob. In the record a sequence number of 8 bytes
// precedes it. A SHA-256 over the key, the number and the content follows it.
type content struct {
	Method, URL, Host string
	Header            http.Header
	Body              []byte
	SavedAt           time.Time
}

const (
	sequenceBytes = 8
	sumBytes      = 8 + sha256.Size
)

func encode(key []byte, sequence uint64, i *client.Intent, savedAt time.Time) ([]byte, error) {
	buffer := bytes.NewBuffer(binary.BigEndian.AppendUint64(nil, sequence))
	if err := gob.NewEncoder(buffer).Encode(content{i.Method, i.URL, i.Host, i.Header, i.Body, savedAt}); err != nil {
		return nil, err
	}
	checksum := checksumOf(key, buffer.Bytes())
	return append(buffer.Bytes(), checksum[:]...), nil
}

func checksumOf(key, record []byte) [sha256.Size]byte {
	h := sha256.New()
	_, _ = h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(key)))) // a hash returns no error
	_, _ = h.Write(key)
	_, _ = h.Write(record)
	return [sha256.Size]byte(h.Sum(nil))
}

// check returns a record without its checksum.
func check(key, record []byte) ([]byte, error) {
	end := len(record) - sha256.Size
	if end < sequenceBytes {
		return nil, fmt.Errorf("%w: a record is too short", ErrDamaged)
	}
	if checksum := checksumOf(key, record[:end]); !bytes.Equal(checksum[:], record[end:]) {
		return nil, fmt.Errorf("%w: a record is not what was written", ErrDamaged)
	}
	return record[:end], nil
}

func decode(key, record []byte) (*client.Intent, error) {
	record, err := check(key, record)
	if err != nil {
		return nil, err
	}
	var c content
	if err := gob.NewDecoder(bytes.NewReader(record[sequenceBytes:])).Decode(&c); err != nil {
		return nil, fmt.Errorf("%w: a record can't be read: %w", ErrDamaged, err)
	}
	return &client.Intent{
		Key: idempotency.Key{Value: string(key)}, Method: c.Method, URL: c.URL, Host: c.Host, Header: c.Header, Body: c.Body, SavedAt: c.SavedAt,
	}, nil
}

// sequenceOf returns the number that orders records by age.
func sequenceOf(record []byte) (uint64, error) {
	if len(record) < sequenceBytes+sha256.Size {
		return 0, fmt.Errorf("%w: a record is too short", ErrDamaged)
	}
	return binary.BigEndian.Uint64(record), nil
}

func size(key, record []byte) int64 { return int64(len(key) + len(record)) }

// sameRequest compares all but the time.
func sameRequest(a, b *client.Intent) bool {
	return a.Key == b.Key && a.Method == b.Method && a.URL == b.URL && a.Host == b.Host && bytes.Equal(a.Body, b.Body) &&
		maps.EqualFunc(a.Header, b.Header, slices.Equal[[]string])
}

// sum is the number of records and their combined checksums, which reveal a missing record.
type sum struct {
	records  uint64
	combined [sha256.Size]byte
}

func (s sum) encode() []byte {
	return append(binary.BigEndian.AppendUint64(nil, s.records), s.combined[:]...)
}

func decodeSum(text []byte) (s sum, err error) {
	if len(text) != sumBytes {
		return s, fmt.Errorf("%w: its sum is missing", ErrDamaged)
	}
	s.records = binary.BigEndian.Uint64(text)
	copy(s.combined[:], text[8:])
	return s, nil
}

// add counts a record that is added (1) or removed (-1).
func (s *sum) add(record []byte, n int) {
	s.records += uint64(n)
	subtle.XORBytes(s.combined[:], s.combined[:], record[len(record)-sha256.Size:])
}

// note brings the sum of the file up to date.
func note(tx *bbolt.Tx, record []byte, n int) error {
	bucket := tx.Bucket(bucketSum)
	s, err := decodeSum(bucket.Get(keySum))
	if err != nil {
		return err
	}
	s.add(record, n)
	return bucket.Put(keySum, s.encode())
}
