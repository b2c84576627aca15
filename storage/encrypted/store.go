package encrypted

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"log/slog"
	"time"

	"github.com/paidonce/idempotency"
)

// SecretBytes is the length of a secret: AES-256.
const SecretBytes = 32

// Key is a secret and the number by which a record names it. It prints as its number, by every verb of fmt, in slog and
// in JSON.
type Key struct {
	// ID is written beside each body. It may be given to another secret once no record of the first is left.
	ID byte

	// Secret is drawn from a source of randomness, never from a password, and used for nothing else. All zero is refused.
	Secret [SecretBytes]byte
}

// Format keeps the secret out of every verb of fmt.
func (k Key) Format(f fmt.State, _ rune) { _, _ = fmt.Fprintf(f, "key %d", k.ID) } // fmt has no use for the error

// MarshalText keeps the secret out of JSON.
func (k Key) MarshalText() ([]byte, error) { return fmt.Appendf(nil, "key %d", k.ID), nil }

// LogValue keeps the secret out of structured logs.
func (k Key) LogValue() slog.Value { return slog.StringValue(fmt.Sprintf("key %d", k.ID)) }

// Keys are what a [Store] encrypts and decrypts with.
type Keys struct {
	// Current encrypts, and decrypts what it encrypted.
	Current Key

	// Older decrypt only.
	Older []Key

	// DangerAcceptUnencrypted answers also from records that are not encrypted, for the time in which those are still
	// there that were made before encryption was switched on. The danger: whoever can write to the table can put an
	// answer of their own there. Set it for one TTL and then take it away; without it such a record is
	// [idempotency.ErrRecordCorrupt].
	DangerAcceptUnencrypted bool
}

// Store encrypts the bodies that it gives to another store. It is safe for concurrent use where that one is.
type Store struct {
	inner             idempotency.Store
	current           byte
	ciphers           map[byte]cipher.AEAD
	acceptUnencrypted bool
}

var (
	_ idempotency.Store         = (*Store)(nil)
	_ idempotency.BudgetChecker = (*Store)(nil)
)

// New returns a store around another. It panics where the store is nil, a secret was forgotten, or two keys have one ID.
func New(store idempotency.Store, keys Keys) *Store {
	if store == nil {
		panic("idempotency/encrypted: New needs a store")
	}
	s := &Store{inner: store, current: keys.Current.ID, ciphers: map[byte]cipher.AEAD{}, acceptUnencrypted: keys.DangerAcceptUnencrypted}
	for _, key := range append([]Key{keys.Current}, keys.Older...) {
		if key.Secret == [SecretBytes]byte{} {
			panic(fmt.Sprintf("idempotency/encrypted: the secret of %v is all zero: draw one from crypto/rand", key))
		}
		if s.ciphers[key.ID] != nil {
			panic(fmt.Sprintf("idempotency/encrypted: there are two of %v: a record could not say which", key))
		}
		s.ciphers[key.ID] = newCipher(&key.Secret)
	}
	return s
}

// newCipher returns AES-256-GCM with nonces of 96 random bits, which it puts in front.
func newCipher(secret *[SecretBytes]byte) cipher.AEAD {
	block, err := aes.NewCipher(secret[:])
	if err != nil { // only a wrong length does that
		panic(err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil { // only a block that is not AES does that
		panic(err)
	}
	return aead
}

// Format keeps what was made of the secrets out of every verb of fmt: some print a cipher with its whole key schedule.
func (s *Store) Format(f fmt.State, _ rune) {
	_, _ = fmt.Fprintf(f, "encrypted store, key %d", s.current)
}

// CheckBudget asks the store within.
func (s *Store) CheckBudget(handlerTimeout, commitTimeout time.Duration) error {
	if checker, ok := s.inner.(idempotency.BudgetChecker); ok {
		return checker.CheckBudget(handlerTimeout, commitTimeout)
	}
	return nil
}

// Begin implements [idempotency.Store].
func (s *Store) Begin(ctx context.Context, claim *idempotency.Claim) (idempotency.Attempt, *idempotency.Record, error) {
	begun, record, err := s.inner.Begin(ctx, claim)
	switch {
	case err != nil:
		return nil, nil, err
	case record != nil:
		if err := s.open(claim.Key, record); err != nil {
			return nil, nil, fmt.Errorf("decrypt the record: %w", err)
		}
		return nil, record, nil
	case claim.Keyless(): // nothing will be recorded
		return begun, nil, nil
	}
	return &attempt{Attempt: begun, store: s, claim: *claim}, nil, nil
}

// Resolve implements [idempotency.Store].
func (s *Store) Resolve(ctx context.Context, claim *idempotency.Claim) (*idempotency.Record, error) {
	record, err := s.inner.Resolve(ctx, claim)
	if err != nil || record == nil {
		return nil, err
	}
	if err := s.open(claim.Key, record); err != nil {
		return nil, fmt.Errorf("decrypt the record: %w", err)
	}
	return record, nil
}

// attempt encrypts what is recorded of the answer. Everything else is the inner store's.
type attempt struct {
	idempotency.Attempt
	store *Store
	claim idempotency.Claim
}

// Commit implements [idempotency.Attempt].
func (a *attempt) Commit(ctx context.Context, answer *idempotency.Answer) error {
	return a.Attempt.Commit(ctx, a.store.seal(&a.claim, answer))
}

// Decline implements [idempotency.Attempt].
func (a *attempt) Decline(ctx context.Context, answer *idempotency.Answer) error {
	return a.Attempt.Decline(ctx, a.store.seal(&a.claim, answer))
}
