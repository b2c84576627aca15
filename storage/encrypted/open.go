package encrypted

import (
	"context"
	"fmt"
	"time"

	"github.com/paidonce/idempotency"
)

// In an open request the stored request, and the input and output of each effect, are encrypted.
// Each is bound to its key, its attempt and its place, so that none can stand in for another.

var _ idempotency.Keeper = (*Store)(nil)

// keeper returns the inner store, if it can keep requests open.
func (s *Store) keeper() (idempotency.Keeper, error) {
	keeper, ok := s.inner.(idempotency.Keeper)
	if !ok {
		return nil, idempotency.ErrNotKept
	}
	return keeper, nil
}

// BeginOpen implements [idempotency.Keeper]. It returns [idempotency.ErrNotKept] if the inner store
// can't keep requests open.
func (s *Store) BeginOpen(ctx context.Context, claim *idempotency.Claim, lazy bool) (idempotency.OpenAttempt, *idempotency.Record, error) {
	inner, err := s.keeper()
	if err != nil {
		return nil, nil, err
	}
	if stored := claim.Stored; stored != nil {
		claim.Stored = func() []byte { return s.sealPart(stored(), claim.Key, claim.Attempt, "request", "") }
	}
	begun, record, err := inner.BeginOpen(ctx, claim, lazy)
	switch {
	case err != nil:
		return nil, nil, err
	case record != nil && !record.Open:
		if err := s.open(claim.Key, record); err != nil {
			return nil, nil, fmt.Errorf("decrypt the record: %w", err)
		}
		return nil, record, nil
	case record != nil:
		return nil, record, nil
	}
	return &openAttempt{OpenAttempt: begun, store: s, claim: claim}, nil, nil
}

// TakeOver implements [idempotency.Keeper].
func (s *Store) TakeOver(ctx context.Context, claim *idempotency.Claim) (idempotency.OpenAttempt, *idempotency.Open, error) {
	inner, err := s.keeper()
	if err != nil {
		return nil, nil, err
	}
	begun, open, err := inner.TakeOver(ctx, claim)
	if err != nil || open == nil {
		return nil, nil, err
	}
	if begun == nil { // only its state is of interest
		return nil, open, nil
	}
	if err := s.openParts(claim.Key, open); err != nil {
		return nil, nil, err // the lease runs out
	}
	return &openAttempt{OpenAttempt: begun, store: s, claim: claim}, open, nil
}

// LookUp implements [idempotency.Keeper].
func (s *Store) LookUp(ctx context.Context, key idempotency.Key) (*idempotency.Record, error) {
	inner, err := s.keeper()
	if err != nil {
		return nil, err
	}
	record, err := inner.LookUp(ctx, key)
	if err != nil || record == nil || record.Open {
		return record, err
	}
	if err := s.open(key, record); err != nil {
		return nil, fmt.Errorf("decrypt the record: %w", err)
	}
	return record, nil
}

// ReadOpen implements [idempotency.Keeper].
func (s *Store) ReadOpen(ctx context.Context, key idempotency.Key) (*idempotency.Open, error) {
	inner, err := s.keeper()
	if err != nil {
		return nil, err
	}
	return inner.ReadOpen(ctx, key)
}

// FindDue implements [idempotency.Keeper].
func (s *Store) FindDue(ctx context.Context, routes []string, max int) ([]idempotency.Key, error) {
	inner, err := s.keeper()
	if err != nil {
		return nil, err
	}
	return inner.FindDue(ctx, routes, max)
}

// EffectsByKey implements [idempotency.EffectReader]. It returns an error if it lacks the key of an
// effect.
func (s *Store) EffectsByKey(ctx context.Context, derivedKeys []string) ([]idempotency.EffectRecord, error) {
	return s.openRecords(func(inner idempotency.EffectReader) ([]idempotency.EffectRecord, error) {
		return inner.EffectsByKey(ctx, derivedKeys)
	})
}

// EffectsBetween implements [idempotency.EffectReader], as EffectsByKey does.
func (s *Store) EffectsBetween(ctx context.Context, names []string, from, to time.Time, after string, max int) ([]idempotency.EffectRecord, error) {
	return s.openRecords(func(inner idempotency.EffectReader) ([]idempotency.EffectRecord, error) {
		return inner.EffectsBetween(ctx, names, from, to, after, max)
	})
}

func (s *Store) openRecords(read func(idempotency.EffectReader) ([]idempotency.EffectRecord, error)) ([]idempotency.EffectRecord, error) {
	inner, ok := s.inner.(idempotency.EffectReader)
	if !ok {
		return nil, idempotency.ErrNotKept
	}
	records, err := read(inner)
	if err != nil {
		return nil, err
	}
	for i := range records {
		if err := s.openEffect(records[i].Key, records[i].Attempt, &records[i].Effect); err != nil {
			return nil, err
		}
	}
	return records, nil
}

// openAttempt encrypts the parts of its open request.
type openAttempt struct {
	idempotency.OpenAttempt
	store *Store
	claim *idempotency.Claim
}

// Intend implements [idempotency.OpenAttempt].
func (a *openAttempt) Intend(ctx context.Context, effect *idempotency.Effect, lease time.Duration) error {
	sealed := *effect
	sealed.Input = a.store.sealPart(effect.Input, a.claim.Key, a.claim.Attempt, "input", effect.Name)
	if effect.State != idempotency.EffectIntended { // a phase
		sealed.Output = a.store.sealPart(effect.Output, a.claim.Key, a.claim.Attempt, "output", effect.Name)
	}
	err := a.OpenAttempt.Intend(ctx, &sealed, lease)
	effect.SentFirst = sealed.SentFirst
	return err
}

// Settle implements [idempotency.OpenAttempt].
func (a *openAttempt) Settle(ctx context.Context, effect *idempotency.Effect) error {
	sealed := *effect
	sealed.Output = a.store.sealPart(effect.Output, a.claim.Key, a.claim.Attempt, "output", effect.Name)
	return a.OpenAttempt.Settle(ctx, &sealed)
}

// Recorded implements [idempotency.OpenAttempt].
func (a *openAttempt) Recorded(ctx context.Context, name string) (*idempotency.Effect, error) {
	effect, err := a.OpenAttempt.Recorded(ctx, name)
	if err != nil {
		return nil, err
	}
	return effect, a.store.openEffect(a.claim.Key, a.claim.Attempt, effect)
}

// Commit implements [idempotency.Attempt].
func (a *openAttempt) Commit(ctx context.Context, answer *idempotency.Answer) error {
	return a.OpenAttempt.Commit(ctx, a.store.seal(a.claim, answer))
}

// Decline implements [idempotency.Attempt].
func (a *openAttempt) Decline(ctx context.Context, answer *idempotency.Answer) error {
	return a.OpenAttempt.Decline(ctx, a.store.seal(a.claim, answer))
}

// sealPart returns the envelope of a part of an open request.
func (s *Store) sealPart(plain []byte, key idempotency.Key, attempt idempotency.AttemptID, part, name string) []byte {
	envelope := make([]byte, 0, headBytes+sealBytes+len(plain))
	envelope = append(envelope, mark...)
	envelope = append(envelope, envelopeVersion, s.current)
	return s.ciphers[s.current].Seal(envelope, nil, plain, boundPart(s.current, key, attempt, part, name))
}

// SealOutput encrypts an output that an operator or a webhook gives for an effect of an open
// request (operator.Settle, postgres.Store.Settle). attempt is that of the open request.
func (s *Store) SealOutput(output []byte, key idempotency.Key, attempt idempotency.AttemptID, effect string) []byte {
	return s.sealPart(output, key, attempt, "output", effect)
}

// openPart returns the plaintext of a part of an open request. It accepts a part that is not
// encrypted only with Keys.DangerAcceptUnencrypted.
func (s *Store) openPart(stored []byte, key idempotency.Key, attempt idempotency.AttemptID, part, name string) ([]byte, error) {
	keyID, sealed, err := parseEnvelope(stored)
	switch {
	case err != nil && s.acceptUnencrypted:
		return stored, nil
	case err != nil:
		return nil, fmt.Errorf("decrypt the %s of an open request: %w", part, err)
	}
	aead := s.ciphers[keyID]
	if aead == nil {
		return nil, fmt.Errorf("decrypt the %s of an open request: %w: it was encrypted with key %d: name that in Keys.Older", part, idempotency.ErrUnknown, keyID)
	}
	// Not nil, even if it is empty: an output that is nil would mean that nobody stated one.
	plain, err := aead.Open([]byte{}, nil, sealed, boundPart(keyID, key, attempt, part, name))
	if err != nil {
		return nil, fmt.Errorf("decrypt the %s of an open request: %w", part, errForged)
	}
	return plain, nil
}

// openParts decrypts all parts of an open request.
func (s *Store) openParts(key idempotency.Key, open *idempotency.Open) (err error) {
	if open.Request, err = s.openPart(open.Request, key, open.Attempt, "request", ""); err != nil {
		return err
	}
	for i := range open.Effects {
		if err := s.openEffect(key, open.Attempt, &open.Effects[i]); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) openEffect(key idempotency.Key, attempt idempotency.AttemptID, effect *idempotency.Effect) (err error) {
	if effect.Input, err = s.openPart(effect.Input, key, attempt, "input", effect.Name); err != nil || effect.State == idempotency.EffectIntended && effect.Output == nil {
		return err
	}
	effect.Output, err = s.openPart(effect.Output, key, attempt, "output", effect.Name)
	return err
}

// boundPart returns the data to which a part of an open request is bound.
func boundPart(keyID byte, key idempotency.Key, attempt idempotency.AttemptID, part, name string) []byte {
	out := appendField(nil, "paidonce open request")
	out = append(out, envelopeVersion, keyID)
	out = appendField(out, key.Scope)
	out = appendField(out, key.Value)
	out = append(out, attempt[:]...)
	out = appendField(out, part)
	return appendField(out, name)
}
