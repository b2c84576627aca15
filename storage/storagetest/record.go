package storagetest

import (
	"bytes"
	"slices"
	"strings"
	"time"

	"github.com/paidonce/idempotency"
)

var recordCases = []testCase{
	{
		name: "RecordIsKeptByteForByte",
		rule: "A replay is the answer as it was: status, every header with all its values in their order, and every byte of the body. Fingerprint with its version, attempt and trace come back as they went in.",
		run: func(c *check) {
			for i, answer := range answers() {
				claim := claimOf("acme", "k"+string(rune('a'+i)))
				claim.Fingerprint = idempotency.NewFingerprint(int16(100+i), []byte{byte(i)})
				if i%2 == 0 {
					claim.TraceID = "0af7651916cd43dd8448eb211c80319c"
				}
				attempt := c.claim(claim)
				if i%3 == 2 {
					c.decline(attempt, answer)
				} else {
					c.commit(attempt, answer)
				}
				c.wantRecord(claim, answer)
			}
		},
	},
	{
		name: "RecordIsTheStoresOwn",
		rule: "A record shares no memory with the answer that was recorded, nor with what an earlier replay was given: whoever changes those changes no replay.",
		run: func(c *check) {
			claim := claimOf("acme", "k")
			given := func() *idempotency.Answer {
				return &idempotency.Answer{Status: 201, Header: map[string][]string{"Link": {"<a>", "<b>"}}, Body: []byte("done")}
			}
			spoil := func(r *idempotency.Answer) {
				r.Status, r.Body[0], r.Header["Link"][0], r.Header["New"] = 500, 'X', "<x>", []string{"x"}
			}
			first := given()
			c.commit(c.claim(claim), first)
			spoil(first)
			c.wantRecord(claim, given())
			spoil(&c.replay(claim).Answer)
			c.wantRecord(claim, given())
		},
	},
	{
		name: "RecordCountsForItsTTL",
		rule: "A record says when it was made and until when it counts, by the store's clock: for its TTL from the commit on, so that none is born expired. It says the same each time.",
		run: func(c *check) {
			for _, ttl := range []time.Duration{time.Second, ttl, 365 * 24 * time.Hour} {
				for _, end := range []func(idempotency.Attempt) error{
					func(a idempotency.Attempt) error { return a.Commit(c.ctx, answer(201, "")) },
					func(a idempotency.Attempt) error { return a.Decline(c.ctx, answer(402, "")) },
				} {
					claim := claimOf("acme", idempotency.NewAttemptID().String())
					claim.TTL = ttl
					if err := end(c.claim(claim)); err != nil {
						c.Fatalf("end: %v", err)
					}
					first, second := c.replay(claim), c.replay(claim)
					if got := first.ExpiresAt.Sub(first.CreatedAt); got < ttl-time.Millisecond || got > ttl+time.Minute {
						c.Errorf("the record counts for %v, want %v", got, ttl)
					}
					if first.CreatedAt.IsZero() || !first.CreatedAt.Equal(second.CreatedAt) || !first.ExpiresAt.Equal(second.ExpiresAt) {
						c.Errorf("made %v, until %v; and the next time %v, %v", first.CreatedAt, first.ExpiresAt, second.CreatedAt, second.ExpiresAt)
					}
				}
			}
		},
	},
	{
		name: "BeginComparesNothing",
		rule: "Begin returns the record whatever the fingerprint is. The engine compares: a store that hid the record of a different request would let a handler run twice for one key.",
		run: func(c *check) {
			claim := claimOf("acme", "k")
			c.commit(c.claim(claim), answer(201, "done"))
			other := claimOf("acme", "k")
			other.Fingerprint = idempotency.NewFingerprint(100, []byte("another request"))
			if record := c.replay(other); record.Fingerprint != claim.Fingerprint {
				c.Errorf("the record has the fingerprint of the request that found it")
			}
		},
	},
	{
		name:    "RecordOutlivesTheStore",
		rule:    "A record is there for a program that was started after the one that made it.",
		promise: isDurable,
		run: func(c *check) {
			claim := claimOf("acme", "k")
			c.commit(c.claim(claim), answer(201, "done"))
			var err error
			if c.Store, err = c.Reopen(c.ctx); err != nil {
				c.Fatalf("Harness.Reopen: %v", err)
			}
			c.wantRecord(claim, answer(201, "done"))
			c.wantFree(claimOf("acme", "other"))
		},
	},
	{
		name:    "RecordCountsUntilItIsDeleted",
		rule:    "An expired record counts until it is deleted: the path of a request reads no clock. Once it is deleted its key is absent, and the next request runs.",
		promise: expires,
		run: func(c *check) {
			short, long := claimOf("acme", "short"), claimOf("acme", "long")
			short.TTL, long.TTL = time.Hour, 3*time.Hour
			c.commit(c.claim(short), answer(201, "short"))
			c.commit(c.claim(long), answer(201, "long"))
			declined := claimOf("acme", "declined")
			c.decline(c.claim(declined), answer(402, "declined"))
			other := claimOf("acme", "held")
			held := c.claim(other)
			c.wantDeleted(0)
			c.advance(2 * time.Hour)
			c.wantBody(short, "short")
			c.wantBody(declined, "declined")
			c.wantDeleted(2)
			c.wantBody(long, "long")
			c.wantFree(declined)
			c.commit(c.claim(short), answer(201, "again"))
			c.wantDeleted(0)
			c.wantBody(short, "again")
			c.commit(held, answer(201, "held"))
			c.wantBody(other, "held")
		},
	},
}

// answers returns answers with details that are easily lost.
func answers() []*idempotency.Answer {
	everyByte := make([]byte, 256)
	for i := range everyByte {
		everyByte[i] = byte(i)
	}
	return []*idempotency.Answer{
		{Status: 200},
		{Status: 200, Header: map[string][]string{}, Body: []byte{}},
		{Status: 201, Header: map[string][]string{"Content-Type": {"application/json"}}, Body: []byte(`{"id":"1"}`)},
		{Status: 204},
		{Status: 303, Header: map[string][]string{"Location": {"/transfers/1?a=b,c&d=%2C"}, "Etag": {`W/"x, y"`}}},
		{Status: 404, Header: map[string][]string{"Link": {"<b>; rel=x", "<a>, <c>", "", "<a>, <c>"}}, Body: []byte("\n")},
		{Status: 499, Header: map[string][]string{"A": {""}, "Aa": {"1"}, "AA": {"2"}, "B": {"a\tb"}, "Z": {"ü \xff"}}, Body: []byte(" ")},
		{Status: 200, Body: everyByte},
		{Status: 422, Body: []byte(`'"\%;--$1$$` + "\x00\r\n")},
		{Status: 599, Header: map[string][]string{"Vary": {strings.Repeat("v", 8<<10)}}, Body: bytes.Repeat(everyByte, 4<<10)},
	}
}

// wantRecord fails if the record of a request differs from this answer in any field.
func (c *check) wantRecord(claim *idempotency.Claim, want *idempotency.Answer) {
	c.Helper()
	c.wantEqual(c.replay(claim), claim, want)
}

// wantEqual fails if a record differs from the one that claim's attempt recorded.
func (c *check) wantEqual(got *idempotency.Record, claim *idempotency.Claim, want *idempotency.Answer) {
	c.Helper()
	if got.Answer.Status != want.Status {
		c.Errorf("status %d, want %d", got.Answer.Status, want.Status)
	}
	if len(got.Answer.Header) != len(want.Header) {
		c.Errorf("%d headers, want %d", len(got.Answer.Header), len(want.Header))
	}
	for name, values := range want.Header {
		if !slices.Equal(got.Answer.Header[name], values) {
			c.Errorf("header %s is %.80q, want %.80q", name, got.Answer.Header[name], values)
		}
	}
	if !bytes.Equal(got.Answer.Body, want.Body) {
		c.Errorf("body of %d bytes %.40q, want %d bytes %.40q", len(got.Answer.Body), got.Answer.Body, len(want.Body), want.Body)
	}
	if got.Fingerprint != claim.Fingerprint {
		c.Errorf("fingerprint version %d, %x; want version %d, %x", got.Fingerprint.Version, got.Fingerprint.Sum, claim.Fingerprint.Version, claim.Fingerprint.Sum)
	}
	if got.Attempt != claim.Attempt {
		c.Errorf("attempt %v, want %v", got.Attempt, claim.Attempt)
	}
	if got.TraceID != claim.TraceID {
		c.Errorf("trace id %q, want %q", got.TraceID, claim.TraceID)
	}
}

func (c *check) wantDeleted(want int64) {
	c.Helper()
	got, err := c.DeleteExpired(c.ctx)
	if err != nil {
		c.Fatalf("Harness.DeleteExpired: %v", err)
	}
	if got != want {
		c.Errorf("%d records were deleted, want %d", got, want)
	}
}

func (c *check) advance(d time.Duration) {
	c.Helper()
	if err := c.Advance(c.ctx, d); err != nil {
		c.Fatalf("Harness.Advance: %v", err)
	}
}
