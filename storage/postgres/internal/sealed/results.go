package sealed

import (
	"fmt"
	"sync"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
)

// usage is the use of a transaction by its results: each step begins and ends one.
type usage interface {
	use() error
	done(err error)
}

// heldUsage is the usage of steps that run while the transaction is in use already: a callback of a
// batch, or the scan of a row by a pgx.RowScanner. The callback may hand the results to another
// goroutine, so each step is one use of the heldUsage, and none begins after end.
type heldUsage struct {
	*transaction
	step sync.Mutex
	over bool // guarded by step
}

func (h *heldUsage) use() error {
	if !h.step.TryLock() {
		return ErrBusy
	}
	if h.over {
		h.step.Unlock()
		return fmt.Errorf("%w: the callback has returned", ErrSealed)
	}
	return nil
}

func (h *heldUsage) done(err error) {
	h.remember(err)
	h.step.Unlock()
}

// end waits for a step that another goroutine has begun.
func (h *heldUsage) end() {
	h.step.Lock()
	defer h.step.Unlock()
	h.over = true
}

// handlerRows are the rows of a sealed transaction. Each step is a use of it, and its error is
// remembered.
type handlerRows struct {
	pgx.Rows
	tx usage
}

func (r *handlerRows) Next() bool {
	if r.tx.use() != nil {
		return false
	}
	more := r.Rows.Next()
	r.done(more)
	return more
}

func (r *handlerRows) Close() {
	if r.tx.use() != nil {
		return
	}
	r.Rows.Close()
	r.done(false)
}

// done ends a use. Until the rows are closed their error may still come.
func (r *handlerRows) done(more bool) {
	if more {
		r.tx.done(nil)
		return
	}
	r.tx.done(r.Rows.Err())
}

func (r *handlerRows) Err() error {
	if err := r.tx.use(); err != nil {
		return err
	}
	err := r.Rows.Err()
	r.tx.done(err)
	return err
}

func (r *handlerRows) Scan(dest ...any) error {
	if len(dest) == 1 {
		if scanner, ok := dest[0].(pgx.RowScanner); ok { // it is given the rows: let it have these
			return scanner.ScanRow(r)
		}
	}
	if err := r.tx.use(); err != nil {
		return err
	}
	var err error
	defer func() { r.tx.done(err) }() // a Scanner may panic
	err = r.Rows.Scan(dest...)
	return err
}

func (r *handlerRows) Values() ([]any, error) {
	if err := r.tx.use(); err != nil {
		return nil, err
	}
	values, err := r.Rows.Values()
	r.tx.done(err)
	return values, err
}

// Conn returns nil, as [Tx.Conn] does.
func (r *handlerRows) Conn() *pgx.Conn { return nil }

// handlerRow is the first of some rows.
type handlerRow struct {
	rows pgx.Rows     // of a batch, or of a query that failed; else nil
	own  handlerRows  // of a query; tx is set while a pgx.RowScanner has them
	tx   *transaction // that is in use from the query until Scan
}

func (r *handlerRow) Scan(dest ...any) error {
	if r.rows != nil {
		return scanOne(r.rows, dest)
	}
	if !r.tx.row.CompareAndSwap(r, nil) {
		return fmt.Errorf("%w: the handler has returned, or the row was scanned before", ErrSealed)
	}
	defer func() { // even if a Scanner panics
		r.own.Rows.Close()
		r.tx.done(r.own.Rows.Err())
	}()
	if scansRows(dest) {
		held := &heldUsage{transaction: r.tx}
		defer held.end()
		r.own.tx = held
		return scanOne(&r.own, dest)
	}
	return scanOne(r.own.Rows, dest)
}

// scanOne scans the first row and closes the rows.
func scanOne(rows pgx.Rows, dest []any) error {
	defer rows.Close()
	if err := rows.Err(); err != nil {
		return err
	}
	if !rows.Next() {
		if err := rows.Err(); err != nil {
			return err
		}
		return pgx.ErrNoRows
	}
	if err := rows.Scan(dest...); err != nil {
		return err
	}
	rows.Close()
	return rows.Err()
}

// scansRows reports whether Scan hands the rows themselves to the destination, so that they must be
// sealed rows.
func scansRows(dest []any) bool {
	if len(dest) != 1 {
		return false
	}
	_, ok := dest[0].(pgx.RowScanner)
	return ok
}

// handlerBatch are the results of a batch in a sealed transaction.
type handlerBatch struct {
	pgx.BatchResults
	tx usage
}

func (b *handlerBatch) Exec() (tag pgconn.CommandTag, err error) {
	if err := b.tx.use(); err != nil {
		return tag, err
	}
	tag, err = b.BatchResults.Exec()
	b.tx.done(err)
	return tag, err
}

func (b *handlerBatch) Query() (pgx.Rows, error) { return b.query(new(handlerRows)) }

func (b *handlerBatch) query(into *handlerRows) (pgx.Rows, error) {
	if err := b.tx.use(); err != nil {
		return failedRows{err}, err
	}
	rows, err := b.BatchResults.Query()
	b.tx.done(err)
	*into = handlerRows{Rows: rows, tx: b.tx}
	return into, err
}

func (b *handlerBatch) QueryRow() pgx.Row {
	rows, _ := b.query(new(handlerRows)) // Scan reports the error
	return &handlerRow{rows: rows}
}

func (b *handlerBatch) Close() error {
	if err := b.tx.use(); err != nil {
		return err
	}
	var err error
	defer func() { b.tx.done(err) }() // a callback may panic
	err = b.BatchResults.Close()
	return err
}

// Tx returns nil: a batch that begins a transaction is refused.
func (b *handlerBatch) Tx() pgx.Tx { return nil }

// failedRows are the rows of a query that was not sent.
type failedRows struct{ err error }

func (r failedRows) Close()                                       {}
func (r failedRows) Err() error                                   { return r.err }
func (r failedRows) CommandTag() pgconn.CommandTag                { return pgconn.CommandTag{} }
func (r failedRows) FieldDescriptions() []pgconn.FieldDescription { return nil }
func (r failedRows) Next() bool                                   { return false }
func (r failedRows) Scan(...any) error                            { return r.err }
func (r failedRows) Values() ([]any, error)                       { return nil, r.err }
func (r failedRows) RawValues() [][]byte                          { return nil }
func (r failedRows) Conn() *pgx.Conn                              { return nil }
func (r failedRows) TypeMap() *pgtype.Map                         { return nil }

// failedBatch are the results of a batch that was not sent.
type failedBatch struct{ err error }

func (b failedBatch) Exec() (pgconn.CommandTag, error) { return pgconn.CommandTag{}, b.err }
func (b failedBatch) Query() (pgx.Rows, error)         { return failedRows(b), b.err }
func (b failedBatch) QueryRow() pgx.Row                { return &handlerRow{rows: failedRows(b)} }
func (b failedBatch) Close() error                     { return b.err }
func (b failedBatch) Tx() pgx.Tx                       { return nil }

var (
	_ pgx.Rows         = (*handlerRows)(nil)
	_ pgx.BatchResults = (*handlerBatch)(nil)
)
