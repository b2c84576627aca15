package postgres

import (
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
)

// usage is how results use their transaction: each step begins and ends a use of it.
type usage interface {
	use() error
	done(err error)
}

// heldUsage is the usage of a batch's callbacks. They run while the transaction is in use already.
type heldUsage struct{ *transaction }

func (h heldUsage) use() error     { return nil }
func (h heldUsage) done(err error) { h.remember(err) }

// sealedRows are the rows of a sealed transaction: each step is a use of it, and its error is remembered.
type sealedRows struct {
	pgx.Rows
	tx usage
}

func (r *sealedRows) Next() bool {
	if r.tx.use() != nil {
		return false
	}
	more := r.Rows.Next()
	r.done(more)
	return more
}

func (r *sealedRows) Close() {
	if r.tx.use() != nil {
		return
	}
	r.Rows.Close()
	r.done(false)
}

// done ends a use. Until the rows are closed their error may still come.
func (r *sealedRows) done(more bool) {
	if more {
		r.tx.done(nil)
		return
	}
	r.tx.done(r.Rows.Err())
}

func (r *sealedRows) Err() error {
	if err := r.tx.use(); err != nil {
		return err
	}
	err := r.Rows.Err()
	r.tx.done(err)
	return err
}

func (r *sealedRows) Scan(dest ...any) error {
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

func (r *sealedRows) Values() ([]any, error) {
	if err := r.tx.use(); err != nil {
		return nil, err
	}
	values, err := r.Rows.Values()
	r.tx.done(err)
	return values, err
}

// Conn returns nil: see [Tx].
func (r *sealedRows) Conn() *pgx.Conn { return nil }

// sealedRow is the first of some rows.
type sealedRow struct {
	rows pgx.Rows
	own  sealedRows // what rows is, where something was sent
}

func (r *sealedRow) Scan(dest ...any) error {
	defer r.rows.Close()
	if err := r.rows.Err(); err != nil {
		return err
	}
	if !r.rows.Next() {
		if err := r.rows.Err(); err != nil {
			return err
		}
		return pgx.ErrNoRows
	}
	if err := r.rows.Scan(dest...); err != nil {
		return err
	}
	r.rows.Close()
	return r.rows.Err()
}

// sealedBatch are the results of a batch in a sealed transaction.
type sealedBatch struct {
	pgx.BatchResults
	tx usage
}

func (b *sealedBatch) Exec() (tag pgconn.CommandTag, err error) {
	if err := b.tx.use(); err != nil {
		return tag, err
	}
	tag, err = b.BatchResults.Exec()
	b.tx.done(err)
	return tag, err
}

func (b *sealedBatch) Query() (pgx.Rows, error) { return b.query(new(sealedRows)) }

func (b *sealedBatch) query(into *sealedRows) (pgx.Rows, error) {
	if err := b.tx.use(); err != nil {
		return failedRows{err}, err
	}
	rows, err := b.BatchResults.Query()
	b.tx.done(err)
	*into = sealedRows{Rows: rows, tx: b.tx}
	return into, err
}

func (b *sealedBatch) QueryRow() pgx.Row {
	row := new(sealedRow)
	row.rows, _ = b.query(&row.own) // Scan reports the error
	return row
}

func (b *sealedBatch) Close() error {
	if err := b.tx.use(); err != nil {
		return err
	}
	var err error
	defer func() { b.tx.done(err) }() // a callback may panic
	err = b.BatchResults.Close()
	return err
}

// Tx returns nil: a batch that begins a transaction is refused.
func (b *sealedBatch) Tx() pgx.Tx { return nil }

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
func (b failedBatch) QueryRow() pgx.Row                { return &sealedRow{rows: failedRows(b)} }
func (b failedBatch) Close() error                     { return b.err }
func (b failedBatch) Tx() pgx.Tx                       { return nil }

var (
	_ pgx.Rows         = (*sealedRows)(nil)
	_ pgx.BatchResults = (*sealedBatch)(nil)
)
