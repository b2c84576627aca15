package storagetest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/paidonce/idempotency"
)

// reference is a store in memory that makes every promise, and breaks the one that fault names.
type reference struct {
	fault string

	mu      sync.Mutex
	now     time.Time
	claims  map[idempotency.Key]bool
	records map[idempotency.Key]*idempotency.Record
	opens   map[idempotency.Key]*idempotency.Open
	written map[string]int
	slots   int // connections that are left

	resolvers int           // that are waiting
	ended     chan struct{} // closed, and replaced, when an attempt ends
}

func newReference(fault string) *reference {
	return &reference{
		fault: fault, now: time.Date(2025, 7, 1, 12, 0, 0, 0, time.UTC), slots: 100,
		claims:  map[idempotency.Key]bool{},
		records: map[idempotency.Key]*idempotency.Record{},
		opens:   map[idempotency.Key]*idempotency.Open{},
		written: map[string]int{},
		ended:   make(chan struct{}),
	}
}

func (s *reference) harness() *Harness {
	h := &Harness{
		Store: s,
		Write: func(ctx context.Context, name string) error {
			a := ctx.Value(referenceKey{}).(*referenceAttempt)
			s.mu.Lock()
			defer s.mu.Unlock()
			switch {
			case s.fault == "writes at once":
				s.written[name]++
			case s.fault == "writes after the seal" && a.sealed:
				s.written[name]++
			case s.fault == "writes after the seal unheard" && a.sealed:
			case a.sealed || a.broken:
				return errors.New("no transaction")
			default:
				a.writes = append(a.writes, name)
			}
			return nil
		},
		Written: func(_ context.Context, name string) (int, error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			return s.written[name], nil
		},
		Break: func(ctx context.Context) error {
			ctx.Value(referenceKey{}).(*referenceAttempt).broken = true
			return errors.New("broken")
		},
		Reopen: func(context.Context) (idempotency.Store, error) {
			if s.fault == "not durable" {
				return newReference(""), nil
			}
			return s, nil
		},
		Advance: func(_ context.Context, d time.Duration) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.now = s.now.Add(d)
			return nil
		},
		DeleteExpired: s.deleteExpired,
		Record: func(_ context.Context, claim *idempotency.Claim, answer *idempotency.Answer) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.record(claim, answer)
			return nil
		},
	}
	return h
}

func (s *reference) deleteExpired(context.Context) (deleted int64, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, record := range s.records {
		if expired := record.ExpiresAt.Before(s.now); expired != (s.fault == "deletes the wrong ones") {
			deleted++
			delete(s.records, key)
		}
	}
	if s.fault == "deletes claims" {
		clear(s.claims)
	}
	return deleted, nil
}

// key returns the key under which the store keeps a request.
func (s *reference) key(claim *idempotency.Claim) idempotency.Key {
	k := claim.Key
	truncate := func(s string) string { return s[:min(len(s), idempotency.KeyBytesMax-1)] }
	switch s.fault {
	case "ignores the scope":
		k.Scope = ""
	case "joins the parts":
		k = idempotency.Key{Value: k.Scope + ":" + k.Value}
	case "joins the parts with nothing":
		k = idempotency.Key{Value: k.Scope + k.Value}
	case "ignores the case":
		k.Value = strings.ToLower(k.Value)
	case "ignores the case of scopes":
		k.Scope = strings.ToLower(k.Scope)
	case "truncates":
		k.Value = truncate(k.Value)
	case "truncates scopes":
		k.Scope = truncate(k.Scope)
	case "trims scopes":
		k.Scope = strings.TrimSpace(k.Scope)
	case "escapes":
		k.Value = strings.ReplaceAll(k.Value, `\\`, `\`)
	case "one key for all":
		k = idempotency.Key{}
	}
	return k
}

func (s *reference) Begin(ctx context.Context, claim *idempotency.Claim) (idempotency.Attempt, *idempotency.Record, error) {
	a := &referenceAttempt{store: s, claim: *claim, begin: ctx}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fault != "does not say when it claimed" {
		claim.At = s.now
	}
	if ctx.Err() != nil && s.fault != "claims when cancelled" {
		return nil, nil, ctx.Err()
	}
	if s.slots == 0 {
		return nil, nil, idempotency.ErrUnavailable
	}
	if claim.Keyless() && s.fault != "keyless collides" && s.fault != "keyless records" {
		s.slots--
		return a, nil, nil
	}
	key := s.key(claim)
	if s.claims[key] && s.fault == "claim wins over record" {
		return nil, nil, idempotency.ErrInProgress
	}
	if record := s.records[key]; record != nil {
		switch {
		case s.fault == "expires by the clock" && record.ExpiresAt.Before(s.now):
		case s.fault == "hides records of other requests" && record.Fingerprint != claim.Fingerprint:
		case s.fault == "one replay at a time" && !s.claims[key]:
			s.claims[key] = true
			time.AfterFunc(50*time.Millisecond, func() { // holds the key while it reads
				s.mu.Lock()
				defer s.mu.Unlock()
				delete(s.claims, key)
			})
			return nil, s.clone(record), nil
		case s.fault == "one replay at a time":
			return nil, nil, idempotency.ErrInProgress
		case s.fault == "a record with an error":
			return nil, s.clone(record), idempotency.ErrInProgress
		case s.fault == "record of the finder":
			found := s.clone(record)
			found.Fingerprint = claim.Fingerprint
			return nil, found, nil
		default:
			return nil, s.clone(record), nil
		}
	}
	if s.claims[key] && s.fault == "waits" {
		s.mu.Unlock()
		<-ctx.Done()
		s.mu.Lock()
		return nil, nil, ctx.Err()
	}
	if s.claims[key] && s.fault == "steals claims" {
		delete(s.claims, key)
		return nil, nil, idempotency.ErrInProgress
	}
	if s.claims[key] && s.fault != "claims twice" {
		return nil, nil, idempotency.ErrInProgress
	}
	s.claims[key] = true
	s.slots--
	if ctx.Err() != nil && s.fault == "claims when cancelled" {
		return nil, nil, ctx.Err()
	}
	return a, nil, nil
}

func (s *reference) Resolve(ctx context.Context, claim *idempotency.Claim) (*idempotency.Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := s.key(claim)
	if s.fault == "resolves in every scope" {
		for other := range s.claims {
			if other.Value == key.Value {
				key = other
			}
		}
		for other := range s.records {
			if other.Value == key.Value {
				key = other
			}
		}
	}
	before := s.records[key]
	if s.resolvers > 0 && s.fault == "resolves one at a time" {
		return nil, idempotency.ErrUnknown
	}
	s.resolvers++
	defer func() { s.resolvers-- }()
	for s.claims[key] && s.fault != "resolves without waiting" {
		ended := s.ended
		s.mu.Unlock()
		over := ctx.Done()
		if s.fault == "resolves for ever" {
			over = nil
		}
		select {
		case <-ended:
			s.mu.Lock()
		case <-over:
			s.mu.Lock()
			switch s.fault {
			case "gives up as absent":
				return nil, nil
			case "gives up as unavailable":
				return nil, fmt.Errorf("%w: %w", idempotency.ErrUnavailable, ctx.Err())
			case "takes what it waits for":
				delete(s.claims, key)
			}
			return nil, fmt.Errorf("%w: %w", idempotency.ErrUnknown, ctx.Err())
		case <-time.After(time.Second): // of the fault: no case may hang
			s.mu.Lock()
			return nil, idempotency.ErrUnknown
		}
		if s.fault == "looks before it waits" {
			break
		}
	}
	record := s.records[key]
	switch {
	case s.fault == "looks before it waits":
		record = before
	case s.fault == "keeps what it resolves" && record == nil:
		s.claims[key] = true
	case s.fault == "forgets what it resolves":
		delete(s.records, key)
	}
	if record == nil {
		if s.fault != "takes an old absence for proof" && !claim.At.IsZero() && 2*s.now.Sub(claim.At) >= claim.TTL {
			return nil, idempotency.ErrUnknown
		}
		return nil, nil
	}
	found := s.clone(record)
	switch {
	case s.fault == "resolves to itself":
		found.Fingerprint, found.Attempt = claim.Fingerprint, claim.Attempt
	case s.fault == "resolves its own alone" && found.Attempt != claim.Attempt:
		return nil, nil
	}
	return found, nil
}

func (s *reference) clone(record *idempotency.Record) *idempotency.Record {
	c := *record
	if s.fault == "shares its record" {
		return &c
	}
	c.Answer.Body = slices.Clone(record.Answer.Body)
	c.Answer.Header = maps.Clone(record.Answer.Header)
	for name, values := range c.Answer.Header {
		c.Answer.Header[name] = slices.Clone(values)
	}
	return &c
}

func (s *reference) record(claim *idempotency.Claim, answer *idempotency.Answer) {
	r := &idempotency.Record{
		Fingerprint: claim.Fingerprint, Attempt: claim.Attempt, Answer: *answer, TraceID: claim.TraceID,
		CreatedAt: s.now, ExpiresAt: s.now.Add(claim.TTL),
	}
	if s.fault != "shares the answer" {
		r = s.clone(r)
	}
	edit := func(f func([]string) []string) {
		for name, values := range r.Answer.Header {
			r.Answer.Header[name] = f(values)
		}
	}
	switch s.fault {
	case "loses the status":
		r.Answer.Status = 200
	case "loses headers":
		r.Answer.Header = nil
	case "joins values":
		edit(func(values []string) []string { return []string{strings.Join(values, ", ")} })
	case "sorts values":
		edit(func(values []string) []string { return slices.Sorted(slices.Values(values)) })
	case "makes UTF-8 of values":
		edit(func(values []string) []string {
			for i := range values {
				values[i] = strings.ToValidUTF8(values[i], "?")
			}
			return values
		})
	case "trims the body":
		r.Answer.Body = []byte(strings.TrimSpace(string(r.Answer.Body)))
	case "ends the body at NUL":
		before, _, _ := strings.Cut(string(r.Answer.Body), "\x00")
		r.Answer.Body = []byte(before)
	case "loses the version":
		r.Fingerprint.Version = 1
	case "loses the fingerprint":
		r.Fingerprint.Sum = [32]byte{}
	case "loses the attempt":
		r.Attempt = idempotency.NewAttemptID()
	case "loses the trace":
		r.TraceID = ""
	case "ignores the TTL":
		r.ExpiresAt = s.now.Add(ttl)
	}
	s.records[s.key(claim)] = r
}

type referenceKey struct{}

type referenceAttempt struct {
	store  *reference
	claim  idempotency.Claim
	begin  context.Context
	writes []string
	sealed bool
	broken bool
}

func (a *referenceAttempt) Context(ctx context.Context) context.Context {
	if a.store.fault == "loses the context" {
		ctx = context.Background()
	}
	if a.store.fault == "loses the context's end" {
		ctx = context.WithoutCancel(ctx)
	}
	return context.WithValue(ctx, referenceKey{}, a)
}

func (a *referenceAttempt) Lost() bool { return false }

func (a *referenceAttempt) Seal() error {
	a.store.mu.Lock()
	defer a.store.mu.Unlock()
	a.sealed = true
	if a.broken && a.store.fault != "seals over everything" {
		return idempotency.ErrAborted
	}
	if a.store.fault == "seal fails" {
		return idempotency.ErrAborted
	}
	return nil
}

func (a *referenceAttempt) Commit(ctx context.Context, answer *idempotency.Answer) error {
	s := a.store
	s.mu.Lock()
	defer s.mu.Unlock()
	switch err := errors.Join(ctx.Err()); {
	case s.fault == "lies about commits" && err != nil:
		a.end(nil, false, "")
		return nil
	case s.fault == "denies commits" && err != nil:
		a.end(answer, true, "")
		return fmt.Errorf("%w: %w", idempotency.ErrUnavailable, err)
	case err != nil, s.fault == "is bound by Begin" && a.begin.Err() != nil:
		a.end(nil, false, "")
		return fmt.Errorf("%w: %w", idempotency.ErrUnavailable, errors.Join(err, a.begin.Err()))
	case a.broken && s.fault == "commits what is broken":
		a.end(nil, false, "")
		return nil
	case a.broken:
		a.end(nil, false, "")
		return idempotency.ErrAborted
	case !a.claim.Keyless() && s.records[s.key(&a.claim)] != nil && s.fault != "overwrites":
		a.end(nil, s.fault == "loser keeps its writes", "")
		return idempotency.ErrKeyRecorded
	}
	if s.fault == "loses records" {
		answer = nil
	}
	a.end(answer, s.fault != "loses writes", "commit keeps the claim")
	return nil
}

func (a *referenceAttempt) Decline(ctx context.Context, answer *idempotency.Answer) error {
	s := a.store
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case ctx.Err() != nil:
		a.end(nil, false, "")
		return fmt.Errorf("%w: %w", idempotency.ErrUnavailable, ctx.Err())
	case a.broken && s.fault == "can't decline what is broken":
		a.end(nil, false, "")
		return idempotency.ErrAborted
	case !a.claim.Keyless() && s.records[s.key(&a.claim)] != nil && s.fault != "overwrites":
		a.end(nil, false, "")
		return idempotency.ErrKeyRecorded
	}
	if s.fault == "declines are forgotten" {
		answer = nil
	}
	a.end(answer, s.fault == "declines keep writes" || s.fault == "keyless declines keep writes" && a.claim.Keyless(), "decline keeps the claim")
	return nil
}

func (a *referenceAttempt) Rollback(context.Context) error {
	a.store.mu.Lock()
	defer a.store.mu.Unlock()
	a.end(nil, a.store.fault == "rollback keeps writes" || a.store.fault == "panic keeps writes" && a.sealed, "rollback keeps the claim")
	return nil
}

func (a *referenceAttempt) end(answer *idempotency.Answer, keep bool, keepsClaim string) {
	s := a.store
	a.sealed = true
	defer func() {
		close(s.ended)
		s.ended = make(chan struct{})
	}()
	if s.fault != "leaks" {
		s.slots++
	}
	if keep {
		for _, name := range a.writes {
			s.written[name]++
		}
	}
	if a.claim.Keyless() && s.fault != "keyless collides" && s.fault != "keyless records" {
		return
	}
	if s.fault != keepsClaim || keepsClaim == "" {
		delete(s.claims, s.key(&a.claim))
	}
	if answer != nil && (!a.claim.Keyless() || s.fault == "keyless records") {
		s.record(&a.claim, answer)
	}
}
