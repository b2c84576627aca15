package live

import (
	"context"
	"fmt"
	"regexp"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
)

const (
	proofInterval = 500 * time.Millisecond
	proofTimeout  = 2 * time.Second
	// proofRest is the minimum pause after a proof, as a multiple of the time that the proof took.
	// So the page uses at most a fifth of one connection, however large the books are.
	proofRest   = 4
	ledgerLines = 12
)

// Proof is the evidence about the last storm's twins, from one REPEATABLE READ snapshot.
type Proof struct {
	AtMS     int64   `json:"at_ms"`
	TookMS   float64 `json:"took_ms"`
	InFlight bool    `json:"in_flight"` // the storm was running: the numbers may change
	// Why there is no newer proof. The other fields are then the last proof's.
	Error  string `json:"error,omitempty"`
	Run    string `json:"run,omitempty"` // empty if there are no twins yet
	Twins  []Twin `json:"twins,omitempty"`
	Ledger []Line `json:"ledger"` // newest first
	Alice  int64  `json:"alice"`
	Bob    int64  `json:"bob"`
}

// Twin is one payer and one payee, and all transfers between them. Money is in minor units.
type Twin struct {
	Side         Side   `json:"side"`
	Payer        string `json:"payer"`
	Payee        string `json:"payee"`
	Opening      int64  `json:"opening"` // of both accounts together
	PayerBalance int64  `json:"payer_balance"`
	PayeeBalance int64  `json:"payee_balance"`
	PayerOpening int64  `json:"payer_opening"` // its part of Opening; the rest is the payee's
	EntriesPayer int64  `json:"entries_payer"` // sum of its ledger entries
	EntriesPayee int64  `json:"entries_payee"`
	Payments     int64  `json:"payments"`   // distinct references: the payments ordered
	Transfers    int64  `json:"transfers"`  // the payments made
	Keys         int64  `json:"keys"`       // distinct keys of the transfers
	Doubles      int64  `json:"doubles"`    // transfers after the first with the same reference
	LostMoney    int64  `json:"lost_money"` // the sum of the doubles
	// Keyed transfers younger than the TTL, made by an attempt that is not the key's recorded one.
	Unrecorded int64 `json:"unrecorded"`

	Checks []Check `json:"checks"`
}

// Check is one line of the proof. OK reports that got and want are equal.
type Check struct {
	Name  string `json:"name"`
	Got   int64  `json:"got"`
	Want  int64  `json:"want"`
	Money bool   `json:"money,omitempty"`
	OK    bool   `json:"ok"`
}

// Line is an entry of the ledger.
type Line struct {
	ID        int64  `json:"id"`
	Account   string `json:"account"`
	Amount    int64  `json:"amount"`
	Reference string `json:"reference"`
	Double    bool   `json:"double,omitempty"` // a repeat of an earlier transfer
}

// The names of the checks. The page uses them too.
const (
	CheckBalances  = "balances"  // sum of balances = opening total
	CheckLedger    = "ledger"    // opening balance + ledger = balance, on both accounts
	CheckTransfers = "transfers" // transfers = distinct payments
	CheckAnswers   = "answers"   // one answer per key: only the recorded attempt's transfer
)

// judge fills in the checks.
func (t *Twin) judge() {
	check := func(name string, got, want int64, money bool) {
		t.Checks = append(t.Checks, Check{Name: name, Got: got, Want: want, Money: money, OK: got == want})
	}
	check(CheckBalances, t.PayerBalance+t.PayeeBalance, t.Opening, true)
	ledger := Check{Name: CheckLedger, Money: true,
		Got: t.Opening - t.PayerOpening + t.EntriesPayee, Want: t.PayeeBalance}
	ledger.OK = ledger.Got == ledger.Want && t.PayerOpening+t.EntriesPayer == t.PayerBalance
	t.Checks = append(t.Checks, ledger)
	check(CheckTransfers, t.Transfers, t.Payments, false)
	if t.Side == Protected {
		// As many keys as payments, as many transfers as keys, and every transfer is the recorded
		// attempt's.
		switch {
		case t.Keys != t.Payments:
			check(CheckAnswers, t.Keys, t.Payments, false)
		case t.Transfers != t.Keys:
			check(CheckAnswers, t.Transfers, t.Keys, false)
		default:
			check(CheckAnswers, t.Transfers-t.Unrecorded, t.Keys, false)
		}
	} else {
		// Each transfer was answered with its own id.
		check(CheckAnswers, t.Transfers, t.Payments, false)
	}
}

// twinName matches a twin's account id. The name of a run is its start time and the end of the
// ledger at that time. So ids sort by time, and a proof need not read older entries, even in
// another process.
var twinName = regexp.MustCompile(`^twin-([0-9a-f]{12}-[0-9a-f]{1,15})-(protected|unprotected)(-payee)?$`)

// selectTwins reads the accounts of the run in $1, or of the newest run if $1 is empty. Anyone may
// open accounts with similar names; the query must ignore those that are not twins.
const selectTwins = `
	WITH newest AS MATERIALIZED (
		SELECT left(id, length(substring(id FROM '^twin-[0-9a-f]+-[0-9a-f]+-'))) AS prefix FROM accounts
		WHERE $1 = '' AND id >= 'twin-' AND id < 'twin.' AND id ~ '^twin-[0-9a-f]{12}-[0-9a-f]{1,15}-(un)?protected$'
		ORDER BY id DESC LIMIT 1
	)
	SELECT id, balance, opening_balance FROM accounts
	WHERE id = ANY (SELECT COALESCE((SELECT prefix FROM newest), 'twin-' || $1 || '-') || name
		FROM unnest('{protected,protected-payee,unprotected,unprotected-payee}'::text[]) name)`

// selectMoves reads the payers' transfers by index, and their records by primary key.
const selectMoves = `
	WITH ` + bank.Cutoff + `,
	moves AS MATERIALIZED (
		SELECT from_account, amount, reference, scope, key, attempt_id, created_at,
			row_number() OVER (PARTITION BY from_account, reference ORDER BY id) AS nth
		FROM transfers WHERE from_account = ANY($2)
	)
	SELECT from_account, count(DISTINCT reference), count(*), count(DISTINCT (scope, key)) FILTER (WHERE key IS NOT NULL),
		count(*) FILTER (WHERE nth > 1), COALESCE(sum(amount) FILTER (WHERE nth > 1), 0)::bigint,
		count(*) FILTER (WHERE key IS NOT NULL AND created_at > (SELECT at FROM cutoff) AND NOT EXISTS (
			SELECT FROM idempotency_keys k WHERE k.scope = moves.scope AND k.key = moves.key AND k.attempt_id = moves.attempt_id))
	FROM moves GROUP BY from_account`

// selectEntries reads no entries before the run.
const selectEntries = `
	SELECT account, sum(amount)::bigint FROM entries WHERE id > $2 AND account = ANY($1) GROUP BY account`

const selectLedger = `
	SELECT e.id, e.account, e.amount, COALESCE(t.reference, ''), COALESCE(t.from_account = ANY($1) AND EXISTS (
		SELECT FROM transfers d WHERE d.from_account = t.from_account AND d.reference = t.reference AND d.id < t.id), false)
	FROM (SELECT id, account, amount, transfer_id FROM entries ORDER BY id DESC LIMIT $2) e
	LEFT JOIN transfers t ON t.id = e.transfer_id
	ORDER BY e.id DESC`

// prove reads a proof about the twins of the given run, or of the newest if run is empty.
func prove(ctx context.Context, pool *pgxpool.Pool, run string, ttl time.Duration) (*Proof, error) {
	started := time.Now()
	p := &Proof{}
	err := bank.Snapshot(ctx, pool, func(tx pgx.Tx) error {
		since, err := p.readTwins(ctx, tx, run)
		if err != nil {
			return fmt.Errorf("accounts: %w", err)
		}
		return p.readMoves(ctx, tx, since, ttl)
	})
	if err != nil {
		return nil, fmt.Errorf("prove: %w", err)
	}
	for i := range p.Twins {
		p.Twins[i].judge()
	}
	p.AtMS, p.TookMS = time.Now().UnixMilli(), float64(time.Since(started).Microseconds())/1000
	return p, nil
}

// readTwins reads the accounts, and returns the end of the ledger before the run.
func (p *Proof) readTwins(ctx context.Context, tx pgx.Tx, run string) (since int64, err error) {
	rows, err := tx.Query(ctx, selectTwins, run)
	if err != nil {
		return 0, err
	}
	bySide := map[Side]*Twin{}
	var id string
	var balance, opening int64
	_, err = pgx.ForEachRow(rows, []any{&id, &balance, &opening}, func() error {
		parts := twinName.FindStringSubmatch(id)
		if parts == nil {
			return nil
		}
		p.Run = parts[1]
		t := bySide[Side(parts[2])]
		if t == nil {
			t = &Twin{Side: Side(parts[2])}
			bySide[t.Side] = t
		}
		t.Opening += opening
		if parts[3] != "" {
			t.Payee, t.PayeeBalance = id, balance
		} else {
			t.Payer, t.PayerBalance, t.PayerOpening = id, balance, opening
		}
		return nil
	})
	if err != nil {
		return 0, err
	}
	for _, side := range sides {
		// Otherwise the storm is still opening them.
		if t := bySide[side]; t != nil && t.Payer != "" && t.Payee != "" {
			p.Twins = append(p.Twins, *t)
		}
	}
	if p.Run != "" {
		if since, err = endOfLedger(p.Run); err != nil {
			return 0, err
		}
	}
	return since, nil
}

// readMoves reads the twins' transfers and entries, the ledger's tail, and the balances of alice
// and bob, the accounts for payments by hand.
func (p *Proof) readMoves(ctx context.Context, tx pgx.Tx, since int64, ttl time.Duration) error {
	payers, accounts := []string{}, []string{}
	byPayer, entries := map[string]*Twin{}, map[string]*int64{}
	for i := range p.Twins {
		t := &p.Twins[i]
		payers, accounts = append(payers, t.Payer), append(accounts, t.Payer, t.Payee)
		byPayer[t.Payer], entries[t.Payer], entries[t.Payee] = t, &t.EntriesPayer, &t.EntriesPayee
	}
	var batch pgx.Batch
	batch.Queue(selectMoves, ttl/time.Microsecond, payers).Query(func(rows pgx.Rows) error {
		var payer string
		var m Twin
		_, err := pgx.ForEachRow(rows, []any{&payer, &m.Payments, &m.Transfers, &m.Keys, &m.Doubles, &m.LostMoney, &m.Unrecorded}, func() error {
			t := byPayer[payer]
			t.Payments, t.Transfers, t.Keys, t.Doubles, t.LostMoney, t.Unrecorded = m.Payments, m.Transfers, m.Keys, m.Doubles, m.LostMoney, m.Unrecorded
			return nil
		})
		return err
	})
	batch.Queue(selectEntries, accounts, since).Query(func(rows pgx.Rows) error {
		var account string
		var sum int64
		_, err := pgx.ForEachRow(rows, []any{&account, &sum}, func() error {
			*entries[account] = sum
			return nil
		})
		return err
	})
	batch.Queue(selectLedger, payers, ledgerLines).Query(func(rows pgx.Rows) (err error) {
		p.Ledger, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (l Line, err error) {
			err = row.Scan(&l.ID, &l.Account, &l.Amount, &l.Reference, &l.Double)
			return l, err
		})
		return err
	})
	batch.Queue(`SELECT (SELECT balance FROM accounts WHERE id = 'alice'), (SELECT balance FROM accounts WHERE id = 'bob')`).
		QueryRow(func(row pgx.Row) error { return row.Scan(&p.Alice, &p.Bob) })
	if err := tx.SendBatch(ctx, &batch).Close(); err != nil {
		return fmt.Errorf("read the books: %w", err)
	}
	return nil
}

// prover reads proofs while there are viewers: one at a time, at most two a second, for all
// viewers.
func (l *Live) prover(ctx context.Context) {
	l.hub.whileWatched(ctx, func() time.Duration {
		started := time.Now()
		l.proveOnce(ctx)
		return max(proofInterval, proofRest*time.Since(started))
	})
}

func (l *Live) proveOnce(ctx context.Context) {
	run, inFlight := "", false
	if s := l.board.current(); s != nil {
		run, inFlight = s.Run, s.State == StormRunning
	}
	timed, cancel := context.WithTimeout(ctx, proofTimeout)
	defer cancel()
	p, err := l.prove(timed, run)
	switch {
	case ctx.Err() != nil: // the bank is stopping
		return
	case err != nil:
		l.logger.WarnContext(ctx, "the page's proof was not read; it is tried again", "error", err)
		p = &Proof{}
		if last := l.board.lastProof(); last != nil {
			*p = *last
		}
		p.Error = "the database did not answer in time"
	}
	p.InFlight = inFlight
	l.board.prove(p)
}
