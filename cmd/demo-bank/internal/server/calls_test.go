package server

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/internal/pgtest"
)

const (
	topUpFields = "id:id account:text amount:int charge:text created_at:time"

	// settleMax is the contract's limit for an open request once the processor is good again.
	settleMax = time.Minute
)

// faults sets the faults of the bank's processor.
func (b *bundle) faults(faults string) {
	b.t.Helper()
	if r := b.sendTo(http.MethodPut, b.psp+"/faults", faults); r.status != http.StatusNoContent {
		b.t.Errorf("PUT /faults %s: %d %s", faults, r.status, r.body)
	}
}

// listed returns the processor's list of a kind, such as "charges".
func (b *bundle) listed(kind string) (items []struct {
	ID, Key, Text, To string
	Amount            int64
}) {
	b.t.Helper()
	list := struct{ Items any }{&items}
	b.into(b.sendTo(http.MethodGet, b.psp+"/"+kind, ""), &list)
	return items
}

// settled waits until no request is open, and returns the audit.
func (b *bundle) settled() bank.Audit {
	b.t.Helper()
	deadline := time.Now().Add(settleMax)
	for {
		audit := b.audit()
		switch {
		case audit.OpenOperations == 0:
			return audit
		case time.Now().After(deadline):
			b.t.Fatalf("a request is still open: %+v", audit)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func (b *bundle) topUp(key, account, card string, amount int) reply {
	b.t.Helper()
	return b.send(http.MethodPost, bank.TopUpsPath, fmt.Sprintf(`{"account":%q,"card":%q,"amount":%d}`, account, card, amount), "Idempotency-Key", key)
}

// expectAccepted requires the answer to a request that stays open.
func expectAccepted(t *testing.T, r reply) {
	t.Helper()
	var document struct {
		Type     string
		Accepted bool
	}
	if err := json.Unmarshal(r.body, &document); err != nil || r.status != http.StatusServiceUnavailable || r.outcome() != "unknown" ||
		r.header.Get("Retry-After") == "" || !document.Accepted || !strings.HasSuffix(document.Type, "#outcome-unknown") {
		t.Errorf("answer is %d %v %s: want 503 unknown that is accepted", r.status, r.header, r.body)
	}
}

// expectAudit requires an audit that is ok, with this number of charges.
func expectAudit(t *testing.T, audit bank.Audit, charges int64) {
	t.Helper()
	if !audit.OK || audit.OpenOperations != 0 || audit.ParkedOperations != 0 || audit.Charges == nil || *audit.Charges != charges ||
		*audit.ChargesWithoutPosting != 0 || *audit.PostingsWithoutCharge != 0 || audit.BalanceTotal != audit.OpeningTotal {
		text, _ := json.Marshal(audit)
		t.Errorf("audit is %s: want %d charges, and no wrong", text, charges)
	}
}

// TestTopUpChargesTheCardAndCreditsTheAccount checks the answers of POST /v1/topups when the
// processor is good.
func TestTopUpChargesTheCardAndCreditsTheAccount(t *testing.T) {
	t.Parallel()
	b := setup(t)
	made := b.topUp("made", "alice", "tok_visa", 250)
	if made.status != http.StatusCreated || made.outcome() != "executed" {
		t.Fatalf("answer is %d %v %s", made.status, made.header, made.body)
	}
	object := expectFields(t, made.body, topUpFields)
	charges := b.listed("charges")
	if len(charges) != 1 || charges[0].ID != object["charge"] || charges[0].Amount != 250 {
		t.Errorf("the processor has %+v", charges)
	}
	if again := b.topUp("made", "alice", "tok_visa", 250); again.outcome() != "replayed" || string(again.body) != string(made.body) {
		t.Errorf("the second answer is %s %s, the first %s", again.outcome(), again.body, made.body)
	}
	if other := b.topUp("made", "alice", "tok_visa", 251); other.outcome() != "mismatch" {
		t.Errorf("another amount under the key is %s", other.outcome())
	}
	if got := b.balance("alice"); got != 10_000_250 {
		t.Errorf("alice has %d", got)
	}

	expectProblem(t, b.topUp("declined", "alice", "tok_0002", 10), 402, "card-declined")
	if again := b.topUp("declined", "alice", "tok_0002", 10); again.outcome() != "replayed" || again.status != 402 {
		t.Errorf("a decline again is %d %s", again.status, again.outcome())
	}
	expectProblem(t, b.topUp("nobody", "nobody", "tok_visa", 10), 404, "account-not-found")
	expectProblem(t, b.topUp("nobody-2", "bank:processor:EUR", "tok_visa", 10), 404, "account-not-found")
	for _, body := range []string{
		`{"account":"alice","card":"tok","amount":0}`, `{"account":"alice","card":"tok","amount":-1}`, `{"account":"alice","card":"tok","amount":1.5}`,
		`{"account":"alice","card":"tok","amount":1000000000001}`, `{"account":"alice","card":"","amount":1}`, `{"card":"tok","amount":1}`,
		`{"account":"alice","amount":1}`, `{"account":"alice","card":"tok"}`, `{"account":"alice","card":"tok","amount":1,"more":1}`,
		`{"account":"alice","card":"` + strings.Repeat("x", 65) + `","amount":1}`,
	} {
		expectProblem(t, b.keyed(bank.TopUpsPath, body), 400, "invalid-topup")
	}
	expectProblem(t, b.keyed(bank.TopUpsPath, `[]`), 400, "invalid-json")
	if r := b.keyed(bank.TopUpsPath, `{"account":"bob","card":"`+strings.Repeat("é", 64)+`","amount":1000000000000}`); r.status != 201 {
		t.Errorf("at the limits: %d %s", r.status, r.body)
	}
	if r := b.send(http.MethodPost, bank.TopUpsPath, `{"account":"alice","card":"tok","amount":1}`); r.status != 400 || r.outcome() != "not-executed" {
		t.Errorf("without a key: %d %s", r.status, r.outcome())
	}
	expectAudit(t, b.audit(), 2)
	// Clients see none of the bank's own accounts.
	if list := b.get("/v1/accounts?limit=1000"); strings.Contains(string(list.body), "bank:") {
		t.Errorf("the list has an account of the bank's own: %s", list.body)
	}
	expectProblem(t, b.get("/v1/accounts/bank:processor:EUR"), 404, "account-not-found")
	expectProblem(t, b.keyed("/v1/transfers", `{"from":"bank:processor:EUR","to":"bob","amount":1}`), 404, "account-not-found")
	if audit := b.audit(); audit.Accounts != 1002 || audit.OpeningTotal != "120000000" {
		t.Errorf("audit is %+v", audit)
	}
}

// TestTopUpSurvivesEachFaultOfTheProcessor: the processor misbehaves in one way, with every request
// and for ever where a repetition can succeed, and else for a while. Nobody retries. The top-up is
// done within a minute, with one charge and one posting.
func TestTopUpSurvivesEachFaultOfTheProcessor(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "waits for pauses between calls")
	for name, test := range map[string]struct {
		faults, card string
		heals        bool // the fault never ends by itself
		declined     bool
	}{
		"loses each reply":             {faults: `{"lose_reply":1}`},
		"504 although applied":         {faults: `{"error_after":1}`},
		"applies late":                 {faults: `{"late":1,"late_ms":1500}`},
		"loses each request":           {faults: `{"lose_request":1}`, heals: true},
		"503 before":                   {faults: `{"error_before":1}`, heals: true},
		"is down":                      {faults: `{"down":true}`, heals: true},
		"forgets keys at once":         {faults: `{"key_lifetime_s":0,"lose_reply":1}`},
		"keeps no declines":            {faults: `{"keeps_declines":false}`, card: "tok_0002", declined: true},
		"loses declines, keeps none":   {faults: `{"keeps_declines":false,"error_after":1}`, card: "tok_0002", heals: true, declined: true},
		"keeps no declines, good card": {faults: `{"keeps_declines":false}`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			b.faults(test.faults)
			card := "tok_visa"
			if test.card != "" {
				card = test.card
			}
			first := b.topUp("k", "alice", card, 250)
			switch name {
			case "keeps no declines", "keeps no declines, good card":
			default:
				expectAccepted(t, first)
			}
			if test.heals {
				if audit := b.audit(); audit.OpenOperations != 1 || !audit.OK {
					t.Errorf("while it lasts: %+v", audit)
				}
				b.faults(`{}`)
			}
			audit := b.settled()
			want, charges := int64(10_000_250), int64(1)
			if test.declined {
				want, charges = 10_000_000, 0
			}
			expectAudit(t, audit, charges)
			if got := b.balance("alice"); got != want {
				t.Errorf("alice has %d, want %d", got, want)
			}
			last := b.topUp("k", "alice", card, 250)
			if status := map[bool]int{false: 201, true: 402}[test.declined]; last.status != status || last.outcome() != "replayed" {
				t.Errorf("the retry gets %d %s %s", last.status, last.outcome(), last.body)
			}
		})
	}
}

// TestTopUpThatOnlyAPersonCanEndIsParked: the processor repeats a 500 under the key, also when it is
// good again.
func TestTopUpThatOnlyAPersonCanEndIsParked(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.faults(`{"same_error":1}`)
	b.topUp("k", "alice", "tok_visa", 250)
	b.faults(`{}`)
	audit := b.settled()
	if audit.ParkedOperations != 1 || !audit.OK || *audit.Charges != 0 {
		t.Errorf("audit is %+v", audit)
	}
	r := b.topUp("k", "alice", "tok_visa", 250)
	if r.outcome() != "unknown" || !strings.Contains(string(r.body), "needs-attention") {
		t.Errorf("a parked request is answered %d %s %s", r.status, r.outcome(), r.body)
	}
}

// TestAuditComparesTheProcessorWithTheBooks: each difference between the lists and the books is
// found, and none is found while a request is open, or if the processor can't be reached.
func TestAuditComparesTheProcessorWithTheBooks(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, amount := range []int{250, 300} {
		if r := b.topUp(uuid.NewString(), "alice", "tok", amount); r.status != 201 {
			t.Fatalf("%d %s", r.status, r.body)
		}
	}
	expectAudit(t, b.audit(), 2)
	for _, one := range []struct {
		name, plant             string
		charges, posts, records int64
	}{
		{"a lost posting", `WITH lost AS (DELETE FROM entries WHERE topup_id = (SELECT id FROM topups WHERE amount = 250)) DELETE FROM topups WHERE amount = 250`, 1, 0, 0},
		{"a posting of another amount", `UPDATE topups SET amount = 251 WHERE amount = 250`, 1, 1, 0},
		{"a posting without a charge", `UPDATE topups SET charge = 'ch_none' WHERE amount = 250`, 1, 1, 0},
		{"a posting at another processor", `UPDATE topups SET instance = 'psp_other' WHERE amount = 250`, 1, 0, 0},
		{"a charge that is posted twice", `INSERT INTO topups (id, amount, account, charge, instance) SELECT id + 1, amount, account, charge, instance FROM topups WHERE amount = 250`, 0, 1, 0},
		{"a top-up without a record", `DELETE FROM idempotency_keys WHERE attempt_id = (SELECT attempt_id FROM topups WHERE amount = 250)`, 0, 0, 1},
	} {
		t.Run(one.name, func(t *testing.T) {
			undo := plant(t, b, one.plant)
			defer undo()
			if a := b.audit(); a.OK || *a.ChargesWithoutPosting != one.charges || *a.PostingsWithoutCharge != one.posts || a.TransfersWithoutRecord != one.records {
				text, _ := json.Marshal(a)
				t.Errorf("the audit says %s", text)
			}
		})
	}
	if r := b.sendTo(http.MethodPost, b.psp+"/charges", `{"card":"tok","amount":7}`, "Idempotency-Key", "not the bank's"); r.status != 201 {
		t.Fatalf("%d %s", r.status, r.body)
	}
	if a := b.audit(); a.OK || *a.ChargesWithoutPosting != 1 || *a.Charges != 3 {
		t.Errorf("a charge that is not the bank's: %+v", a)
	}
	b.faults(`{"down":true}`)
	raw := b.get("/v1/audit")
	a := b.audit()
	if a.PSP != bank.ProcessorUnreachable || !a.OK || a.Charges != nil || !strings.Contains(string(raw.body), `"charges":null,"charges_without_posting":null,"postings_without_charge":null,"payouts_without_posting":null,"postings_without_payout":null`) {
		t.Errorf("without the processor: %s", raw.body)
	}
}

// TestAuditIsRightWhileTopUpsAreMade: the lists and the snapshot are read at different times, while
// money comes in.
func TestAuditIsRightWhileTopUpsAreMade(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *Config) { c.PoolSize = 8 })
	const clients, each = 4, 20
	var group sync.WaitGroup
	for i := range clients {
		group.Go(func() {
			for range each {
				if r := b.topUp(uuid.NewString(), fmt.Sprintf("acct-%04d", i), "tok", 5); r.status != 201 {
					t.Errorf("%d %s", r.status, r.body)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		group.Wait()
	}()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		if audit := b.audit(); !audit.OK {
			t.Errorf("audit: %+v", audit)
			running = false
		}
	}
	<-done
	expectAudit(t, b.settled(), clients*each)
}

// TestProcessorOfItsOwnKeepsItsFileInTheDataFolder: a second start finds the charges.
func TestProcessorOfItsOwnKeepsItsFileInTheDataFolder(t *testing.T) {
	t.Parallel()
	dir, database := pgtest.Folder(t), pgtest.Database(t)
	instance := ""
	for round := range 2 {
		t.Run(fmt.Sprint(round), func(t *testing.T) {
			b := setupOn(t, database, func(c *Config) { c.DataDir = dir })
			if r := b.topUp(fmt.Sprint(round), "alice", "tok", 5); r.status != 201 {
				t.Fatalf("%d %s", r.status, r.body)
			}
			audit := b.audit()
			expectAudit(t, audit, int64(round)+1)
			if round == 1 && audit.PSP != instance {
				t.Errorf("the instance is %s, and was %s", audit.PSP, instance)
			}
			instance = audit.PSP
		})
	}
}
