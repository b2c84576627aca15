package storagetest

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/paidonce/idempotency"
)

// The cases of an [idempotency.Keeper]. Leases pass in real time: those of a minute do not end
// within a case, and the cases wait for the end of those of a millisecond.

const (
	route     = "topup/1"
	longLease = time.Minute
)

// openClaimOf returns a claim of a request that may become open.
func openClaimOf(value string) *idempotency.Claim {
	claim := claimOf("acme", value)
	claim.Resumable, claim.Stored = route, func() []byte { return everyByte() }
	return claim
}

func everyByte() []byte {
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	return all
}

// effectOf returns an effect that is about to be sent.
func effectOf(name string) *idempotency.Effect {
	return &idempotency.Effect{
		Name: name, Kind: idempotency.EffectCall, State: idempotency.EffectIntended,
		DerivedKey: idempotency.NewAttemptID().String(), Input: everyByte(), Tries: 1,
	}
}

func (c *check) keeper() idempotency.Keeper { return c.Store.(idempotency.Keeper) }

// own makes the suite end an attempt, whatever its case does.
func (c *check) own(a idempotency.OpenAttempt) idempotency.OpenAttempt {
	c.attempts = append(c.attempts, &attempt{Attempt: a})
	return a
}

// beginOpen starts an attempt for an absent key.
func (c *check) beginOpen(claim *idempotency.Claim, lazy bool) idempotency.OpenAttempt {
	c.Helper()
	a, record, err := c.keeper().BeginOpen(c.ctx, claim, lazy)
	if a == nil || record != nil || err != nil {
		c.Fatalf("BeginOpen of an absent key returned record %v, error %v", record, err)
	}
	return c.own(a)
}

// intend begins an effect.
func (c *check) intend(a idempotency.OpenAttempt, effect *idempotency.Effect, lease time.Duration) {
	c.Helper()
	if err := a.Intend(c.ctx, effect, lease); err != nil {
		c.Fatalf("Intend: %v", err)
	}
	if effect.SentFirst.IsZero() {
		c.Errorf("Intend did not set SentFirst")
	}
}

// settle records the result of an effect.
func (c *check) settle(a idempotency.OpenAttempt, effect *idempotency.Effect, output string) {
	c.Helper()
	effect.State, effect.Output = idempotency.EffectDone, []byte(output)
	if err := a.Settle(c.ctx, effect); err != nil {
		c.Fatalf("Settle: %v", err)
	}
}

func (c *check) leave(a idempotency.OpenAttempt, lapse idempotency.Lapse) {
	c.Helper()
	if err := a.Leave(c.ctx, lapse); err != nil {
		c.Fatalf("Leave: %v", err)
	}
}

// takeOver makes the case the owner of an open request that is due, or soon will be.
func (c *check) takeOver(value string) (idempotency.OpenAttempt, *idempotency.Open, *idempotency.Claim) {
	c.Helper()
	for {
		claim := openClaimOf(value)
		a, open, err := c.keeper().TakeOver(c.ctx, claim)
		if a != nil && err == nil {
			return c.own(a), open, claim
		}
		if err != nil && !errors.Is(err, idempotency.ErrUnknown) || c.ctx.Err() != nil {
			c.Fatalf("a request that is due was not taken over: %+v, %v", open, err)
		}
		time.Sleep(time.Millisecond)
	}
}

// wantNotTaken fails if the request can be taken over, and returns its state.
func (c *check) wantNotTaken(claim *idempotency.Claim) *idempotency.Open {
	c.Helper()
	a, open, err := c.keeper().TakeOver(c.ctx, claim)
	if err != nil || open == nil {
		c.Fatalf("TakeOver returned state %+v, error %v", open, err)
	}
	if a != nil {
		c.own(a)
		c.Errorf("it was taken over")
	}
	return open
}

// wantDue fails if FindDue returns other keys than these.
func (c *check) wantDue(route string, want ...string) {
	c.Helper()
	keys, err := c.keeper().FindDue(c.ctx, []string{route}, 100)
	if err != nil {
		c.Fatalf("FindDue: %v", err)
	}
	var got []string
	for _, key := range keys {
		got = append(got, key.Value)
	}
	if !slices.Equal(got, want) {
		c.Errorf("due on %s are %q, want %q", route, got, want)
	}
}

// isOpen reports whether the key has an open request.
func (c *check) isOpen(value string) bool {
	c.Helper()
	open, err := c.keeper().ReadOpen(c.ctx, claimOf("acme", value).Key)
	if err != nil {
		c.Fatalf("ReadOpen: %v", err)
	}
	return open != nil
}

// writeOpen writes as the handler of an open attempt does.
func (c *check) writeOpen(a idempotency.OpenAttempt, name string) {
	c.Helper()
	if err := c.Write(a.Context(c.ctx), name); err != nil {
		c.Fatalf("Harness.Write: %v", err)
	}
}

var keeperCases = []testCase{
	{
		name:    "IntentIsKept",
		rule:    "Once Intend has returned, everybody sees the request as open, and whoever takes it over gets route, request and effect byte by byte, with the first attempt's id and TTL.",
		promise: keepsOpen,
		run: func(c *check) {
			claim, effect := openClaimOf("k"), effectOf("charge")
			a := c.beginOpen(claim, false)
			c.intend(a, effect, longLease)
			later := openClaimOf("k")
			_, begun, err := c.Store.Begin(c.ctx, later)
			_, opened, errOpen := c.keeper().BeginOpen(c.ctx, later, false)
			resolved, errResolve := c.Store.Resolve(c.ctx, claim)
			for _, record := range []*idempotency.Record{begun, opened, resolved} {
				if record == nil || !record.Open || record.Attempt != claim.Attempt || record.Fingerprint != claim.Fingerprint {
					c.Fatalf("the record of an open request is %+v; errors: %v", record, errors.Join(err, errOpen, errResolve))
				}
			}
			c.leave(a, idempotency.Lapse{})
			_, open, taken := c.takeOver("k")
			if open.Route != route || !slices.Equal(open.Request, everyByte()) || open.Attempt != claim.Attempt || open.TTL != claim.TTL || open.Fingerprint != claim.Fingerprint || open.Runs != 2 {
				c.Errorf("the state is %+v", open)
			}
			if taken.Attempt != claim.Attempt || taken.TTL != claim.TTL {
				c.Errorf("the claim of the new owner got attempt %v and TTL %v", taken.Attempt, taken.TTL)
			}
			if len(open.Effects) != 1 {
				c.Fatalf("%d effects", len(open.Effects))
			}
			got := open.Effects[0]
			if got.Name != effect.Name || got.Kind != effect.Kind || got.State != effect.State || got.DerivedKey != effect.DerivedKey || !slices.Equal(got.Input, effect.Input) || got.Tries != 1 || !got.Doubt.IsZero() {
				c.Errorf("the effect is %+v", got)
			}
		},
	},
	{
		name:    "LookUpClaimsNothing",
		rule:    "LookUp returns the record of an open and of an ended request, and nil for an absent key and beside a running attempt. It waits for nobody, and claims nothing.",
		promise: keepsOpen,
		run: func(c *check) {
			lookUp := func(value string) *idempotency.Record {
				record, err := c.keeper().LookUp(c.ctx, claimOf("acme", value).Key)
				if err != nil {
					c.Fatalf("LookUp of a key that is %s: %v", value, err)
				}
				return record
			}
			if record := lookUp("absent"); record != nil {
				c.Errorf("an absent key has the record %+v", record)
			}
			c.wantFree(claimOf("acme", "absent"))
			running := c.claim(claimOf("acme", "running"))
			if record := lookUp("running"); record != nil {
				c.Errorf("a key that is run has the record %+v", record)
			}
			c.commit(running, answer(201, "recorded"))
			if record := lookUp("running"); record == nil || record.Open || string(record.Answer.Body) != "recorded" {
				c.Errorf("a recorded key has the record %+v", record)
			}
			claim := openClaimOf("open")
			c.intend(c.beginOpen(claim, false), effectOf("charge"), longLease)
			if record := lookUp("open"); record == nil || !record.Open || record.Attempt != claim.Attempt {
				c.Errorf("an open request has the record %+v", record)
			}
		},
	},
	{
		name:    "OwnerIsAlone",
		rule:    "A request is taken over only once it is due, not parked, and by its own route: not within its owner's lease, nor within the pause that the owner left it for.",
		promise: keepsOpen,
		run: func(c *check) {
			for _, value := range []string{"running", "paused", "parked", "due"} {
				a := c.beginOpen(openClaimOf(value), false)
				c.intend(a, effectOf("charge"), longLease)
				switch value {
				case "paused":
					c.leave(a, idempotency.Lapse{Pause: time.Hour})
				case "parked":
					c.leave(a, idempotency.Lapse{Parked: "a reason", Reason: "another"})
				case "due":
					c.leave(a, idempotency.Lapse{})
				}
			}
			c.wantDue(route, "due")
			c.wantDue("another/1")
			if open := c.wantNotTaken(openClaimOf("running")); !open.Owned || open.Due.Sub(open.Now) <= 0 {
				c.Errorf("the state of a request that is run is %+v", open)
			}
			if open := c.wantNotTaken(openClaimOf("paused")); open.Owned || open.Due.Sub(open.Now) <= 0 {
				c.Errorf("the state of a request that is left for later is %+v", open)
			}
			if open := c.wantNotTaken(openClaimOf("parked")); open.Parked != "a reason" || open.LastFail != "another" {
				c.Errorf("the state of a parked request is %+v", open)
			}
			other := openClaimOf("due")
			other.Resumable = "another/1"
			c.wantNotTaken(other)
			c.takeOver("due")
		},
	},
	{
		name:    "OneOfManyTakesOver",
		rule:    "Of many that take a request over at once, one becomes its owner.",
		promise: keepsOpen,
		run: func(c *check) {
			a := c.beginOpen(openClaimOf("k"), false)
			c.intend(a, effectOf("charge"), longLease)
			c.leave(a, idempotency.Lapse{})
			var owners atomic.Int64
			var group sync.WaitGroup
			for range 16 {
				group.Go(func() {
					if a, _, _ := c.keeper().TakeOver(c.ctx, openClaimOf("k")); a != nil {
						owners.Add(1)
					}
				})
			}
			group.Wait()
			if n := owners.Load(); n != 1 {
				c.Errorf("%d became owners", n)
			}
		},
	},
	{
		name:    "ReplacedOwnerWritesNothing",
		rule:    "An owner that was replaced gets ErrFenced, and changes nothing: no result, no answer, no writes, no new lease.",
		promise: keepsOpen,
		run: func(c *check) {
			for value, act := range map[string]func(idempotency.OpenAttempt, *idempotency.Effect) error{
				"settles": func(a idempotency.OpenAttempt, effect *idempotency.Effect) error {
					effect.State = idempotency.EffectDone
					return a.Settle(c.ctx, effect)
				},
				"reads": func(a idempotency.OpenAttempt, effect *idempotency.Effect) error {
					_, err := a.Recorded(c.ctx, effect.Name)
					return err
				},
				"leaves": func(a idempotency.OpenAttempt, _ *idempotency.Effect) error {
					return a.Leave(c.ctx, idempotency.Lapse{Parked: "a reason"})
				},
				"intends": func(a idempotency.OpenAttempt, _ *idempotency.Effect) error {
					return a.Intend(c.ctx, effectOf("another"), longLease)
				},
				"commits": func(a idempotency.OpenAttempt, _ *idempotency.Effect) error {
					return a.Commit(c.ctx, answer(201, "old"))
				},
				"declines": func(a idempotency.OpenAttempt, _ *idempotency.Effect) error {
					return a.Decline(c.ctx, answer(402, "old"))
				},
			} {
				a, effect := c.beginOpen(openClaimOf(value), false), effectOf("charge")
				c.intend(a, effect, time.Millisecond)
				owner, _, _ := c.takeOver(value)
				if err := act(a, effect); !errors.Is(err, idempotency.ErrFenced) {
					c.Errorf("one that was replaced %s: error %v, want ErrFenced", value, err)
				}
				open, err := c.keeper().ReadOpen(c.ctx, claimOf("acme", value).Key)
				if err != nil || open == nil || open.Parked != "" || len(open.Effects) != 1 || open.Effects[0].State != idempotency.EffectIntended {
					c.Fatalf("one that was replaced %s: the state is %+v, %v", value, open, err)
				}
				effect = effectOf("charge")
				c.settleSoon(owner, value, effect)
			}
		},
	},
	{
		name:    "ResultIsKept",
		rule:    "The first result stays: another one gets ErrFenced, and no take-over makes it doubtful. An effect without one has a new doubt and one more try after each take-over, which returns the doubt before it, unless its run sets them back.",
		promise: keepsOpen,
		run: func(c *check) {
			a, first, second := c.beginOpen(openClaimOf("k"), false), effectOf("first"), effectOf("second")
			c.intend(a, first, longLease)
			c.settle(a, first, "done")
			again := *first
			again.State, again.Output = idempotency.EffectDeclined, nil
			if err := a.Settle(c.ctx, &again); !errors.Is(err, idempotency.ErrFenced) {
				c.Errorf("a second result: error %v, want ErrFenced", err)
			}
			if recorded, err := a.Recorded(c.ctx, "first"); err != nil || recorded.State != idempotency.EffectDone || string(recorded.Output) != "done" {
				c.Errorf("Recorded returned %+v, %v", recorded, err)
			}
			c.intend(a, second, longLease)
			c.leave(a, idempotency.Lapse{})
			for run, tries := range []int{1, 2, 2} { // the second of these does not send it
				owner, open, _ := c.takeOver("k")
				lapse := idempotency.Lapse{}
				if len(open.Effects) != 2 {
					c.Fatalf("%d effects", len(open.Effects))
				}
				for _, effect := range open.Effects {
					switch effect.Name {
					case "first":
						if effect.State != idempotency.EffectDone || string(effect.Output) != "done" || effect.Tries != 1 || !effect.Doubt.IsZero() {
							c.Errorf("the effect with a result is %+v", effect)
						}
					case "second":
						if effect.State != idempotency.EffectIntended || effect.Tries != tries || effect.Doubt.IsZero() != (run == 0) {
							c.Errorf("take-over %d: the effect without a result is %+v", run, effect)
						}
						if run == 1 {
							lapse.Doubts = map[string]idempotency.Doubt{"second": {At: effect.Doubt}}
						}
					}
				}
				c.leave(owner, lapse)
			}
		},
	},
	{
		name:    "EndCloses",
		rule:    "Commit records the answer, as that of the first attempt, with the writes since the last effect, and Decline without them. Either way nothing is open any more.",
		promise: keepsOpen,
		run: func(c *check) {
			for i, name := range []string{"committed", "declined"} {
				claim, effect := openClaimOf(name), effectOf("charge")
				a := c.beginOpen(claim, false)
				c.intend(a, effect, longLease)
				c.leave(a, idempotency.Lapse{})
				a, _, _ = c.takeOver(name)
				c.settle(a, effect, "done")
				c.writeOpen(a, name)
				if err := a.Seal(); err != nil {
					c.Errorf("Seal: %v", err)
				}
				end := []func(context.Context, *idempotency.Answer) error{a.Commit, a.Decline}[i]
				if err := end(c.ctx, answer(201+i, name)); err != nil {
					c.Fatalf("the end of %s: %v", name, err)
				}
				record := c.replay(claimOf("acme", name))
				if record.Open || record.Attempt != claim.Attempt || record.Answer.Status != 201+i || string(record.Answer.Body) != name {
					c.Errorf("the record is %+v", record)
				}
				c.wantWritten(name, 1-i)
				if c.isOpen(name) {
					c.Errorf("%s is still open", name)
				}
			}
			c.wantDue(route)
		},
	},
	{
		name:    "LeaveUndoesTheWrites",
		rule:    "After Leave nothing of the last transaction remains, and the request is open.",
		promise: keepsOpen,
		run: func(c *check) {
			a, effect := c.beginOpen(openClaimOf("k"), false), effectOf("charge")
			c.intend(a, effect, longLease)
			c.settle(a, effect, "done")
			c.writeOpen(a, "k")
			if err := a.Seal(); err != nil {
				c.Errorf("Seal: %v", err)
			}
			c.leave(a, idempotency.Lapse{})
			c.wantWritten("k", 0)
			if !c.isOpen("k") {
				c.Errorf("it is not open any more")
			}
		},
	},
	{
		name:    "IntentAfterWritesIsRefused",
		rule:    "Intend after the handler has written is a UsageError: those writes would be lost, or made twice. Nothing is open.",
		promise: keepsOpen,
		run: func(c *check) {
			a := c.beginOpen(openClaimOf("k"), false)
			c.writeOpen(a, "k")
			var usage idempotency.UsageError
			if err := a.Intend(c.ctx, effectOf("charge"), longLease); !errors.As(err, &usage) {
				c.Errorf("error %v, want a UsageError", err)
			}
			if c.isOpen("k") {
				c.Errorf("it is open")
			}
			_ = a.Seal()
			_ = a.Rollback(c.ctx)
			c.wantWritten("k", 0)
			c.wantFree(claimOf("acme", "k"))
		},
	},
	{
		name:    "LazyClaimComesWithTheIntent",
		rule:    "A lazy attempt claims with its intent, which opens nothing if another has the key. While that one runs the error is ErrInProgress, or ErrKeyRecorded, which makes the engine look again. Once the key is recorded it is ErrKeyRecorded, of Rollback too.",
		promise: keepsOpen,
		run: func(c *check) {
			one, two, three := c.beginOpen(openClaimOf("k"), true), c.beginOpen(openClaimOf("k"), true), c.beginOpen(openClaimOf("k"), true)
			other := c.claim(claimOf("acme", "k"))
			if err := one.Intend(c.ctx, effectOf("charge"), longLease); !errors.Is(err, idempotency.ErrInProgress) && !errors.Is(err, idempotency.ErrKeyRecorded) {
				c.Errorf("Intend while another has the key: error %v, want ErrInProgress or ErrKeyRecorded", err)
			}
			c.commit(other, answer(201, "other"))
			if err := two.Intend(c.ctx, effectOf("charge"), longLease); !errors.Is(err, idempotency.ErrKeyRecorded) {
				c.Errorf("Intend of a recorded key: error %v, want ErrKeyRecorded", err)
			}
			if err := three.Rollback(c.ctx); !errors.Is(err, idempotency.ErrKeyRecorded) {
				c.Errorf("Rollback of a recorded key: error %v, want ErrKeyRecorded", err)
			}
			if c.isOpen("k") {
				c.Errorf("it is open")
			}
			c.wantBody(claimOf("acme", "k"), "other")
		},
	},
}

// settleSoon shows that the owner can go on: it records a result, and the answer.
func (c *check) settleSoon(owner idempotency.OpenAttempt, value string, effect *idempotency.Effect) {
	c.Helper()
	c.settle(owner, effect, "done")
	if err := owner.Seal(); err != nil {
		c.Errorf("Seal: %v", err)
	}
	if err := owner.Commit(c.ctx, answer(201, value)); err != nil {
		c.Fatalf("Commit of the new owner: %v", err)
	}
	c.wantBody(claimOf("acme", value), value)
}
