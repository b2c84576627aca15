//go:build unix

package main

import (
	"encoding/json"
	"net/http"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/internal/crashpoint"
	"github.com/paidonce/idempotency/internal/pgtest"
)

const topUpBody = `{"account":"alice","card":"tok_visa","amount":7}`

// auditOf asks a bank for its audit.
func auditOf(t *testing.T, client *http.Client, url string) (audit bank.Audit) {
	t.Helper()
	response, err := client.Get(url + "/v1/audit")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if err := json.NewDecoder(response.Body).Decode(&audit); err != nil {
		t.Fatal(err)
	}
	return audit
}

// due ends the leases of open requests, as time would.
func due(t *testing.T, db *pgxpool.Pool) {
	t.Helper()
	if _, err := db.Exec(t.Context(), `UPDATE idempotency_open SET next_at = now()`); err != nil {
		t.Fatal(err)
	}
}

// paidOnce waits until nothing is open, and requires as many charges as postings.
func paidOnce(t *testing.T, url string, db *pgxpool.Pool, want int64) {
	t.Helper()
	client := newClient(t)
	var audit bank.Audit
	eventually(t, "nothing is open", func() bool {
		due(t, db)
		audit = auditOf(t, client, url)
		return audit.OpenOperations == 0
	})
	var topUps int64
	if err := db.QueryRow(t.Context(), `SELECT count(*) FROM topups`).Scan(&topUps); err != nil {
		t.Fatal(err)
	}
	if !audit.OK || audit.ParkedOperations != 0 || audit.Charges == nil || *audit.Charges != want || topUps != want {
		text, _ := json.Marshal(audit)
		t.Errorf("%d top-ups, and the audit says %s: want %d charges", topUps, text, want)
	}
}

// TestTopUpOfABankKilledAtEachPointIsPaidOnce: the bank is killed with -9 at each point of a top-up,
// and nobody retries. The bank that is started after it ends what was begun, with one charge and one
// posting. A retry gets the one answer.
func TestTopUpOfABankKilledAtEachPointIsPaidOnce(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "kills many banks")
	for _, point := range crashpoint.BankCalls() {
		t.Run(point, func(t *testing.T) {
			t.Parallel()
			database, psp := pgtest.Database(t), servePSP(t, "--addr", "127.0.0.1:0")
			first := point
			if point == crashpoint.TakeOver || point == crashpoint.CompleterBatch {
				first = crashpoint.BeforeSend // they need an open request
			}
			p := bankOn(t, first+":1", database, "--psp", psp.url)
			db := connect(t, database)
			if response, body, err := postTo(newClient(t), p.url+bank.TopUpsPath, crashKey, topUpBody); err == nil {
				t.Errorf("the client of a bank that was to die got an answer: %d %s", response.StatusCode, body)
			}
			p.diesAt(first)
			if point != first {
				due(t, db)
				p := bankOn(t, point+":1", database, "--psp", psp.url)
				p.diesAt(point)
			}
			again := bankOn(t, "", database, "--psp", psp.url)
			if point != crashpoint.IntentSent { // its COMMIT may still be on its way
				want := int64(1)
				if point == crashpoint.BeforeIntent {
					want = 0
				}
				paidOnce(t, again.url, db, want)
			}
			var outcomes []string
			var bodies []string
			for range 2 {
				eventually(t, "the retry has a final answer", func() bool {
					due(t, db)
					response, body, err := postTo(newClient(t), again.url+bank.TopUpsPath, crashKey, topUpBody)
					if err != nil {
						t.Fatal(err)
					}
					outcome := response.Header.Get("Idempotency-Status")
					if outcome == "unknown" || outcome == "in-progress" {
						return false
					}
					if response.StatusCode != http.StatusCreated {
						t.Errorf("the retry got %d %s %s", response.StatusCode, outcome, body)
					}
					outcomes, bodies = append(outcomes, outcome), append(bodies, string(body))
					return true
				})
			}
			if outcomes[1] != "replayed" || bodies[0] != bodies[1] {
				t.Errorf("the retries got %q %q", outcomes, bodies)
			}
			paidOnce(t, again.url, db, 1)
		})
	}
}
