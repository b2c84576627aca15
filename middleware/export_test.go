package middleware

import "github.com/paidonce/idempotency"

// StoreRequest and RestoreRequest are for their fuzz test.
var (
	StoreRequest   = storeRequest
	RestoreRequest = restoreRequest
)

// Wildcards is for its test.
var Wildcards = wildcards

// PrefersAsync is for its tests.
var PrefersAsync = prefersAsync

// SealStatusID returns the id of an operation.
func SealStatusID(s *Status, route string, key idempotency.Key, fingerprint idempotency.Fingerprint) string {
	return s.seal(operation{route, key, fingerprint})
}

// OpenStatusID returns the parts of an id, and whether it can be read.
func OpenStatusID(s *Status, id string) (route string, key idempotency.Key, fingerprint idempotency.Fingerprint, ok bool) {
	o, ok := s.open(id)
	return o.route, o.key, o.fingerprint, ok
}

// StatusIDBytesMax is the length of the longest id.
const StatusIDBytesMax = statusIDBytesMax
