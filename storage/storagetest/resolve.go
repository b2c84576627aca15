package storagetest

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/paidonce/idempotency"
)

const (
	// stillWaiting is the time for which a case checks that nothing happens.
	stillWaiting = 50 * time.Millisecond
	// resolveMax is the maximum wait of Resolve for a key that stays held.
	resolveMax = 100 * time.Millisecond
)

var resolveCases = []testCase{
	{
		name: "ResolveFindsTheRecord",
		rule: "Resolve returns the record of a key that has one, as it was recorded: whose attempt it is, and of which request, is for the engine to compare. Of a key without one it returns nil, and no error.",
		run: func(c *check) {
			committed, declined := claimOf("acme", "committed"), claimOf("acme", "declined")
			for _, claim := range []*idempotency.Claim{committed, declined} {
				claim.TraceID = "0af7651916cd43dd8448eb211c80319c"
				claim.Fingerprint = idempotency.NewFingerprint(100, []byte(claim.Key.Value))
			}
			written := &idempotency.Answer{Status: 201, Header: map[string][]string{"Link": {"<a>", "<b>"}}, Body: []byte("done\x00")}
			c.commit(c.claim(committed), written)
			c.decline(c.claim(declined), answer(402, "declined"))
			c.claim(claimOf("acme", "rolled back")).Rollback(c.ctx)
			c.wantResolved(committed, committed, written)
			// Resolve is called for another attempt with the key.
			c.wantResolved(claimOf("acme", "committed"), committed, written)
			c.wantResolved(declined, declined, answer(402, "declined"))
			c.wantAbsent(claimOf("acme", "rolled back"))
			c.wantAbsent(claimOf("acme", "unheard of"))
		},
	},
	{
		name: "ResolveWaitsForTheAttempt",
		rule: "While an attempt holds the key nobody knows what becomes of it. Resolve waits for its end, and only then looks: a look from before misses the record, and a payment that was made is called not executed.",
		run: func(c *check) {
			for _, end := range []string{"commit", "decline", "rollback"} {
				claim := claimOf("acme", end)
				attempt := c.claim(claim)
				resolved := c.resolveLater(claimOf("acme", end))
				select {
				case got := <-resolved:
					c.Fatalf("Resolve returned record %v, error %v while an attempt held the key", got.record != nil, got.err)
				case <-time.After(stillWaiting):
				}
				switch end {
				case "commit":
					c.commit(attempt, answer(201, end))
				case "decline":
					c.decline(attempt, answer(402, end))
				default:
					attempt.Rollback(c.ctx)
				}
				got := <-resolved
				switch {
				case got.err != nil:
					c.Errorf("after a %s: %v", end, got.err)
				case end == "decline" && got.record == nil: // its record comes after the claim was released
				case (got.record == nil) != (end == "rollback"):
					c.Errorf("after a %s the record is there: %v", end, got.record != nil)
				case got.record != nil && string(got.record.Answer.Body) != end:
					c.Errorf("after a %s: body %.40q", end, got.record.Answer.Body)
				}
			}
		},
	},
	{
		name: "ResolveIsBoundByItsContext",
		rule: "Resolve returns when its context has ended, with ErrUnknown while the key is still held: never nil, which would say that nothing was executed.",
		run: func(c *check) {
			attempt := c.claim(claimOf("acme", "k"))
			for _, wait := range []time.Duration{resolveMax, 0} {
				c.wantUnknown(claimOf("acme", "k"), wait)
			}
			attempt.Rollback(c.ctx)
			c.wantAbsent(claimOf("acme", "k"))
		},
	},
	{
		name: "ResolveChangesNothing",
		rule: "Resolve may be asked again, by anybody and at any time: it leaves records, claims and free keys as they are.",
		run: func(c *check) {
			recorded, free, held := claimOf("acme", "recorded"), claimOf("acme", "free"), claimOf("acme", "held")
			c.commit(c.claim(recorded), answer(201, "done"))
			attempt := c.claim(held)
			for range 2 {
				c.wantResolved(recorded, recorded, answer(201, "done"))
				c.wantAbsent(free)
				c.wantUnknown(held, resolveMax)
			}
			c.wantRecord(recorded, answer(201, "done"))
			// The key is free at once, because a retry follows closely.
			c.wantFree(free)
			// The held key stays held after Resolve has given up, too.
			for deadline := time.Now().Add(stillWaiting); time.Now().Before(deadline); {
				if stolen, _, _ := c.begin(claimOf("acme", "held")); stolen != nil {
					stolen.Rollback(c.ctx)
					c.Fatalf("the key that an attempt holds was claimed: Resolve took the claim away")
				}
			}
			c.commit(attempt, answer(201, "held"))
			c.wantResolved(held, held, answer(201, "held"))
		},
	},
	{
		name: "ResolveKeepsScopesApart",
		rule: "Resolve looks at one scope: the same key of another is neither found nor waited for.",
		run: func(c *check) {
			theirs := claimOf("globex", "recorded")
			c.commit(c.claim(theirs), answer(201, "theirs"))
			attempt := c.claim(claimOf("globex", "held"))
			c.wantAbsent(claimOf("acme", "recorded"))
			c.wantAbsent(claimOf("acme", "held"))
			c.wantResolved(claimOf("globex", "recorded"), theirs, answer(201, "theirs"))
			attempt.Rollback(c.ctx)
		},
	},
	{
		name:    "ResolveKnowsWhatMayHaveExpired",
		promise: expires,
		rule:    "From half of the TTL after its claim on, by the store's clock, an absent record proves nothing: it may have been there, and expired. The clock of the process does not count: it stands still while the machine is suspended.",
		run: func(c *check) {
			claim := claimOf("acme", "late")
			claim.TTL = time.Hour
			c.claim(claim).Rollback(c.ctx)
			if claim.At.IsZero() {
				c.Fatalf("Begin left Claim.At without a time")
			}
			c.wantAbsent(claim)
			claim.At = claim.At.Add(-claim.TTL / 2) // as if the claim were that old
			if record, err := c.Store.Resolve(c.ctx, claim); record != nil || !errors.Is(err, idempotency.ErrUnknown) {
				c.Errorf("Resolve of an absent key: record %v, error %v; want ErrUnknown", record != nil, err)
			}
			kept := claimOf("acme", "kept")
			c.commit(c.claim(kept), answer(201, "kept"))
			kept.At = kept.At.Add(-kept.TTL)
			c.wantResolved(kept, kept, answer(201, "kept"))
		},
	},
	{
		name: "ManyResolveAtOnce",
		rule: "However many ask, and however busy the store is, each gets the truth: when a database comes back all those ask at once whose replies were lost.",
		run: func(c *check) {
			keys, copies := 4, 5
			if c.features.RunsAgain {
				// Several concurrent attempts might have to run again, and would release their
				// keys.
				keys, copies = 1, 20
			}
			attempts := make([]*attempt, keys)
			for key := range keys {
				attempts[key] = c.claim(claimOf("acme", fmt.Sprint(key)))
			}
			var waiting []<-chan resolution
			for i := range keys * copies {
				waiting = append(waiting, c.resolveLater(claimOf("acme", fmt.Sprint(i%keys))))
			}
			time.Sleep(stillWaiting) // until most of them wait
			for key, attempt := range attempts {
				if key%2 == 0 {
					c.commit(attempt, answer(201, fmt.Sprint(key)))
				} else {
					attempt.Rollback(c.ctx)
				}
			}
			for i, resolved := range waiting {
				got, key := <-resolved, i%keys
				switch {
				case got.err != nil:
					c.Errorf("key %d: %v", key, got.err)
				case (got.record != nil) != (key%2 == 0):
					c.Errorf("key %d: the record is there: %v", key, got.record != nil)
				case got.record != nil && string(got.record.Answer.Body) != fmt.Sprint(key):
					c.Errorf("key %d: body %.40q", key, got.record.Answer.Body)
				}
			}
		},
	},
}

// resolution is the result of Resolve.
type resolution struct {
	record *idempotency.Record
	err    error
}

func (c *check) resolveLater(claim *idempotency.Claim) <-chan resolution {
	resolved := make(chan resolution, 1)
	go func() {
		record, err := c.Store.Resolve(c.ctx, claim)
		resolved <- resolution{record, err}
	}()
	return resolved
}

// wantResolved fails if Resolve does not return the record of recorded's attempt.
func (c *check) wantResolved(claim, recorded *idempotency.Claim, want *idempotency.Answer) {
	c.Helper()
	record, err := c.Store.Resolve(c.ctx, claim)
	switch {
	case err != nil:
		c.Fatalf("Resolve of a recorded key: %v", err)
	case record == nil:
		c.Fatalf("Resolve says that a recorded key is absent: a payment that was made would be called not executed")
	}
	c.wantEqual(record, recorded, want)
}

// wantAbsent fails unless Resolve returns that there is no record.
func (c *check) wantAbsent(claim *idempotency.Claim) {
	c.Helper()
	record, err := c.Store.Resolve(c.ctx, claim)
	if record != nil || err != nil {
		c.Fatalf("Resolve of an absent key: record %v, error %v; want neither", record != nil, err)
	}
}

// wantUnknown fails unless Resolve of a held key returns unknown, and uses the time that it has.
func (c *check) wantUnknown(claim *idempotency.Claim, wait time.Duration) {
	c.Helper()
	ctx, cancel := context.WithTimeout(c.ctx, wait)
	defer cancel()
	record, err := c.Store.Resolve(ctx, claim)
	if record != nil || !errors.Is(err, idempotency.ErrUnknown) {
		c.Errorf("Resolve of a key that is held: record %v, error %v; want ErrUnknown", record != nil, err)
	}
	switch {
	case ctx.Err() == nil:
		c.Errorf("Resolve gave up before its context was over")
	case c.ctx.Err() != nil:
		c.Fatalf("Resolve went on when its context was over")
	}
}
