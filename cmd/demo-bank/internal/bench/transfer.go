package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/storage/postgres"
)

// The one transfer that all designs execute, in four forms: the same statements on the same tables,
// sent in different ways. The forms' own round trips: naive 6, batch 2, folded 2 including BEGIN
// and COMMIT, deferred 1.

// The statements of a transfer.
const (
	// NO KEY UPDATE in the order of the ids, so that transfers cannot deadlock.
	sqlLock       = `SELECT id, currency, balance FROM accounts WHERE id IN ($1, $2) ORDER BY id FOR NO KEY UPDATE`
	sqlTake       = `UPDATE accounts SET balance = balance - $2 WHERE id = $1`
	sqlGive       = `UPDATE accounts SET balance = balance + $2 WHERE id = $1`
	sqlTransfer   = `INSERT INTO transfers (id, from_account, to_account, amount, currency, reference) VALUES ($1, $2, $3, $4, $5, $6) RETURNING created_at`
	sqlTransferAt = `INSERT INTO transfers (id, from_account, to_account, amount, currency, reference, created_at) VALUES ($1, $2, $3, $4, $5, $6, $7)`
	sqlEntry      = `INSERT INTO entries (transfer_id, account, amount) VALUES ($1, $2, $3)`

	sqlGet = `SELECT id, from_account, to_account, amount, currency, reference, created_at FROM transfers WHERE id = $1`
)

// transfer is a transfer as clients see it.
type transfer struct {
	ID        string    `json:"id,omitempty"`
	From      string    `json:"from"`
	To        string    `json:"to"`
	Amount    int64     `json:"amount"`
	Currency  string    `json:"currency"`
	Reference string    `json:"reference"`
	CreatedAt time.Time `json:"created_at,omitzero"`
}

// answer is the answer to a transfer.
type answer struct {
	Status   int
	Location string
	Body     []byte
}

func (t *transfer) answer(id int64, createdAt time.Time) (*answer, error) {
	t.ID, t.CreatedAt = strconv.FormatInt(id, 10), createdAt.UTC()
	body, err := json.Marshal(t)
	return &answer{Status: http.StatusCreated, Location: "/v1/transfers/" + t.ID, Body: body}, err
}

func (a *answer) write(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json")
	if a.Location != "" {
		w.Header().Set("Location", a.Location)
	}
	w.WriteHeader(a.Status)
	_, _ = w.Write(a.Body) // a client that is gone needs no answer
}

// lastID is the last id of a transfer.
var lastID atomic.Int64

// nextID returns an id that no earlier process used: the first id of a process is the time, in
// nanoseconds.
func nextID() int64 {
	lastID.CompareAndSwap(0, time.Now().UnixNano())
	return lastID.Add(1)
}

const bodyBytesMax = 1 << 16

func readBody(r *http.Request) ([]byte, error) {
	return io.ReadAll(http.MaxBytesReader(nil, r.Body, bodyBytesMax))
}

var errInvalid = errors.New("transfer is not valid")

func decodeTransfer(body []byte) (*transfer, error) {
	var t transfer
	if err := json.Unmarshal(body, &t); err != nil {
		return nil, err
	}
	if t.From == "" || t.To == "" || t.From == t.To || t.Amount <= 0 {
		return nil, errInvalid
	}
	return &t, nil
}

// funds compares the two locked accounts with the transfer.
type funds struct {
	t      *transfer
	seen   int
	refuse error
}

var errFunds = errors.New("account is not there, has another currency or too little money")

func (f *funds) look(rows pgx.Rows) error {
	for rows.Next() {
		var id, currency string
		var balance int64
		if err := rows.Scan(&id, &currency, &balance); err != nil {
			return err
		}
		f.seen++
		if currency != f.t.Currency || id == f.t.From && balance < f.t.Amount {
			f.refuse = errFunds
		}
	}
	return rows.Err()
}

func (f *funds) err() error {
	if f.seen != 2 {
		return errFunds
	}
	return f.refuse
}

// form is a transfer in a transaction that the caller ends.
type form func(ctx context.Context, tx pgx.Tx, t *transfer) (*answer, error)

// naive sends the six statements one after another.
func naive(ctx context.Context, tx pgx.Tx, t *transfer) (*answer, error) {
	f := funds{t: t}
	rows, err := tx.Query(ctx, sqlLock, t.From, t.To)
	if err != nil {
		return nil, fmt.Errorf("lock accounts: %w", err)
	}
	err = f.look(rows)
	rows.Close()
	if err := errors.Join(err, f.err()); err != nil {
		return nil, fmt.Errorf("lock accounts: %w", err)
	}
	if _, err := tx.Exec(ctx, sqlTake, t.From, t.Amount); err != nil {
		return nil, fmt.Errorf("take: %w", err)
	}
	if _, err := tx.Exec(ctx, sqlGive, t.To, t.Amount); err != nil {
		return nil, fmt.Errorf("give: %w", err)
	}
	id := nextID()
	var createdAt time.Time
	if err := tx.QueryRow(ctx, sqlTransfer, id, t.From, t.To, t.Amount, t.Currency, t.Reference).Scan(&createdAt); err != nil {
		return nil, fmt.Errorf("insert the transfer: %w", err)
	}
	if _, err := tx.Exec(ctx, sqlEntry, id, t.From, -t.Amount); err != nil {
		return nil, fmt.Errorf("insert an entry: %w", err)
	}
	if _, err := tx.Exec(ctx, sqlEntry, id, t.To, t.Amount); err != nil {
		return nil, fmt.Errorf("insert an entry: %w", err)
	}
	return t.answer(id, createdAt)
}

// batch sends them in two batches: one to lock and read, one to write.
func batch(ctx context.Context, tx pgx.Tx, t *transfer) (*answer, error) {
	f := funds{t: t}
	var first, second pgx.Batch
	queueLook(&first, &f)
	if err := tx.SendBatch(ctx, &first).Close(); err != nil {
		return nil, fmt.Errorf("lock accounts: %w", err)
	}
	if err := f.err(); err != nil {
		return nil, err
	}
	id := nextID()
	var createdAt time.Time
	queueWrite(&second, t, id, &createdAt)
	if err := tx.SendBatch(ctx, &second).Close(); err != nil {
		return nil, fmt.Errorf("write the transfer: %w", err)
	}
	return t.answer(id, createdAt)
}

// deferred sends one batch to lock and read, and leaves the writes to the flush of the record. So
// the transfer's time is the service's.
func deferred(ctx context.Context, tx pgx.Tx, t *transfer) (*answer, error) {
	f := funds{t: t}
	var first pgx.Batch
	queueLook(&first, &f)
	if err := tx.SendBatch(ctx, &first).Close(); err != nil {
		return nil, fmt.Errorf("lock accounts: %w", err)
	}
	if err := f.err(); err != nil {
		return nil, err
	}
	id, createdAt := nextID(), time.Now().Truncate(time.Microsecond)
	if err := errors.Join(
		postgres.DeferExec(ctx, sqlTake, t.From, t.Amount),
		postgres.DeferExec(ctx, sqlGive, t.To, t.Amount),
		postgres.DeferExec(ctx, sqlTransferAt, id, t.From, t.To, t.Amount, t.Currency, t.Reference, createdAt),
		postgres.DeferExec(ctx, sqlEntry, id, t.From, -t.Amount),
		postgres.DeferExec(ctx, sqlEntry, id, t.To, t.Amount),
	); err != nil {
		return nil, fmt.Errorf("defer the transfer: %w", err)
	}
	return t.answer(id, createdAt)
}

// folded sends BEGIN with the first batch and COMMIT with the second. A transfer that fails is not
// committed, and the pool destroys its conn.
func folded(ctx context.Context, pool *pgxpool.Pool, t *transfer) (*answer, error) {
	conn, err := pool.Acquire(ctx)
	if err != nil {
		return nil, fmt.Errorf("acquire: %w", err)
	}
	defer conn.Release()
	f := funds{t: t}
	var first, second pgx.Batch
	first.Queue("BEGIN")
	queueLook(&first, &f)
	if err := conn.SendBatch(ctx, &first).Close(); err != nil {
		return nil, fmt.Errorf("lock accounts: %w", err)
	}
	if err := f.err(); err != nil {
		return nil, err
	}
	id := nextID()
	var createdAt time.Time
	queueWrite(&second, t, id, &createdAt)
	ended := ""
	second.Queue("COMMIT").Exec(func(tag pgconn.CommandTag) error {
		ended = tag.String()
		return nil
	})
	if err := conn.SendBatch(ctx, &second).Close(); err != nil {
		return nil, fmt.Errorf("write the transfer: %w", err)
	}
	if ended != "COMMIT" {
		return nil, errors.New("COMMIT was answered with " + ended)
	}
	return t.answer(id, createdAt)
}

func queueLook(b *pgx.Batch, f *funds) { b.Queue(sqlLock, f.t.From, f.t.To).Query(f.look) }

func queueWrite(b *pgx.Batch, t *transfer, id int64, createdAt *time.Time) {
	b.Queue(sqlTake, t.From, t.Amount)
	b.Queue(sqlGive, t.To, t.Amount)
	b.Queue(sqlTransfer, id, t.From, t.To, t.Amount, t.Currency, t.Reference).
		QueryRow(func(row pgx.Row) error { return row.Scan(createdAt) })
	b.Queue(sqlEntry, id, t.From, -t.Amount)
	b.Queue(sqlEntry, id, t.To, t.Amount)
}

// committed runs a form in a transaction of its own: BEGIN, the form, COMMIT.
func committed(ctx context.Context, pool *pgxpool.Pool, run func(pgx.Tx) (*answer, error)) (*answer, error) {
	tx, err := pool.Begin(ctx)
	if err != nil {
		return nil, fmt.Errorf("begin: %w", err)
	}
	defer func() { _ = tx.Rollback(ctx) }() // after a commit there is nothing to undo
	a, err := run(tx)
	if err != nil {
		return nil, err
	}
	if err := tx.Commit(ctx); err != nil {
		return nil, fmt.Errorf("commit: %w", err)
	}
	return a, nil
}

// get reads a transfer by its id.
func get(ctx context.Context, db interface {
	QueryRow(context.Context, string, ...any) pgx.Row
}, text string) (*answer, error) {
	id, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		return nil, err
	}
	var t transfer
	var createdAt time.Time
	if err := db.QueryRow(ctx, sqlGet, id).Scan(&id, &t.From, &t.To, &t.Amount, &t.Currency, &t.Reference, &createdAt); err != nil {
		return nil, fmt.Errorf("read the transfer: %w", err)
	}
	a, err := t.answer(id, createdAt)
	if a != nil {
		a.Status, a.Location = http.StatusOK, ""
	}
	return a, err
}
