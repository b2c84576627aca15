package idempotency

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"unicode/utf8"
)

// Limits of a [Key]. They are part of the table's definition and of the lock number, and so do not
// change.
const (
	ScopeBytesMax = 255 // the longest scope, in bytes
	KeyBytesMax   = 255 // the longest key value, in bytes
)

// Errors of [Key.Validate].
var (
	ErrScopeInvalid = errors.New("scope is invalid")
	ErrKeyInvalid   = errors.New("key is invalid")
)

// Key names one request for good: two requests with equal keys are the same request.
//
// Scope is the account that the key belongs to, never its credential, so that a rotated token still
// finds its own requests and another account never does. Value is the key that the client sent. The
// two are stored, locked and compared separately and never joined into one string, so ("a", "b:c")
// and ("a:b", "c") are different keys.
//
// A Key prints as eight hexadecimal digits of a hash by every verb of fmt and in slog, so that
// neither part reaches a log. It has no JSON or text form: encoding one fails.
type Key struct {
	Scope string
	Value string
}

// Validate reports whether the key can be stored: a scope of 1 to [ScopeBytesMax] bytes of UTF-8
// without NUL, and a value of 1 to [KeyBytesMax] visible ASCII characters without comma, space or
// quote. The error wraps [ErrScopeInvalid] or [ErrKeyInvalid] and quotes neither part.
func (k Key) Validate() error {
	if err := ValidateScope(k.Scope); err != nil {
		return err
	}
	return ValidateKeyValue(k.Value)
}

// MessageScopePrefix begins the scopes of consumers (package consumer), which keep the ids of their
// messages in the same table. Package middleware refuses it in the scope of a request.
const MessageScopePrefix = "message:"

// ValidateScope reports whether a scope can be stored. The error wraps [ErrScopeInvalid].
func ValidateScope(scope string) error {
	switch {
	case scope == "":
		return fmt.Errorf("%w: it is empty", ErrScopeInvalid)
	case len(scope) > ScopeBytesMax:
		return fmt.Errorf("%w: it has %d bytes, over the limit of %d", ErrScopeInvalid, len(scope), ScopeBytesMax)
	case !utf8.ValidString(scope):
		return fmt.Errorf("%w: it is not UTF-8", ErrScopeInvalid)
	case strings.IndexByte(scope, 0) >= 0:
		return fmt.Errorf("%w: it contains a NUL", ErrScopeInvalid)
	}
	return nil
}

// ValidateKeyValue reports whether a key value can be stored. The error wraps [ErrKeyInvalid].
func ValidateKeyValue(value string) error {
	switch {
	case value == "":
		return fmt.Errorf("%w: it is empty", ErrKeyInvalid)
	case len(value) > KeyBytesMax:
		return fmt.Errorf("%w: it has %d characters, over the limit of %d", ErrKeyInvalid, len(value), KeyBytesMax)
	}
	for i := range len(value) {
		if c := value[i]; c <= ' ' || c >= 0x7f || c == ',' || c == '"' {
			return fmt.Errorf("%w: character %d is not a visible ASCII character other than comma and quote", ErrKeyInvalid, i+1)
		}
	}
	return nil
}

// String returns eight hexadecimal digits of a hash of the key: enough to follow one key through a
// log.
func (k Key) String() string {
	var buffer [fieldsBytesMax]byte
	fields := appendField(buffer[:0], k.Scope)
	fields = appendField(fields, k.Value)
	sum := sha256.Sum256(fields)
	return hex.EncodeToString(sum[:4])
}

// Format keeps the key out of every verb of fmt. It drops the error, for which fmt has no use.
func (k Key) Format(f fmt.State, _ rune) { _, _ = f.Write([]byte(k.String())) }

// errKeyEncoded is returned instead of a hash, which can't be decoded, and instead of the parts,
// which would be in the log of a program that logs a struct as JSON.
var errKeyEncoded = errors.New("idempotency: a Key is not encoded, so that it reaches no log by accident: encode its Scope and Value as fields of your own")

// MarshalJSON returns an error. Encode Scope and Value as fields of your own.
func (k Key) MarshalJSON() ([]byte, error) { return nil, errKeyEncoded }

// MarshalText returns an error, as MarshalJSON does, for map keys in JSON, XML, YAML and others.
func (k Key) MarshalText() ([]byte, error) { return nil, errKeyEncoded }

// LogValue keeps the key out of structured logs.
func (k Key) LogValue() slog.Value { return slog.StringValue(k.String()) }

// LockNumber returns the number under which a store locks the key: the first 8 bytes of SHA-256
// over the length-prefixed table, scope and value. The table's qualified name is part of it, so
// that two services on one database that pass a key along don't block each other. It is frozen:
// programs of different versions must meet at the same lock. Nothing rests on it being unique; a
// collision costs a spurious in-progress.
func (k Key) LockNumber(table string) int64 {
	var buffer [fieldsBytesMax]byte
	fields := appendField(buffer[:0], table)
	fields = appendField(fields, k.Scope)
	fields = appendField(fields, k.Value)
	sum := sha256.Sum256(fields)
	return int64(binary.BigEndian.Uint64(sum[:]))
}

// fieldsBytesMax is the size of the hashed fields of a key. They are on the stack unless the name
// of the table is longer than PostgreSQL allows.
const fieldsBytesMax = 3*8 + 2*63 + 1 + ScopeBytesMax + KeyBytesMax

// appendField appends one length-prefixed field to the bytes to hash, so that no two lists of
// fields give the same bytes.
func appendField[S string | []byte](fields []byte, field S) []byte {
	fields = binary.BigEndian.AppendUint64(fields, uint64(len(field)))
	return append(fields, field...)
}

// AttemptID is the name of one attempt: 16 random bytes. The record carries the id of the attempt
// that was executed, so a handler that stores it beside its own rows can prove later which of them
// belong to the record.
type AttemptID [16]byte

// NewAttemptID draws an id from the operating system's source of randomness.
func NewAttemptID() AttemptID {
	var id AttemptID
	_, _ = rand.Read(id[:]) // never fails: crypto/rand ends the process instead
	return id
}

// IsZero reports whether the id is absent.
func (id AttemptID) IsZero() bool { return id == AttemptID{} }

// String returns the id in the layout of a UUID, as PostgreSQL prints it.
func (id AttemptID) String() string {
	const layout = "00000000-0000-0000-0000-000000000000"
	text := []byte(layout)
	hex.Encode(text[0:8], id[0:4])
	hex.Encode(text[9:13], id[4:6])
	hex.Encode(text[14:18], id[6:8])
	hex.Encode(text[19:23], id[8:10])
	hex.Encode(text[24:36], id[10:16])
	return string(text)
}
