package encrypted

import "github.com/paidonce/idempotency"

// Seal returns what is recorded of an answer, for a test that makes a record past all claims.
func (s *Store) Seal(claim *idempotency.Claim, answer *idempotency.Answer) *idempotency.Answer {
	return s.seal(claim, answer)
}

// EnvelopeBytes is how much longer an envelope is than its body.
const EnvelopeBytes = headBytes + sealBytes
