package storagetest

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/paidonce/idempotency"
)

var _ idempotency.Keeper = (*reference)(nil)

func (s *reference) BeginOpen(ctx context.Context, claim *idempotency.Claim, lazy bool) (idempotency.OpenAttempt, *idempotency.Record, error) {
	a := &referenceOpenAttempt{referenceAttempt: &referenceAttempt{store: s, claim: *claim, begin: ctx}}
	if lazy {
		return a, nil, nil
	}
	record, err := a.claimNow(ctx)
	if record != nil || err != nil {
		return nil, record, err
	}
	return a, nil, nil
}

func (s *reference) TakeOver(_ context.Context, claim *idempotency.Claim) (idempotency.OpenAttempt, *idempotency.Open, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	open := s.opens[s.key(claim)]
	if open == nil {
		return nil, nil, nil
	}
	state := cloneOpen(open)
	state.Now = time.Now()
	if !s.due(open, state.Now) || open.Route != claim.Resumable && s.fault != "takes over on any route" {
		return nil, state, nil
	}
	if s.fault == "many take over" {
		s.mu.Unlock()
		time.Sleep(10 * time.Millisecond)
		s.mu.Lock()
	}
	open.Epoch, open.Runs, open.Owned, open.Due = open.Epoch+1, open.Runs+1, true, state.Now.Add(open.Lease)
	for i := range open.Effects {
		if effect := &open.Effects[i]; effect.State == idempotency.EffectIntended || s.fault == "doubts results" {
			effect.Doubt = state.Now
			if s.fault != "does not count tries" {
				effect.Tries++
			}
		}
	}
	if s.fault == "tells the new doubt" {
		state = cloneOpen(open)
	}
	state.Epoch, state.Runs = open.Epoch, open.Runs
	claim.TTL, claim.At = open.TTL, s.now
	if s.fault != "a new attempt's id" {
		claim.Attempt = open.Attempt
	}
	return &referenceOpenAttempt{referenceAttempt: &referenceAttempt{store: s, claim: *claim}, asked: true, epoch: open.Epoch}, state, nil
}

func (s *reference) due(open *idempotency.Open, now time.Time) bool {
	return (open.Parked == "" || s.fault == "takes what is parked") && (!now.Before(open.Due) || s.fault == "takes over at any time")
}

func (s *reference) FindDue(_ context.Context, routes []string, max int) (keys []idempotency.Key, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, open := range s.opens {
		if s.due(open, time.Now()) && (slices.Contains(routes, open.Route) || s.fault == "finds every route") {
			keys = append(keys, key)
		}
	}
	slices.SortFunc(keys, func(a, b idempotency.Key) int { return cmp.Or(s.opens[a].Due.Compare(s.opens[b].Due)) })
	return keys[:min(len(keys), max)], nil
}

func (s *reference) LookUp(_ context.Context, key idempotency.Key) (*idempotency.Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	record := s.records[key]
	switch {
	case record == nil && s.fault == "a look-up claims":
		s.claims[key] = true
		return nil, nil
	case record == nil, record.Open && s.fault == "a look-up hides what is open":
		return nil, nil
	}
	return s.clone(record), nil
}

func (s *reference) ReadOpen(_ context.Context, key idempotency.Key) (*idempotency.Open, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return cloneOpen(s.opens[key]), nil
}

func cloneOpen(open *idempotency.Open) *idempotency.Open {
	if open == nil {
		return nil
	}
	c := *open
	c.Effects = slices.Clone(open.Effects)
	return &c
}

// referenceOpenAttempt has its claim and its connection in its referenceAttempt, until it is open.
type referenceOpenAttempt struct {
	*referenceAttempt
	asked bool  // it has claimed
	epoch int64 // 0 until it is open
}

// claimNow claims the key, and returns its record if there is one.
func (a *referenceOpenAttempt) claimNow(ctx context.Context) (*idempotency.Record, error) {
	begun, record, err := a.store.Begin(ctx, &a.claim)
	if record != nil || err != nil {
		return record, err
	}
	claimed := begun.(*referenceAttempt)
	claimed.writes = a.writes
	a.referenceAttempt, a.asked = claimed, true
	return nil, nil
}

// claimed claims the key, unless that is done.
func (a *referenceOpenAttempt) claimed(ctx context.Context) error {
	if a.asked || a.store.fault == "lazy claims never" {
		return nil
	}
	record, err := a.claimNow(ctx)
	if record != nil {
		return idempotency.ErrKeyRecorded
	}
	return err
}

// open returns the request of this owner.
func (a *referenceOpenAttempt) open() (*idempotency.Open, error) {
	open := a.store.opens[a.store.key(&a.claim)]
	if open == nil || open.Epoch != a.epoch && a.store.fault != "no fence" {
		return nil, idempotency.ErrFenced
	}
	return open, nil
}

func (a *referenceOpenAttempt) Intend(ctx context.Context, effect *idempotency.Effect, lease time.Duration) error {
	if len(a.writes) > 0 && a.store.fault != "an intent drops writes" {
		return idempotency.UsageError("an effect after the handler has written")
	}
	if err := a.claimed(ctx); err != nil {
		return err
	}
	s := a.store
	s.mu.Lock()
	defer s.mu.Unlock()
	key := s.key(&a.claim)
	if a.epoch == 0 {
		if a.asked {
			s.slots++
			delete(s.claims, key)
		}
		record := &idempotency.Record{
			Fingerprint: a.claim.Fingerprint, Attempt: a.claim.Attempt, CreatedAt: s.now, ExpiresAt: s.now.Add(1000 * time.Hour), Open: s.fault != "an intent is no record",
		}
		s.records[key], a.epoch = record, 1
		s.opens[key] = &idempotency.Open{
			Route: a.claim.Resumable, Request: a.claim.Stored(), Fingerprint: a.claim.Fingerprint, Attempt: a.claim.Attempt, TTL: a.claim.TTL, Epoch: 1, Runs: 1, Started: time.Now(),
		}
	}
	open, err := a.open()
	if err != nil {
		return err
	}
	effect.SentFirst = time.Now()
	open.Lease, open.Due, open.Owned = lease, effect.SentFirst.Add(lease), true
	open.Effects = append(open.Effects, *effect)
	if s.fault == "loses the input" {
		open.Effects[len(open.Effects)-1].Input = nil
	}
	return nil
}

func (a *referenceOpenAttempt) Settle(_ context.Context, effect *idempotency.Effect) error {
	s := a.store
	s.mu.Lock()
	defer s.mu.Unlock()
	open, err := a.open()
	if err != nil {
		return err
	}
	for i := range open.Effects {
		switch of := &open.Effects[i]; {
		case of.Name != effect.Name || s.fault == "forgets results":
		case of.State != idempotency.EffectIntended && s.fault != "the last result counts":
			return idempotency.ErrFenced
		default:
			of.State, of.Output = effect.State, effect.Output
		}
	}
	a.sealed = false
	return nil
}

func (a *referenceOpenAttempt) Recorded(_ context.Context, name string) (*idempotency.Effect, error) {
	s := a.store
	s.mu.Lock()
	defer s.mu.Unlock()
	open, err := a.open()
	if err != nil {
		return nil, err
	}
	for _, effect := range open.Effects {
		if effect.Name == name {
			return &effect, nil
		}
	}
	return nil, idempotency.ErrFenced
}

func (a *referenceOpenAttempt) Commit(ctx context.Context, answer *idempotency.Answer) error {
	return a.endOpen(ctx, answer, a.referenceAttempt.Commit, a.store.fault != "an end loses writes")
}

func (a *referenceOpenAttempt) Decline(ctx context.Context, answer *idempotency.Answer) error {
	return a.endOpen(ctx, answer, a.referenceAttempt.Decline, a.store.fault == "a decline keeps writes")
}

func (a *referenceOpenAttempt) endOpen(ctx context.Context, answer *idempotency.Answer, plain func(context.Context, *idempotency.Answer) error, keep bool) error {
	if a.epoch == 0 {
		return plain(ctx, answer)
	}
	s := a.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := a.open(); err != nil {
		return err
	}
	key := s.key(&a.claim)
	delete(s.records, key)
	s.record(&a.claim, answer)
	if s.fault != "an end leaves it open" {
		delete(s.opens, key)
	}
	a.write(keep)
	return nil
}

// write commits the writes, or undoes them.
func (a *referenceOpenAttempt) write(keep bool) {
	if keep {
		for _, name := range a.writes {
			a.store.written[name]++
		}
	}
	a.writes = nil
}

func (a *referenceOpenAttempt) Rollback(ctx context.Context) error {
	if a.epoch > 0 {
		a.writes = nil
		return nil
	}
	if err := a.claimed(ctx); err != nil {
		return fmt.Errorf("roll back: %w", err)
	}
	if !a.asked {
		return nil
	}
	return a.referenceAttempt.Rollback(ctx)
}

func (a *referenceOpenAttempt) Leave(_ context.Context, lapse idempotency.Lapse) error {
	s := a.store
	s.mu.Lock()
	defer s.mu.Unlock()
	a.write(s.fault == "leaving keeps writes")
	open, err := a.open()
	if err != nil {
		return err
	}
	open.Due, open.Owned, open.Parked, open.LastFail = time.Now().Add(lapse.Pause), false, lapse.Parked, lapse.Reason
	for i := range open.Effects {
		effect := &open.Effects[i]
		if doubt, ok := lapse.Doubts[effect.Name]; ok && effect.State == idempotency.EffectIntended {
			effect.Doubt = doubt.At
			if !doubt.Sent && s.fault != "counts what was not sent" {
				effect.Tries--
			}
		}
	}
	if s.fault == "leaves for no pause" {
		open.Due = time.Now()
	}
	return nil
}
