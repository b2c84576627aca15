package server

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
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

	// settleMax limits the wait for an open request once the processor works again. It takes less
	// than a minute, but longer on a loaded machine.
	settleMax = 2 * time.Minute
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
			return b.audit() // this one may have counted the charges before the last of them
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

// TestTopUpSurvivesEachFaultOfTheProcessor: the processor misbehaves in one way, with every
// request. It does so for ever if a repetition can succeed, and otherwise for a while. Nobody
// retries. The top-up is done within a minute, with one charge and one posting.
func TestTopUpSurvivesEachFaultOfTheProcessor(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "waits for pauses between calls")
	for name, test := range map[string]struct {
		faults, card string
		heals        bool // the test ends the fault, because a repetition can't succeed before
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

// TestTopUpThatOnlyAPersonCanEndIsParked: the processor repeats a 500 under the key, even when it
// works again.
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

// auditDuring audits until the work of the group has ended, and fails the test if an audit finds
// something.
func (b *bundle) auditDuring(work *sync.WaitGroup) {
	b.t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		work.Wait()
	}()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		if audit := b.audit(); !audit.OK {
			text, _ := json.Marshal(audit)
			b.t.Errorf("audit: %s", text)
			running = false
		}
	}
	<-done
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
	b.auditDuring(&group)
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

const payoutFields = "id:id account:text amount:int payout:text created_at:time"

func (b *bundle) payOut(key, account, iban string, amount int) reply {
	b.t.Helper()
	return b.send(http.MethodPost, bank.PayoutsPath, fmt.Sprintf(`{"account":%q,"iban":%q,"amount":%d}`, account, iban, amount), "Idempotency-Key", key)
}

// TestPayoutIsHeldAndThenPostedOrReleased checks the answers of POST /v1/payouts, and where the
// money is meanwhile.
func TestPayoutIsHeldAndThenPostedOrReleased(t *testing.T) {
	t.Parallel()
	b := setup(t)
	made := b.payOut("made", "alice", "DE1", 250)
	if made.status != http.StatusCreated || made.outcome() != "executed" {
		t.Fatalf("answer is %d %v %s", made.status, made.header, made.body)
	}
	object := expectFields(t, made.body, payoutFields)
	if sent := b.listed("payouts"); len(sent) != 1 || sent[0].ID != object["payout"] || sent[0].Amount != 250 {
		t.Errorf("the processor has %+v", sent)
	}
	if again := b.payOut("made", "alice", "DE1", 250); again.outcome() != "replayed" || string(again.body) != string(made.body) {
		t.Errorf("the second answer is %s %s, the first %s", again.outcome(), again.body, made.body)
	}
	expectProblem(t, b.payOut("refused", "alice", "DE0002", 10), 422, "payout-refused")
	expectProblem(t, b.payOut("poor", "acct-0001", "DE1", 100_001), 402, "insufficient-funds")
	expectProblem(t, b.payOut("nobody", "nobody", "DE1", 1), 404, "account-not-found")
	for _, body := range []string{
		`{"account":"alice","iban":"DE1","amount":0}`, `{"account":"alice","iban":"","amount":1}`, `{"account":"alice","iban":"DE1"}`,
		`{"account":"alice","iban":"DE1","amount":1,"more":1}`, `{"account":"alice","iban":"` + strings.Repeat("x", 65) + `","amount":1}`,
		`{"account":"alice","iban":"DE1","amount":1000000000001}`,
	} {
		expectProblem(t, b.keyed(bank.PayoutsPath, body), 400, "invalid-payout")
	}
	audit := b.audit()
	if b.balance("alice") != 9_999_750 || !audit.OK || audit.HeldTotal != "0" || audit.BalanceTotal != "120000000" || *audit.Charges != 0 {
		t.Errorf("alice has %d, and the audit says %+v", b.balance("alice"), audit)
	}

	// Under way: the account no longer has the money, and it is held.
	b.faults(`{"lose_request":1}`)
	expectAccepted(t, b.payOut("open", "alice", "DE1", 100))
	audit = b.audit()
	if b.balance("alice") != 9_999_650 || !audit.OK || audit.HeldTotal != "100" || audit.BalanceTotal != "120000000" || audit.OpenOperations != 1 {
		t.Errorf("alice has %d, and the audit says %+v", b.balance("alice"), audit)
	}
	b.faults(`{}`)
	if audit := b.settled(); !audit.OK || audit.HeldTotal != "0" || b.balance("alice") != 9_999_650 || len(b.listed("payouts")) != 2 {
		t.Errorf("alice has %d, and the audit says %+v", b.balance("alice"), audit)
	}

	// Refused, after the reply to the first send was lost.
	b.faults(`{"keeps_declines":false,"error_after":1}`)
	expectAccepted(t, b.payOut("late-no", "alice", "DE0002", 100))
	b.faults(`{"keeps_declines":false}`)
	if audit := b.settled(); !audit.OK || audit.HeldTotal != "0" || b.balance("alice") != 9_999_650 {
		t.Errorf("alice has %d, and the audit says %+v", b.balance("alice"), audit)
	}
	if r := b.payOut("late-no", "alice", "DE0002", 100); r.status != 422 || r.outcome() != "replayed" {
		t.Errorf("the retry gets %d %s", r.status, r.outcome())
	}

	for _, one := range []struct {
		name, plant string
		sees        func(bank.Audit) bool
	}{
		{"a payout that nobody goes on with", `UPDATE payouts SET state = 'held', ended_at = NULL WHERE state = 'released'`,
			func(a bank.Audit) bool { return a.UnbalancedTransfers > 0 }},
		{"one that was posted without its entries", `DELETE FROM entries WHERE payout_id = (SELECT id FROM payouts WHERE amount = 250) AND (account LIKE 'bank:processor:%' OR amount < 0 AND account LIKE 'bank:held:%')`,
			func(a bank.Audit) bool { return a.UnbalancedTransfers == 1 && a.BalanceMismatches == 2 }},
		{"one that was released and posted", `UPDATE payouts SET state = 'posted', payout = 'po_none', instance = 'none' WHERE id = (SELECT min(id) FROM payouts WHERE state = 'released')`,
			func(a bank.Audit) bool { return a.UnbalancedTransfers == 1 && a.TransfersWithoutRecord == 1 }},
		{"one that was made and not posted", `UPDATE payouts SET payout = 'po_none' WHERE amount = 250`,
			func(a bank.Audit) bool { return *a.PayoutsWithoutPosting == 1 && *a.PostingsWithoutPayout == 1 }},
	} {
		t.Run(one.name, func(t *testing.T) {
			undo := plant(t, b, one.plant)
			defer undo()
			if a := b.audit(); a.OK || !one.sees(a) {
				text, _ := json.Marshal(a)
				t.Errorf("the audit says %s", text)
			}
		})
	}
}

// TestPayoutsAtOnceHoldNoMoreThanThereIs: payouts, transfers and top-ups of the same accounts at
// once, with replies that are lost. No balance is negative at any moment, and the money adds up.
func TestPayoutsAtOnceHoldNoMoreThanThereIs(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.faults(`{"lose_reply":0.2,"error_before":0.1}`)
	const clients, each = 6, 10
	var group sync.WaitGroup
	for i := range clients {
		group.Go(func() {
			for n := range each {
				account, key := fmt.Sprintf("acct-%04d", n%2), uuid.NewString()
				switch i % 3 {
				case 0:
					b.payOut(key, account, "DE1", 30_000)
				case 1:
					b.topUp(key, account, "tok", 10_000)
				default:
					b.send(http.MethodPost, bank.TransfersPath, fmt.Sprintf(`{"from":%q,"to":"bob","amount":5000}`, account), "Idempotency-Key", key)
				}
			}
		})
	}
	b.auditDuring(&group)
	b.faults(`{}`)
	audit := b.settled()
	expectAudit(t, audit, clients/3*each)
	if audit.HeldTotal != "0" || *audit.PayoutsWithoutPosting != 0 || *audit.PostingsWithoutPayout != 0 {
		t.Errorf("audit is %+v", audit)
	}
}

// TestReceiptIsMailedOnceAtMost: the answer says whether the mail was surely sent, and no fault
// makes a second one.
func TestReceiptIsMailedOnceAtMost(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *Config) { c.NoConsumers = true }) // the notice about the transfer is a mail too
	var transfer bank.Transfer
	b.into(b.keyed(bank.TransfersPath, `{"from":"alice","to":"bob","amount":1}`), &transfer)
	receipt := func(key string) reply {
		return b.send(http.MethodPost, bank.ReceiptsPath, fmt.Sprintf(`{"transfer":%q,"to":"alice@example.com"}`, transfer.ID), "Idempotency-Key", key)
	}
	for n, test := range []struct {
		faults, sent string
		mails        int
	}{
		{`{}`, "yes", 1},
		{`{"lose_reply":1}`, "maybe", 1},
		{`{"error_after":1}`, "maybe", 1},
		{`{"lose_request":1}`, "maybe", 0},
		{`{"error_before":1}`, "maybe", 0},
		{`{"down":true}`, "maybe", 0},
	} {
		before := len(b.listed("mails"))
		b.faults(test.faults)
		key := fmt.Sprint("receipt-", n)
		made := receipt(key)
		if made.status != http.StatusCreated {
			t.Fatalf("%s: %d %s", test.faults, made.status, made.body)
		}
		object := expectFields(t, made.body, "id:id transfer:id sent:text")
		b.faults(`{}`)
		again := receipt(key)
		if object["sent"] != test.sent || object["transfer"] != transfer.ID || again.outcome() != "replayed" || string(again.body) != string(made.body) {
			t.Errorf("%s: %s, and then %s %s", test.faults, made.body, again.outcome(), again.body)
		}
		if got := len(b.listed("mails")) - before; got != test.mails {
			t.Errorf("%s: %d mails", test.faults, got)
		}
	}
	if mails := b.listed("mails"); mails[0].To != "alice@example.com" || !strings.Contains(mails[0].Text, transfer.ID) {
		t.Errorf("the mail is %+v", mails[0])
	}
	for _, body := range []string{`{"transfer":"1"}`, `{"to":"a"}`, `{"transfer":"1","to":"` + strings.Repeat("x", 321) + `"}`} {
		expectProblem(t, b.keyed(bank.ReceiptsPath, body), 400, "invalid-receipt")
	}
	expectProblem(t, b.keyed(bank.ReceiptsPath, `{"transfer":"1","to":"a"}`), 404, "transfer-not-found")
	expectProblem(t, b.keyed(bank.ReceiptsPath, `{"transfer":"x","to":"a"}`), 404, "transfer-not-found")
	expectAudit(t, b.settled(), 0)
}

// holdingProcessor applies charges and holds all replies until it has had a given number of keys.
type holdingProcessor struct {
	*httptest.Server
	mu    sync.Mutex
	items []map[string]any // applied, in order
	keys  map[string]map[string]any
	held  []context.Context // of all calls; one ends when the bank hangs up
	all   chan struct{}     // closed when it has had all keys
	free  chan struct{}     // closed when replies may be given
}

// underWay returns the calls for which the bank still waits for the reply.
func (p *holdingProcessor) underWay() []context.Context {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(p.held), ended)
}

func ended(ctx context.Context) bool { return ctx.Err() != nil }

func newHoldingProcessor(t *testing.T, keys int) *holdingProcessor {
	p := &holdingProcessor{keys: map[string]map[string]any{}, all: make(chan struct{}), free: make(chan struct{})}
	p.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Processor-Instance", "holding")
		p.mu.Lock()
		defer p.mu.Unlock()
		if r.Method == http.MethodGet {
			items := []map[string]any{}
			if r.URL.Path == "/charges" {
				items = append(items, p.items...)
			}
			if key := r.URL.Query().Get("key"); key != "" {
				items = slices.DeleteFunc(items, func(item map[string]any) bool { return item["key"] != key })
			}
			_ = json.NewEncoder(w).Encode(map[string]any{"items": items}) // the client may be gone
			return
		}
		body, err := io.ReadAll(r.Body) // all of it, so that the server sees the bank hang up
		if err != nil {
			return
		}
		p.held = append(p.held, r.Context())
		key := r.Header.Get("Idempotency-Key")
		item, known := p.keys[key]
		if !known {
			if err := json.Unmarshal(body, &item); err != nil {
				t.Error(err)
			}
			item["id"], item["key"] = "ch_"+key, key
			p.keys[key], p.items = item, append(p.items, item)
			if len(p.keys) == keys {
				close(p.all)
			}
		}
		p.mu.Unlock()
		<-p.free
		p.mu.Lock()
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(item)
	}))
	t.Cleanup(p.Close)
	return p
}

// TestSlowProcessorHoldsNoConnection: 32 top-ups call a slow processor, with a pool of 4
// connections. More than 4 of them wait at the same time, without an open transaction, and all are
// settled.
func TestSlowProcessorHoldsNoConnection(t *testing.T) {
	t.Parallel()
	const clients, pool = 32, 4
	p := newHoldingProcessor(t, clients)
	b := setup(t, func(c *Config) { c.PSP, c.PoolSize, c.AcquireTimeout = p.URL, pool, time.Minute })
	var group sync.WaitGroup
	for i := range clients {
		group.Go(func() {
			if r := b.topUp(fmt.Sprint("k", i), fmt.Sprintf("acct-%04d", i), "tok", 5); r.status != 201 {
				expectAccepted(t, r) // its call took too long, on a busy machine
			}
		})
	}
	select {
	case <-p.all:
	case <-time.After(startTimeout):
		t.Error("the top-ups don't reach the processor all at once")
	}
	for deadline := time.Now().Add(startTimeout); ; {
		// If the bank still waits for a call after the count, the call was under way when the
		// transactions were counted. Other work of the bank may have a transaction open for a
		// moment.
		calls := p.underWay()
		open := b.count(`SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND xact_start IS NOT NULL AND application_name <> $1`, testerName)
		time.Sleep(100 * time.Millisecond)
		calls = slices.DeleteFunc(calls, ended)
		if open == 0 && len(calls) > pool {
			break
		}
		if time.Now().After(deadline) {
			t.Errorf("%d transactions are open while %d calls wait for the processor", open, len(calls))
			break
		}
	}
	close(p.free)
	group.Wait()
	expectAudit(t, b.settled(), clients)
}

// TestOperationShowsWhatBecomesOfAnOpenRequest: a client that does not want to wait gets 202 and an
// address, which shows the request to its own tenant, before it is done and afterwards.
func TestOperationShowsWhatBecomesOfAnOpenRequest(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const body, acme = `{"account":"alice","card":"tok","amount":5}`, "Bearer demo-acme"
	ask := func(key string) reply {
		return b.send(http.MethodPost, bank.TopUpsPath, body, "Idempotency-Key", key, "Prefer", "respond-async", "Authorization", acme)
	}
	type operation struct {
		ID, Status string
		Answer     *struct {
			Status int
			Body   bank.TopUp
		}
	}
	look := func(location string) (o operation) {
		r := b.send(http.MethodGet, location, "", "Authorization", acme)
		if r.status != http.StatusOK {
			t.Errorf("GET %s: %d %s", location, r.status, r.body)
		}
		b.into(r, &o)
		return o
	}
	b.faults(`{"down":true}`)
	r := ask("open")
	location := r.header.Get("Location")
	if r.status != http.StatusAccepted || r.outcome() != "pending" || !strings.HasPrefix(location, bank.OperationsPath) {
		t.Fatalf("answer is %d %v %s", r.status, r.header, r.body)
	}
	if o := look(location); o.Status != "pending" || o.Answer != nil || location != bank.OperationsPath+o.ID {
		t.Errorf("%s is %+v", location, o)
	}
	for _, token := range []string{"Bearer demo-globex", ""} {
		headers := []string{"Authorization", token}
		if token == "" {
			headers = nil
		}
		if other := b.send(http.MethodGet, location, "", headers...); other.status != http.StatusNotFound {
			t.Errorf("another tenant gets %d %s", other.status, other.body)
		}
	}
	if other := b.send(http.MethodGet, bank.OperationsPath+"nothing", "", "Authorization", acme); other.status != http.StatusNotFound {
		t.Errorf("an unknown id is %d", other.status)
	}
	b.faults(`{}`)
	expectAudit(t, b.settled(), 1)
	if o := look(location); o.Status != "done" || o.Answer == nil || o.Answer.Status != http.StatusCreated || o.Answer.Body.Amount != 5 {
		t.Errorf("%s is %+v", location, o)
	}
	if r := ask("open"); r.status != http.StatusCreated || r.outcome() != "replayed" {
		t.Errorf("the retry gets %d %s", r.status, r.outcome())
	}
	if r := ask("quick"); r.status != http.StatusCreated || r.outcome() != "executed" {
		t.Errorf("a request that is settled at once gets %d %s", r.status, r.outcome())
	}

	b.faults(`{"same_error":1}`)
	r = ask("parked")
	b.settled()
	if o := look(r.header.Get("Location")); r.status != http.StatusAccepted || o.Status != "needs-attention" {
		t.Errorf("a parked request gets %d, and is %+v", r.status, o)
	}
}
