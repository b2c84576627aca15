package storagetest

import (
	"context"
	"errors"
	"fmt"

	"github.com/paidonce/idempotency"
)

var endCases = []testCase{
	{
		name: "RollbackForgets",
		rule: "After Rollback nothing of an attempt is left: no record, no claim.",
		run: func(c *check) {
			claim := claimOf("acme", "k")
			attempt := c.claim(claim)
			c.seal(attempt)
			attempt.Rollback(c.ctx)
			// Rollback comes without Seal: the engine does so when a handler ends its goroutine.
			c.claim(claim).Rollback(c.ctx)
			c.wantFree(claim)
		},
	},
	{
		name: "DeclineRecords",
		rule: "After Decline the answer is recorded and the claim is given back.",
		run: func(c *check) {
			claim := claimOf("acme", "k")
			attempt := c.claim(claim)
			c.decline(attempt, answer(402, "declined"))
			c.wantRecord(claim, answer(402, "declined"))
		},
	},
	{
		name: "NothingIsHeldAfterAnEnd",
		rule: "Whatever way an attempt ends by, everything that it held is given back: a store that is used all day still answers in the evening.",
		run: func(c *check) {
			for i := range 40 {
				value := fmt.Sprint(i)
				for _, key := range []string{value, ""} {
					c.claim(claimOf("rolled back", key)).Rollback(c.ctx)
					c.commit(c.claim(claimOf("committed", key)), answer(201, value))
					c.decline(c.claim(claimOf("declined", key)), answer(402, value))
				}
				c.wantBody(claimOf("committed", value), value)
				c.wantBody(claimOf("declined", value), value)
				c.wantFree(claimOf("rolled back", value))
			}
		},
	},
	{
		name: "EndsTellTheTruth",
		rule: "What Commit and Decline report is so, also when their context has ended: nil means recorded, and every error but ErrUnknown and ErrKeyRecorded that the engine knows means that nothing is. Either way the claim is given back.",
		run: func(c *check) {
			dead, cancel := context.WithCancel(c.ctx)
			cancel()
			for i, end := range []func(idempotency.Attempt) error{
				func(a idempotency.Attempt) error { return a.Commit(dead, answer(201, "done")) },
				func(a idempotency.Attempt) error { return a.Decline(dead, answer(402, "done")) },
				func(a idempotency.Attempt) error { a.Rollback(dead); return idempotency.ErrAborted },
			} {
				claim := claimOf("acme", fmt.Sprint(i))
				switch err := end(c.claim(claim)); {
				case err == nil:
					c.wantBody(claim, "done")
				case errors.Is(err, idempotency.ErrUnknown):
				case errors.Is(err, idempotency.ErrUnavailable), errors.Is(err, idempotency.ErrAborted), errors.Is(err, idempotency.ErrNotSerializable):
					c.wantFreeSoon(claim)
				case errors.Is(err, idempotency.ErrKeyRecorded), errors.Is(err, idempotency.ErrTransactionLost):
					c.Errorf("end on a dead context: %v", err)
				}
			}
		},
	},
	{
		name: "ContextIsCarried",
		rule: "The handler's context is the one that Context was given, with the transaction in it: its values and its end reach the handler.",
		run: func(c *check) {
			type contextKey struct{}
			attempt := c.claim(claimOf("acme", "k"))
			ctx, cancel := context.WithCancel(context.WithValue(c.ctx, contextKey{}, "value"))
			defer cancel()
			handlers := attempt.Context(ctx)
			if handlers.Value(contextKey{}) != "value" {
				c.Errorf("a value of the context is lost")
			}
			if handlers.Err() != nil {
				c.Errorf("the context is over: %v", handlers.Err())
			}
			cancel()
			if handlers.Err() == nil {
				c.Errorf("the end of the context is lost")
			}
			c.commit(attempt, answer(201, "done"))
			c.wantBody(claimOf("acme", "k"), "done")
		},
	},
	{
		name:    "LostClaim",
		rule:    "Where another attempt recorded the key first, Commit and Decline report ErrKeyRecorded, or ErrNotSerializable, which both make the engine look again. The first record stays, and nothing of the loser does.",
		promise: losesClaims,
		run: func(c *check) {
			for i, end := range []func(idempotency.Attempt, *idempotency.Answer) error{
				func(a idempotency.Attempt, r *idempotency.Answer) error { return a.Commit(c.ctx, r) },
				func(a idempotency.Attempt, r *idempotency.Answer) error { return a.Decline(c.ctx, r) },
			} {
				name := fmt.Sprint(i)
				claim, winner := claimOf("acme", name), claimOf("acme", name)
				attempt := c.claim(claim)
				if !c.features.WritesStay {
					c.write(attempt, name)
				}
				c.record(winner, answer(201, "first"))
				c.seal(attempt)
				if err := end(attempt, answer(201, "second")); !errors.Is(err, idempotency.ErrKeyRecorded) && !errors.Is(err, idempotency.ErrNotSerializable) {
					c.Errorf("error %v, want ErrKeyRecorded or ErrNotSerializable", err)
				}
				c.wantRecord(winner, answer(201, "first"))
				if !c.features.WritesStay {
					c.wantWritten(name, 0)
				}
			}
		},
	},
	{
		name:    "RecordWinsOverClaim",
		rule:    "A record is returned also while another attempt holds the key: those who hold it may be on their way to replay it.",
		promise: losesClaims,
		run: func(c *check) {
			attempt := c.claim(claimOf("acme", "k"))
			winner := claimOf("acme", "k")
			c.record(winner, answer(201, "first"))
			c.wantRecord(winner, answer(201, "first"))
			attempt.Rollback(c.ctx)
			c.wantRecord(winner, answer(201, "first"))
		},
	},
}

func (c *check) record(claim *idempotency.Claim, answer *idempotency.Answer) {
	c.Helper()
	if err := c.Record(c.ctx, claim, answer); err != nil {
		c.Fatalf("Harness.Record: %v", err)
	}
}

var transactionCases = []testCase{
	{
		name:    "CommitKeepsTheWrites",
		rule:    "The handler's writes are committed with its answer: nobody sees them before, everybody after.",
		promise: undoesWrites,
		run: func(c *check) {
			attempt := c.claim(claimOf("acme", "k"))
			c.write(attempt, "w")
			c.write(attempt, "w")
			c.wantWritten("w", 0)
			c.commit(attempt, answer(201, "done"))
			c.wantWritten("w", 2)
			c.wantBody(claimOf("acme", "k"), "done")
		},
	},
	{
		name:    "DeclineUndoesTheWrites",
		rule:    "A declined answer stays and the handler's writes go: a 402 after a debit must not commit the debit.",
		promise: undoesWrites,
		run: func(c *check) {
			attempt := c.claim(claimOf("acme", "k"))
			c.write(attempt, "w")
			c.decline(attempt, answer(402, "declined"))
			c.wantWritten("w", 0)
			c.wantBody(claimOf("acme", "k"), "declined")
		},
	},
	{
		name:    "RollbackUndoesTheWrites",
		rule:    "A forgotten attempt leaves no write behind, and the next one begins without them.",
		promise: undoesWrites,
		run: func(c *check) {
			attempt := c.claim(claimOf("acme", "k"))
			c.write(attempt, "w")
			attempt.Rollback(c.ctx)
			c.wantWritten("w", 0)
			again := c.claim(claimOf("acme", "k"))
			c.write(again, "w")
			c.commit(again, answer(201, "done"))
			c.wantWritten("w", 1)
		},
	},
	{
		name:    "KeylessAttemptsAreTransactions",
		rule:    "A request without a key gets its transaction too: Commit keeps its writes, Decline and Rollback undo them.",
		promise: undoesWrites,
		run: func(c *check) {
			for name, end := range map[string]func(idempotency.Attempt) error{
				"commit":   func(a idempotency.Attempt) error { return a.Commit(c.ctx, answer(201, "")) },
				"decline":  func(a idempotency.Attempt) error { return a.Decline(c.ctx, answer(402, "")) },
				"rollback": func(a idempotency.Attempt) error { a.Rollback(c.ctx); return nil },
			} {
				attempt := c.claim(claimOf("acme", ""))
				c.write(attempt, name)
				c.seal(attempt)
				if err := end(attempt); err != nil {
					c.Errorf("%s: %v", name, err)
				}
			}
			c.wantWritten("commit", 1)
			c.wantWritten("decline", 0)
			c.wantWritten("rollback", 0)
		},
	},
	{
		name:    "SealedAttemptTakesNoWrites",
		rule:    "After Seal what the handler still holds answers errors: a goroutine that it left behind can't add to what is being committed.",
		promise: undoesWrites,
		run: func(c *check) {
			attempt := c.claim(claimOf("acme", "k"))
			handlers := attempt.Context(c.ctx)
			c.write(attempt, "w")
			c.seal(attempt)
			if err := c.Write(handlers, "late"); err == nil {
				c.Errorf("a write after Seal was accepted")
			}
			if err := attempt.Commit(c.ctx, answer(201, "done")); err != nil {
				c.Fatalf("Commit: %v", err)
			}
			if err := c.Write(handlers, "late"); err == nil {
				c.Errorf("a write after Commit was accepted")
			}
			c.wantWritten("w", 1)
			c.wantWritten("late", 0)
		},
	},
	{
		name:    "BrokenTransactionCanNotCommit",
		rule:    "Seal says that a transaction can't commit, Commit of one never returns nil, and Decline works on it all the same: a handler may turn an error of the database into a 409.",
		promise: undoesWrites,
		run: func(c *check) {
			broken := func(key string) *attempt {
				attempt := c.claim(claimOf("acme", key))
				c.write(attempt, key)
				if err := c.Break(attempt.Context(c.ctx)); err == nil {
					c.Errorf("Harness.Break returned no error")
				}
				if err := attempt.Seal(); err == nil {
					c.Errorf("Seal of a broken attempt: nil")
				}
				return attempt
			}
			err := broken("committed").Commit(c.ctx, answer(201, "done"))
			if err == nil || errors.Is(err, idempotency.ErrUnknown) {
				c.Errorf("Commit of a broken attempt: %v, want an error that says that nothing was executed", err)
			}
			c.wantWritten("committed", 0)
			c.wantFree(claimOf("acme", "committed"))
			if err := broken("declined").Decline(c.ctx, answer(409, "declined")); err != nil {
				c.Errorf("Decline of a broken attempt: %v", err)
			}
			c.wantWritten("declined", 0)
			c.wantBody(claimOf("acme", "declined"), "declined")
			broken("rolled back").Rollback(c.ctx)
			c.wantFree(claimOf("acme", "rolled back"))
		},
	},
}
