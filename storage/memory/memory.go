// Package memory keeps idempotency records in the memory of one process, for the unit tests of a
// handler.
//
// Nothing survives the process, and the handler gets no database transaction: writes that a handler
// makes elsewhere are not undone if it declines, fails or panics, and are not committed together
// with its answer. In production that pays twice; use package storage/postgres there. Everything
// else is the same: one claim per key, a record that counts until it is deleted, an answer that is
// replayed byte by byte.
package memory

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/paidonce/idempotency"
)

// Options tune a [Store]. Nil and the zero value are the defaults.
type Options struct {
	// Now is the clock that dates the records, so that a test can make them expire. It must be safe
	// for concurrent use. Defaults to time.Now.
	Now func() time.Time

	// Fault, if set, is called before each claim, commit, decline and resolve. If it returns an
	// error, the step returns that error, and nothing of the attempt remains (a fault of resolve
	// changes nothing). Use [idempotency.ErrUnavailable] to test how a client handles a 503
	// not-executed, and [idempotency.ErrUnknown] at a commit and its resolve for a 503 unknown. It
	// must be safe for concurrent use.
	Fault func(step idempotency.Step) error
}

// Store keeps records in memory. It is safe for concurrent use.
type Store struct {
	options Options

	mu      sync.Mutex
	claims  map[idempotency.Key]chan struct{} // closed when the claim ends
	records map[idempotency.Key]*idempotency.Record
}

var _ idempotency.Store = (*Store)(nil)

// New returns an empty store.
func New(opts *Options) *Store {
	s := &Store{claims: map[idempotency.Key]chan struct{}{}, records: map[idempotency.Key]*idempotency.Record{}}
	if opts != nil {
		s.options = *opts
	}
	if s.options.Now == nil {
		s.options.Now = time.Now
	}
	if s.options.Fault == nil {
		s.options.Fault = func(idempotency.Step) error { return nil }
	}
	return s
}

// Begin implements [idempotency.Store].
func (s *Store) Begin(ctx context.Context, claim *idempotency.Claim) (idempotency.Attempt, *idempotency.Record, error) {
	if err := s.refuse(ctx, idempotency.StepClaim); err != nil {
		return nil, nil, err
	}
	claim.At = s.now()
	a := &attempt{store: s, claim: *claim, claimedAt: claim.At}
	if claim.Keyless() {
		return a, nil, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if record, ok := s.records[claim.Key]; ok {
		return nil, clone(record), nil
	}
	if s.claims[claim.Key] != nil {
		return nil, nil, idempotency.ErrInProgress
	}
	s.claims[claim.Key] = make(chan struct{})
	return a, nil, nil
}

// Resolve implements [idempotency.Store].
func (s *Store) Resolve(ctx context.Context, claim *idempotency.Claim) (*idempotency.Record, error) {
	if err := s.options.Fault(idempotency.StepResolve); err != nil {
		return nil, fmt.Errorf("resolve: %w", err)
	}
	for {
		s.mu.Lock()
		record, held := s.records[claim.Key], s.claims[claim.Key]
		if record != nil {
			record = clone(record)
		}
		s.mu.Unlock()
		switch {
		case held != nil:
		case record == nil && !claim.At.IsZero() && 2*s.now().Sub(claim.At) >= claim.TTL:
			return nil, fmt.Errorf("resolve: %w: the record may have been there, and expired", idempotency.ErrUnknown)
		default:
			return record, nil
		}
		select {
		case <-held:
		case <-ctx.Done():
			return nil, fmt.Errorf("resolve: %w: %w", idempotency.ErrUnknown, ctx.Err())
		}
	}
}

// Len returns the number of records, including expired ones.
func (s *Store) Len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.records)
}

// Records returns a copy of the records, including expired ones.
func (s *Store) Records() map[idempotency.Key]*idempotency.Record {
	s.mu.Lock()
	defer s.mu.Unlock()
	records := make(map[idempotency.Key]*idempotency.Record, len(s.records))
	for key, record := range s.records {
		records[key] = clone(record)
	}
	return records
}

// DeleteExpired deletes the expired records, and returns their number. Until then they count. It
// never fails.
func (s *Store) DeleteExpired(context.Context) (deleted int64, err error) {
	now := s.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	before := len(s.records)
	maps.DeleteFunc(s.records, func(_ idempotency.Key, r *idempotency.Record) bool { return r.ExpiresAt.Before(now) })
	return int64(before - len(s.records)), nil
}

// now has the resolution of PostgreSQL's clock.
func (s *Store) now() time.Time { return s.options.Now().UTC().Truncate(time.Microsecond) }

// refuse returns an error if a step can't be taken.
func (s *Store) refuse(ctx context.Context, step idempotency.Step) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s: %w: %w", step, idempotency.ErrUnavailable, err)
	}
	if err := s.options.Fault(step); err != nil {
		return fmt.Errorf("%s: %w", step, err)
	}
	return nil
}

// attempt is one run of a handler. It holds only its claim.
type attempt struct {
	store     *Store
	claim     idempotency.Claim
	claimedAt time.Time
	ended     bool // guarded by store.mu
}

// Context implements [idempotency.Attempt]. There is no transaction to carry.
func (a *attempt) Context(ctx context.Context) context.Context { return ctx }

// Seal implements [idempotency.Attempt].
func (a *attempt) Seal() error { return nil }

// Lost implements [idempotency.Attempt]. There is no connection to lose.
func (a *attempt) Lost() bool { return false }

// Commit implements [idempotency.Attempt].
func (a *attempt) Commit(ctx context.Context, answer *idempotency.Answer) error {
	err := a.store.refuse(ctx, idempotency.StepCommit)
	if err != nil {
		answer = nil
	}
	a.end(answer, a.claimedAt)
	return err
}

// Decline implements [idempotency.Attempt], except that the handler's writes stay: this store can't
// undo them.
func (a *attempt) Decline(ctx context.Context, answer *idempotency.Answer) error {
	err := a.store.refuse(ctx, idempotency.StepDecline)
	if err != nil {
		answer = nil
	}
	a.end(answer, a.store.now())
	return err
}

// Rollback implements [idempotency.Attempt], except that the handler's writes stay.
func (a *attempt) Rollback(context.Context) error {
	a.end(nil, time.Time{})
	return nil
}

// end releases the claim and records the answer, if there is one and the claim has a key.
func (a *attempt) end(answer *idempotency.Answer, at time.Time) {
	s := a.store
	s.mu.Lock()
	defer s.mu.Unlock()
	if a.ended {
		panic("idempotency/memory: an attempt is ended once")
	}
	a.ended = true
	if a.claim.Keyless() {
		return
	}
	close(s.claims[a.claim.Key])
	delete(s.claims, a.claim.Key)
	if answer != nil {
		s.records[a.claim.Key] = clone(&idempotency.Record{
			Fingerprint: a.claim.Fingerprint, Attempt: a.claim.Attempt, Answer: *answer, TraceID: a.claim.TraceID,
			CreatedAt: at, ExpiresAt: s.now().Add(a.claim.TTL),
		})
	}
}

// clone returns a copy that shares nothing. As in a database, a header without values is dropped.
func clone(r *idempotency.Record) *idempotency.Record {
	c := *r
	c.Answer.Body = append([]byte{}, r.Answer.Body...)
	c.Answer.Header = make(map[string][]string, len(r.Answer.Header))
	for name, values := range r.Answer.Header {
		if len(values) > 0 {
			c.Answer.Header[name] = slices.Clone(values)
		}
	}
	return &c
}
