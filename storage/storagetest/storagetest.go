// Package storagetest tests that an idempotency.Store keeps its contract.
//
//	func TestConformance(t *testing.T) {
//		storagetest.Run(t, storagetest.Features{}, func(t *testing.T) *storagetest.Harness {
//			store := mystore.New(emptyDatabase(t))
//			return &storagetest.Harness{Store: store, DeleteExpired: store.DeleteExpired, ...}
//		})
//	}
//
// Each case is a subtest on a fresh store, and guards one rule. A case that fails prints its rule.
// If the store does not make the promise of a case, the case is skipped and says so. Run it with
// -race.
package storagetest

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
)

// Features names the promises that a store does not make. The zero value is a store that makes all
// of them.
type Features struct {
	// WritesStay: the handler has no transaction; its writes stay whatever the end of the attempt.
	// Handlers then pay twice after a crash. Harness.Write, Written and Break may be nil.
	WritesStay bool

	// NotDurable: a second store on the same data does not know the records of the first.
	// Harness.Reopen may be nil.
	NotDurable bool

	// NoExpiry: records are never deleted. Harness.Advance and DeleteExpired may be nil.
	NoExpiry bool

	// ClaimsAreCertain: nobody can record a key that another attempt has claimed, so Commit never
	// returns ErrKeyRecorded. Harness.Record may be nil.
	ClaimsAreCertain bool

	// RunsAgain: concurrent attempts may return ErrNotSerializable although nothing else is wrong.
	// Two handlers may run for one key; then one is undone, and its client gets the other's answer.
	// This happens if a claim shares a snapshot with the handler, as in PostgreSQL above READ
	// COMMITTED.
	RunsAgain bool

	// NotKept: the store can't keep requests open. It is no idempotency.Keeper, or returns
	// idempotency.ErrNotKept.
	NotKept bool
}

// Harness is a fresh, empty store and the functions that the suite needs. They must be safe for
// concurrent use.
type Harness struct {
	Store idempotency.Store

	// Write writes a row under a name, as a handler that runs with ctx does. Written returns the
	// number of committed rows of that name. Break makes a statement fail, so that the transaction
	// of ctx can't commit any more, and returns the statement's error.
	Write   func(ctx context.Context, name string) error
	Written func(ctx context.Context, name string) (int, error)
	Break   func(ctx context.Context) error

	// Reopen returns another store on the same data, as after a restart.
	Reopen func(ctx context.Context) (idempotency.Store, error)

	// Advance makes time pass for the records, by the clock or by their dates.
	Advance func(ctx context.Context, d time.Duration) error

	// DeleteExpired deletes the expired records and returns their number.
	DeleteExpired func(ctx context.Context) (int64, error)

	// Record commits a record regardless of claims, as an attempt that does not know them.
	Record func(ctx context.Context, claim *idempotency.Claim, answer *idempotency.Answer) error
}

// patienceDefault bounds every wait of a case. A correct store never takes that long.
const patienceDefault = 20 * time.Second

// Run runs the suite, each case on a harness of its own.
func Run(t *testing.T, features Features, newHarness func(t *testing.T) *Harness) {
	for _, one := range cases() {
		t.Run(one.name, func(t *testing.T) {
			if field := features.lacks(one.promise); field != "" {
				t.Skipf("Features.%s: the store does not promise this: %s", field, one.rule)
			}
			t.Parallel()
			one.check(t, features, newHarness(t), patienceDefault)
		})
	}
}

// promise is a promise that a case needs from a store, and its hooks.
type promise uint8

const (
	always promise = iota
	undoesWrites
	isDurable
	expires
	losesClaims
	keepsOpen
)

// lacks returns the name of the feature that rules the promise out, or "".
func (f Features) lacks(p promise) string {
	switch {
	case p == undoesWrites && f.WritesStay:
		return "WritesStay"
	case p == isDurable && f.NotDurable:
		return "NotDurable"
	case p == expires && f.NoExpiry:
		return "NoExpiry"
	case p == losesClaims && f.ClaimsAreCertain:
		return "ClaimsAreCertain"
	case p == keepsOpen && f.NotKept:
		return "NotKept"
	}
	return ""
}

// missing returns the name of a hook that the promise needs and the harness lacks, or "".
func (h *Harness) missing(p promise) string {
	_, keeper := h.Store.(idempotency.Keeper)
	switch {
	case h.Store == nil:
		return "Store"
	case p == keepsOpen && !keeper:
		return "Store's BeginOpen, TakeOver, FindDue or ReadOpen"
	case (p == undoesWrites || p == keepsOpen) && (h.Write == nil || h.Written == nil || h.Break == nil):
		return "Write, Written or Break"
	case p == isDurable && h.Reopen == nil:
		return "Reopen"
	case p == expires && (h.Advance == nil || h.DeleteExpired == nil):
		return "Advance or DeleteExpired"
	case p == losesClaims && h.Record == nil:
		return "Record"
	}
	return ""
}

// testCase guards one rule.
type testCase struct {
	name    string
	rule    string
	promise promise
	run     func(c *check)
}

func cases() []testCase {
	var all []testCase
	for _, some := range [][]testCase{claimCases, recordCases, endCases, transactionCases, resolveCases, engineCases, keeperCases} {
		all = append(all, some...)
	}
	return all
}

// tester is the part of a *testing.T that a case uses.
type tester interface {
	Helper()
	Logf(format string, args ...any)
	Errorf(format string, args ...any)
	Fatalf(format string, args ...any)
	Failed() bool
	Context() context.Context
}

// check runs the case. If it fails, check prints the broken rule.
func (one testCase) check(t tester, features Features, h *Harness, patience time.Duration) {
	t.Helper()
	if hooks := h.missing(one.promise); hooks != "" {
		t.Fatalf("Harness.%s is nil: set it, or say in Features that the store does not promise this: %s", hooks, one.rule)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	defer func() {
		if t.Failed() {
			t.Logf("The rule: %s", one.rule)
		}
	}()
	c := &check{tester: t, Harness: h, features: features, ctx: ctx}
	defer c.endAll()
	one.run(c)
}

// check is a running case.
type check struct {
	tester
	*Harness
	features Features
	ctx      context.Context
	attempts []*attempt
}

// attempt is an attempt that the suite ends if its case does not.
type attempt struct {
	idempotency.Attempt
	claim *idempotency.Claim
	ended bool
}

func (a *attempt) Commit(ctx context.Context, answer *idempotency.Answer) error {
	a.ended = true
	return a.Attempt.Commit(ctx, answer)
}

func (a *attempt) Decline(ctx context.Context, answer *idempotency.Answer) error {
	a.ended = true
	return a.Attempt.Decline(ctx, answer)
}

func (a *attempt) Rollback(ctx context.Context) error {
	a.ended = true
	return a.Attempt.Rollback(ctx)
}

// endAll ends the attempts that a failed case left open: a store may wait for them when it is
// closed.
func (c *check) endAll() {
	for _, a := range c.attempts {
		if !a.ended {
			a.Rollback(context.WithoutCancel(c.ctx))
		}
	}
}

// begin calls Begin, and fails unless it returns exactly one of its three results.
func (c *check) begin(claim *idempotency.Claim) (*attempt, *idempotency.Record, error) {
	c.Helper()
	return c.beginWith(c.ctx, claim)
}

func (c *check) beginWith(ctx context.Context, claim *idempotency.Claim) (*attempt, *idempotency.Record, error) {
	c.Helper()
	begun, record, err := c.Store.Begin(ctx, claim)
	var a *attempt
	set := 0
	if begun != nil {
		a = &attempt{Attempt: begun, claim: claim}
		c.attempts = append(c.attempts, a)
		set++
	}
	if record != nil {
		set++
	}
	if err != nil {
		set++
	}
	if set != 1 {
		c.Fatalf("Begin returned attempt %v, record %v, error %v: exactly one of them must be set", begun != nil, record != nil, err)
	}
	return a, record, err
}

// claim starts an attempt for an absent key.
func (c *check) claim(claim *idempotency.Claim) *attempt {
	c.Helper()
	attempt, record, err := c.begin(claim)
	switch {
	case err != nil:
		c.Fatalf("an absent key was not claimed: %v", err)
	case record != nil:
		c.Fatalf("an absent key was not claimed: there is a record with body %.40q", record.Answer.Body)
	}
	return attempt
}

// replay returns the record of a recorded key.
func (c *check) replay(claim *idempotency.Claim) *idempotency.Record {
	c.Helper()
	attempt, record, err := c.begin(claim)
	switch {
	case err != nil:
		c.Fatalf("a recorded key was not found: %v", err)
	case attempt != nil:
		attempt.Rollback(c.ctx)
		c.Fatalf("a recorded key was claimed: its handler would run again")
	}
	return record
}

// commit commits an attempt.
func (c *check) commit(attempt *attempt, answer *idempotency.Answer) {
	c.Helper()
	c.seal(attempt)
	err := attempt.Commit(c.ctx, answer)
	for c.features.RunsAgain && errors.Is(err, idempotency.ErrNotSerializable) && c.ctx.Err() == nil {
		err = c.claim(attempt.claim).Commit(c.ctx, answer)
	}
	if err != nil {
		c.Fatalf("Commit: %v", err)
	}
}

// decline ends an attempt without its writes.
func (c *check) decline(attempt *attempt, answer *idempotency.Answer) {
	c.Helper()
	c.seal(attempt)
	if err := attempt.Decline(c.ctx, answer); err != nil {
		c.Fatalf("Decline: %v", err)
	}
}

func (c *check) seal(attempt *attempt) {
	c.Helper()
	if err := attempt.Seal(); err != nil {
		c.Errorf("Seal of a healthy attempt: %v", err)
	}
}

// wantFree fails if the key can't be claimed, and leaves it free.
func (c *check) wantFree(claim *idempotency.Claim) {
	c.Helper()
	c.claim(claim).Rollback(c.ctx)
}

// wantBody fails if the key is not recorded with this body.
func (c *check) wantBody(claim *idempotency.Claim, body string) {
	c.Helper()
	if got := string(c.replay(claim).Answer.Body); got != body {
		c.Errorf("the record has body %.60q, want %.60q", got, body)
	}
}

// wantWritten fails if another number of rows is committed.
func (c *check) wantWritten(name string, want int) {
	c.Helper()
	got, err := c.Written(c.ctx, name)
	if err != nil {
		c.Fatalf("Harness.Written: %v", err)
	}
	if got != want {
		c.Errorf("%d rows of the handler are committed, want %d", got, want)
	}
}

// write writes as the attempt's handler does.
func (c *check) write(attempt *attempt, name string) {
	c.Helper()
	if err := c.Write(attempt.Context(c.ctx), name); err != nil {
		c.Fatalf("Harness.Write: %v", err)
	}
}

// ttl is the TTL of the records of most cases.
const ttl = time.Hour

// requestOf returns a request for an engine.
func requestOf(scope, value string) idempotency.Request {
	claim := claimOf(scope, value)
	return idempotency.Request{Key: claim.Key, Fingerprint: claim.Fingerprint, TTL: claim.TTL}
}

// claimOf returns a claim of a new attempt.
func claimOf(scope, value string) *idempotency.Claim {
	return &idempotency.Claim{
		Key:         idempotency.Key{Scope: scope, Value: value},
		Fingerprint: idempotency.NewFingerprintV1("POST", "/", "", "", nil),
		TTL:         ttl,
		Attempt:     idempotency.NewAttemptID(),
	}
}

func answer(status int, body string) *idempotency.Answer {
	return &idempotency.Answer{Status: status, Body: []byte(body)}
}
