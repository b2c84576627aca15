package storagetest

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"

	"github.com/paidonce/idempotency"
)

var claimCases = []testCase{
	{
		name: "AbsentKeyIsClaimed",
		rule: "Begin gives an attempt at a key that has no record and that nobody holds; another key or keyless request is not in its way.",
		run: func(c *check) {
			first := c.claim(claimOf("acme", "k1"))
			other := c.claim(claimOf("acme", "k2"))
			keyless := c.claim(claimOf("acme", ""))
			c.commit(other, answer(200, "2"))
			c.commit(keyless, answer(200, ""))
			c.commit(first, answer(200, "1"))
		},
	},
	{
		name: "ClaimedKeyIsInProgress",
		rule: "Begin answers ErrInProgress at once for a key that another attempt holds. It never waits: a waiting duplicate would hold a connection for the other handler's whole run.",
		run: func(c *check) {
			claim := claimOf("acme", "k")
			first := c.claim(claim)
			for range 2 { // the second would get through if the first had taken the claim away
				attempt, record, err := c.begin(claimOf("acme", "k"))
				switch {
				case attempt != nil:
					attempt.Rollback(c.ctx)
					c.Errorf("a claimed key was claimed again: two handlers would run")
				case record != nil:
					c.Errorf("a claimed key has a record")
				case c.ctx.Err() != nil:
					c.Fatalf("Begin waited until its context ended: %v", err)
				case !errors.Is(err, idempotency.ErrInProgress):
					c.Errorf("error %v, want ErrInProgress", err)
				}
			}
			c.commit(first, answer(201, "first"))
			c.wantBody(claim, "first")
		},
	},
	{
		name: "OneOfManyBeginsClaims",
		rule: "Of any number of requests that come at once with one key, exactly one is claimed.",
		run: func(c *check) {
			const copies = 64
			type result struct {
				attempt idempotency.Attempt
				err     error
			}
			results := make([]result, copies)
			atOnce(copies, func(i int) {
				results[i].attempt, _, results[i].err = c.Store.Begin(c.ctx, claimOf("acme", "k"))
			})
			claimed := 0
			for _, r := range results {
				switch {
				case r.attempt != nil:
					claimed++
					r.attempt.Rollback(c.ctx)
				case !errors.Is(r.err, idempotency.ErrInProgress):
					c.Errorf("error %v, want ErrInProgress", r.err)
				}
			}
			if claimed != 1 {
				c.Errorf("%d of %d attempts have the key, want 1", claimed, copies)
			}
			c.wantFree(claimOf("acme", "k"))
		},
	},
	{
		name: "ManyReplaysAtOnce",
		rule: "A recorded key is replayed to any number of requests at once: none of them gets ErrInProgress because another reads the key.",
		run: func(c *check) {
			c.commit(c.claim(claimOf("acme", "k")), answer(201, "done"))
			const copies = 64
			errs := make([]error, copies)
			atOnce(copies, func(i int) {
				attempt, record, err := c.Store.Begin(c.ctx, claimOf("acme", "k"))
				switch {
				case attempt != nil:
					attempt.Rollback(c.ctx)
					err = errors.New("a recorded key was claimed")
				case err == nil && record == nil:
					err = errors.New("no record, no attempt and no error")
				case err == nil && string(record.Answer.Body) != "done":
					err = fmt.Errorf("body %.40q", record.Answer.Body)
				}
				errs[i] = err
			})
			for _, err := range errs {
				if err != nil {
					c.Fatalf("replay: %v", err)
				}
			}
		},
	},
	{
		name: "ScopesAreApart",
		rule: "The same value in two scopes is two keys: one caller never meets another's claim or answer.",
		run: func(c *check) {
			c.wantApart(idempotency.Key{Scope: "acme", Value: "k"}, idempotency.Key{Scope: "initech", Value: "k"})
		},
	},
	{
		name: "PartsAreNeverJoined",
		rule: `Scope and value are stored and compared apart: ("a", "b:c") and ("a:b", "c") are two keys, whatever stands between them when they are joined.`,
		run: func(c *check) {
			c.wantApart(idempotency.Key{Scope: "a", Value: "bc"}, idempotency.Key{Scope: "ab", Value: "c"})
			for _, separator := range []string{":", "/", "|", "-", "_", ".", ";", "#"} {
				c.wantApart(
					idempotency.Key{Scope: "a", Value: "b" + separator + "c"},
					idempotency.Key{Scope: "a" + separator + "b", Value: "c"},
				)
			}
		},
	},
	{
		name: "CaseCounts",
		rule: "Keys and scopes that differ in the case of a letter are different.",
		run: func(c *check) {
			c.wantApart(
				idempotency.Key{Scope: "acme", Value: "key"}, idempotency.Key{Scope: "acme", Value: "Key"},
				idempotency.Key{Scope: "Acme", Value: "key"},
			)
		},
	},
	{
		name: "LongestKeys",
		rule: "Keys and scopes of the greatest length are kept whole: those that differ in their last byte are different.",
		run: func(c *check) {
			scope, value := strings.Repeat("s", idempotency.ScopeBytesMax-1), strings.Repeat("v", idempotency.KeyBytesMax-1)
			c.wantApart(
				idempotency.Key{Scope: scope + "1", Value: value + "1"}, idempotency.Key{Scope: scope + "1", Value: value + "2"},
				idempotency.Key{Scope: scope + "2", Value: value + "1"}, idempotency.Key{Scope: scope, Value: value},
			)
		},
	},
	{
		name: "EveryCharacterCounts",
		rule: "A key may hold every visible ASCII character but comma and quote, and a scope all of UTF-8 but NUL. None has a meaning, and none is normalized away.",
		run: func(c *check) {
			var keys []idempotency.Key
			all := ""
			for char := '!'; char <= '~'; char++ {
				if value := string(char); idempotency.ValidateKeyValue(value) == nil {
					all += value
					keys = append(keys, idempotency.Key{Scope: "acme", Value: value})
				}
			}
			keys = append(keys, idempotency.Key{Scope: "acme", Value: all}, idempotency.Key{Scope: "acme", Value: `a\\b`}, idempotency.Key{Scope: "acme", Value: `a\b`})
			for _, scope := range []string{" ", "  ", "acme ", "%", "_", "'", `"`, `\`, "\t", "\n", "\r\n", "a,b", "ß", "ẞ", "é", "e\u0301", "\u200b", "日本", "💶", "\U0010ffff", "\x01", "\x7f"} {
				keys = append(keys, idempotency.Key{Scope: scope, Value: "k"})
			}
			c.wantApartInTurn(keys...)
		},
	},
	{
		name: "CancelledBeginHoldsNothing",
		rule: "A Begin whose context ends leaves nothing behind, at whatever point it was: the key is free for the next one.",
		run: func(c *check) {
			cancelled, cancel := context.WithCancel(c.ctx)
			cancel()
			if attempt, _, _ := c.Store.Begin(cancelled, claimOf("acme", "k0")); attempt != nil {
				attempt.Rollback(c.ctx)
			}
			c.wantFree(claimOf("acme", "k0"))
			for i := range 30 {
				claim := claimOf("acme", fmt.Sprintf("k%d", i+1))
				ctx, cancel := context.WithCancel(c.ctx)
				ended := make(chan struct{})
				go func() {
					for range i * 20 { // each time a little later
						runtime.Gosched()
					}
					cancel()
					close(ended)
				}()
				attempt, _, err := c.Store.Begin(ctx, claim)
				<-ended
				switch {
				case attempt != nil:
					attempt.Rollback(c.ctx)
				case err == nil:
					c.Errorf("no attempt and no error")
				}
				c.wantFreeSoon(claim)
			}
		},
	},
	{
		name: "BeginContextBoundsBeginAlone",
		rule: "Once Begin has returned its context may end: the attempt goes on and can be committed.",
		run: func(c *check) {
			ctx, cancel := context.WithCancel(c.ctx)
			defer cancel()
			claim := claimOf("acme", "k")
			attempt, _, err := c.beginWith(ctx, claim)
			if err != nil {
				c.Fatalf("Begin: %v", err)
			}
			cancel()
			c.commit(attempt, answer(201, "done"))
			c.wantBody(claim, "done")
		},
	},
	{
		name: "KeylessNeverCollides",
		rule: "Requests without a key are never in each other's way, and record nothing.",
		run: func(c *check) {
			var attempts []*attempt
			for range 4 {
				attempts = append(attempts, c.claim(claimOf("acme", "")))
			}
			c.commit(attempts[0], answer(201, "a"))
			if err := attempts[1].Decline(c.ctx, answer(402, "b")); err != nil {
				c.Errorf("Decline without a key: %v", err)
			}
			attempts[2].Rollback(c.ctx)
			c.commit(attempts[3], answer(201, "c"))
			c.wantFree(claimOf("acme", ""))
		},
	},
}

// wantApart fails if keys block each other while all of them are claimed, or if one replays
// another's answer.
func (c *check) wantApart(keys ...idempotency.Key) {
	c.Helper()
	attempts := make([]*attempt, len(keys))
	for i, key := range keys {
		attempt, record, err := c.begin(claimOf(key.Scope, key.Value))
		if attempt == nil {
			c.Fatalf("key %d of %d was taken for an earlier one: record %v, error %v", i+1, len(keys), record != nil, err)
		}
		attempts[i] = attempt
	}
	for i, attempt := range attempts {
		c.commit(attempt, answer(201, fmt.Sprint(i)))
	}
	for i, key := range keys {
		c.wantBody(claimOf(key.Scope, key.Value), fmt.Sprint(i))
	}
}

// wantApartInTurn is wantApart for more keys than a store can hold at once.
func (c *check) wantApartInTurn(keys ...idempotency.Key) {
	c.Helper()
	for i, key := range keys {
		c.commit(c.claim(claimOf(key.Scope, key.Value)), answer(201, fmt.Sprint(i)))
	}
	for i, key := range keys {
		c.wantBody(claimOf(key.Scope, key.Value), fmt.Sprint(i))
	}
}

// wantFreeSoon fails if a key never becomes claimable. A store may take a moment to notice that a
// cancelled request is gone.
func (c *check) wantFreeSoon(claim *idempotency.Claim) {
	c.Helper()
	for {
		attempt, record, err := c.begin(claim)
		switch {
		case attempt != nil:
			attempt.Rollback(c.ctx)
			return
		case record != nil:
			c.Fatalf("the key has a record")
		case c.ctx.Err() != nil:
			c.Fatalf("the key is still held: %v", err)
		}
		runtime.Gosched()
	}
}

// atOnce calls f with 0 to n-1, concurrently.
func atOnce(n int, f func(i int)) {
	var group sync.WaitGroup
	start := make(chan struct{})
	for i := range n {
		group.Go(func() {
			<-start
			f(i)
		})
	}
	close(start)
	group.Wait()
}
