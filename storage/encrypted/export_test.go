package encrypted

import "github.com/paidonce/idempotency"

// Seal returns the recorded form of an answer, for a test that makes a record without a claim.
func (s *Store) Seal(claim *idempotency.Claim, answer *idempotency.Answer) *idempotency.Answer {
	return s.seal(claim, answer)
}

// EnvelopeBytes is the difference in length between an envelope and its body.
const EnvelopeBytes = headBytes + sealBytes
