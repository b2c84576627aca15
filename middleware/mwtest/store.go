package mwtest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/memory"
)

// Store keeps records in memory, gives each handler a transaction to write in, and reports how each
// transaction ended. It is safe for concurrent use.
type Store struct {
	records *memory.Store

	mu       sync.Mutex
	failures []error // of the next commits
	ends     []End
	written  int
	open     int
	claims   []claimed
	ended    chan struct{} // closed, and replaced, at each end
}

// claimed is a claim's key as it came, and a copy that shares no memory with it.
type claimed struct{ key, copied idempotency.Key }

// End is the end of one transaction.
type End struct {
	Verb   string              // COMMIT, DECLINE or ROLLBACK
	Key    idempotency.Key     // Value is empty for a request without a key
	Answer *idempotency.Answer // as recorded; nil after ROLLBACK and if Err is set
	Err    error               // of the end; if it is set the transaction was rolled back
}

// String returns the verb, and if the end failed it says so.
func (e End) String() string {
	if e.Err != nil {
		return e.Verb + " failed"
	}
	return e.Verb
}

var _ idempotency.Store = (*Store)(nil)

// NewStore returns an empty store.
func NewStore() *Store { return &Store{records: memory.New(nil), ended: make(chan struct{})} }

// FailCommits makes the next commits return these errors, one each, such as
// [idempotency.ErrNotSerializable]. Nothing of their attempts remains.
func (s *Store) FailCommits(errs ...error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failures = append(s.failures, errs...)
}

// Ends returns the ends of all transactions, in their order.
func (s *Store) Ends() []End {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.ends)
}

// Written returns the number of committed writes: those of [Write] in transactions that ended in a
// COMMIT, and those without a transaction.
func (s *Store) Written() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.written
}

// ErrTransactionMissing is the error of a [Store.Write] in a context without an open transaction of
// the store: the handler did not get the context that the middleware made, or ran after its end.
var ErrTransactionMissing = errors.New("the handler's context carries no open transaction: hand the context of the middleware's request to the framework, and run the handler inside of the middleware")

// Write writes a row in the transaction that ctx carries, as a handler does. Without an open
// transaction the row is written at once, as on a conn of its own, and Write returns
// [ErrTransactionMissing].
func (s *Store) Write(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	a, ok := ctx.Value(transactionKey{}).(*attempt)
	if !ok || a.store != s || a.sealed {
		s.written++
		return ErrTransactionMissing
	}
	a.writes++
	return nil
}

type transactionKey struct{}

// Begin implements [idempotency.Store].
func (s *Store) Begin(ctx context.Context, claim *idempotency.Claim) (idempotency.Attempt, *idempotency.Record, error) {
	s.mu.Lock()
	s.claims = append(s.claims, claimed{claim.Key, idempotency.Key{Scope: strings.Clone(claim.Key.Scope), Value: strings.Clone(claim.Key.Value)}})
	s.mu.Unlock()
	inner, record, err := s.records.Begin(ctx, claim)
	if inner == nil {
		return nil, record, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open++
	return &attempt{Attempt: inner, store: s, key: claim.Key}, nil, nil
}

// Resolve implements [idempotency.Store].
func (s *Store) Resolve(ctx context.Context, claim *idempotency.Claim) (*idempotency.Record, error) {
	return s.records.Resolve(ctx, claim)
}

// attempt is an attempt of storage/memory with writes that can be undone.
type attempt struct {
	idempotency.Attempt
	store *Store
	key   idempotency.Key

	// Guarded by store.mu.
	writes int
	sealed bool
}

// Context implements [idempotency.Attempt].
func (a *attempt) Context(ctx context.Context) context.Context {
	return context.WithValue(a.Attempt.Context(ctx), transactionKey{}, a)
}

// Seal implements [idempotency.Attempt].
func (a *attempt) Seal() error {
	a.store.mu.Lock()
	defer a.store.mu.Unlock()
	a.sealed = true
	return a.Attempt.Seal()
}

// Commit implements [idempotency.Attempt].
func (a *attempt) Commit(ctx context.Context, answer *idempotency.Answer) error {
	var err error
	a.store.mu.Lock()
	if left := a.store.failures; len(left) > 0 {
		err, a.store.failures = left[0], left[1:]
	}
	a.store.mu.Unlock()
	if err != nil {
		err = errors.Join(fmt.Errorf("commit: %w", err), a.Attempt.Rollback(ctx))
	} else {
		err = a.Attempt.Commit(ctx, answer)
	}
	a.end("COMMIT", answer, err)
	return err
}

// Decline implements [idempotency.Attempt].
func (a *attempt) Decline(ctx context.Context, answer *idempotency.Answer) error {
	err := a.Attempt.Decline(ctx, answer)
	a.end("DECLINE", answer, err)
	return err
}

// Rollback implements [idempotency.Attempt].
func (a *attempt) Rollback(ctx context.Context) error {
	err := a.Attempt.Rollback(ctx)
	a.end("ROLLBACK", nil, err)
	return err
}

func (a *attempt) end(verb string, answer *idempotency.Answer, err error) {
	s := a.store
	s.mu.Lock()
	defer s.mu.Unlock()
	end := End{Verb: verb, Key: a.key, Err: err}
	if answer != nil && err == nil {
		end.Answer = copyOf(answer)
	}
	if verb == "COMMIT" && err == nil {
		s.written += a.writes
	}
	s.ends = append(s.ends, end)
	s.open--
	close(s.ended)
	s.ended = make(chan struct{})
}

// copyOf returns a copy that shares nothing.
func copyOf(answer *idempotency.Answer) *idempotency.Answer {
	c := &idempotency.Answer{Status: answer.Status, Header: map[string][]string{}, Body: slices.Clone(answer.Body)}
	for name, values := range answer.Header {
		for _, value := range values {
			c.Header[strings.Clone(name)] = append(c.Header[name], strings.Clone(value))
		}
	}
	return c
}

// awaitEnds blocks until no transaction is open and at least n have ended, or ctx ends.
func (s *Store) awaitEnds(ctx context.Context, n int) error {
	for {
		s.mu.Lock()
		open, ends, ended := s.open, len(s.ends), s.ended
		s.mu.Unlock()
		if open == 0 && ends >= n {
			return nil
		}
		select {
		case <-ended:
		case <-ctx.Done():
			return fmt.Errorf("%d transactions are open and %d have ended, want 0 and %d", open, ends, n)
		}
	}
}

// changed returns the number of keys that have changed since they were claimed.
func (s *Store) changed() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.claims {
		if c.key != c.copied {
			n++
		}
	}
	return n
}
