package idempotency

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
)

// The versions of the built-in functions, and the least version of a function of your own. Requests
// of two protocols are never the same: an adapter that finds a record with the built-in version of
// another protocol answers mismatch.
const (
	FingerprintVersionHTTP    = 1 // of NewFingerprintV1
	FingerprintVersionRPC     = 2 // of the adapters for gRPC and Connect
	FingerprintVersionUserMin = 100

	// A built-in version more belongs into ofAnotherProtocol (package middleware) and FingerprintAt
	// (contrib/grpc/rpc) too.
)

// Fingerprint is a hash of the content of a request: two requests with one key must have equal
// ones.
//
// Version names the function that made it, because fingerprints of different functions can't be
// compared: [NewFingerprintV1] has version 1, and functions of your own have versions from
// [FingerprintVersionUserMin] on.
type Fingerprint struct {
	Version int16
	Sum     [sha256.Size]byte
}

// Equal reports, in constant time, whether two fingerprints were made by one function from the same
// request.
func (f Fingerprint) Equal(other Fingerprint) bool {
	return f.Version == other.Version && subtle.ConstantTimeCompare(f.Sum[:], other.Sum[:]) == 1
}

// NewFingerprintV1 returns the fingerprint of an HTTP request: SHA-256 over the length-prefixed
// method, escaped path, raw query, Content-Type and body. None of them is normalized: two spellings
// of one media type are two requests. It is frozen: a change would turn every retry that crosses an
// upgrade into a mismatch.
func NewFingerprintV1(method, escapedPath, rawQuery, contentType string, body []byte) Fingerprint {
	var buffer [512]byte // for most of them, on the stack
	head := appendField(buffer[:0], method)
	head = appendField(head, escapedPath)
	head = appendField(head, rawQuery)
	head = appendField(head, contentType)
	// The body is a field too. It is hashed without a copy.
	head = binary.BigEndian.AppendUint64(head, uint64(len(body)))
	h := sha256.New()
	h.Write(head) // a hash never fails
	h.Write(body)
	f := Fingerprint{Version: FingerprintVersionHTTP}
	h.Sum(f.Sum[:0])
	return f
}

// NewFingerprint returns the fingerprint of a request by a function of your own: SHA-256 over
// content, the bytes that the function took from the request, under the function's version.
func NewFingerprint(version int16, content []byte) Fingerprint {
	return Fingerprint{Version: version, Sum: sha256.Sum256(content)}
}
