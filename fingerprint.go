package idempotency

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
)

// FingerprintVersionUserMin is the lowest version number that a user's own fingerprint function may bring. Those below
// it are ours.
const FingerprintVersionUserMin = 100

// Fingerprint tells whether two requests with one key ask for the same thing.
//
// Version names the function that made it, because fingerprints of different functions can't be compared: version 1
// is [FingerprintV1], numbers from [FingerprintVersionUserMin] on are the user's.
type Fingerprint struct {
	Version int16
	Sum     [sha256.Size]byte
}

// Equal reports, in time that does not depend on the content, whether two fingerprints were made by one function from
// the same request.
func (f Fingerprint) Equal(other Fingerprint) bool {
	return f.Version == other.Version && subtle.ConstantTimeCompare(f.Sum[:], other.Sum[:]) == 1
}

// FingerprintV1 is SHA-256 over the length-prefixed method, escaped path, raw query, Content-Type and body bytes. None of them is
// normalized: two spellings of one media type are two requests. It is frozen: a change would turn every retry that crosses an upgrade into a mismatch.
func FingerprintV1(method, escapedPath, rawQuery, contentType string, body []byte) Fingerprint {
	var buffer [512]byte // for most of them, on the stack
	head := appendField(buffer[:0], method)
	head = appendField(head, escapedPath)
	head = appendField(head, rawQuery)
	head = appendField(head, contentType)
	head = binary.BigEndian.AppendUint64(head, uint64(len(body))) // the body is a field too, and is not copied
	h := sha256.New()
	h.Write(head) // a hash never fails
	h.Write(body)
	f := Fingerprint{Version: 1}
	h.Sum(f.Sum[:0])
	return f
}

// FingerprintOf is SHA-256 over the bytes that a user's own function made of a request, under that function's version.
func FingerprintOf(version int16, content []byte) Fingerprint {
	return Fingerprint{Version: version, Sum: sha256.Sum256(content)}
}
