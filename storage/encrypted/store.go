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

// Key is a secret and the number by which records name it. It prints as its number, by every verb
// of fmt, in slog and in JSON.
type Key struct {
	// ID is stored beside each body. It may be given to another secret once no record under the
	// first is left.
	ID byte

	// Secret must come from a source of randomness, never from a password, and be used for nothing
	// else. All zero is refused.
	Secret [SecretBytes]byte
}

// Format keeps the secret out of every verb of fmt. It drops the error, for which fmt has no use.
func (k Key) Format(f fmt.State, _ rune) { _, _ = fmt.Fprintf(f, "key %d", k.ID) }

// MarshalText keeps the secret out of JSON.
func (k Key) MarshalText() ([]byte, error) { return fmt.Appendf(nil, "key %d", k.ID), nil }

// LogValue keeps the secret out of structured logs.
func (k Key) LogValue() slog.Value { return slog.StringValue(fmt.Sprintf("key %d", k.ID)) }

// Keys are the keys of a [Store].
type Keys struct {
	// Current encrypts, and decrypts its own bodies.
	Current Key

	// Older keys only decrypt.
	Older []Key

	// DangerAcceptUnencrypted replays unencrypted records too, as long as records are left from
	// before encryption was switched on. The danger: anybody who can write to the table can put an
	// answer of their own there. Set it for one TTL, then remove it. Without it such a record is
	// [idempotency.ErrRecordCorrupt].
	DangerAcceptUnencrypted bool
}

// Store encrypts the bodies for another store. It is safe for concurrent use if that store is.
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

// New returns a store around another. It panics if the store is nil, a secret is missing, or two
// keys have one ID.
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

// newCipher returns AES-256-GCM with nonces of 96 random bits, which it prepends.
func newCipher(secret *[SecretBytes]byte) cipher.AEAD {
	block, err := aes.NewCipher(secret[:])
	if err != nil { // only a wrong length fails
		panic(err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil { // only a block that is not AES fails
		panic(err)
	}
	return aead
}

// Format keeps the key schedules out of every verb of fmt: some verbs print all of a cipher.
func (s *Store) Format(f fmt.State, _ rune) {
	_, _ = fmt.Fprintf(f, "encrypted store, key %d", s.current)
}

// CheckBudget calls the inner store.
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
	case record != nil && record.Open: // it has no answer yet
		return nil, record, nil
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
	if err != nil || record == nil || record.Open {
		return record, err
	}
	if err := s.open(claim.Key, record); err != nil {
		return nil, fmt.Errorf("decrypt the record: %w", err)
	}
	return record, nil
}

// attempt encrypts the recorded answer. Everything else is the inner store's.
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
