package sealed

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// This file is the transaction as package sqldb uses it, for database/sql.

// Key is the key of a context's value for the handler's transaction: a *[Tx], or a [Lazy].
type Key struct{}

// Lazy is a transaction that its first use opens.
type Lazy interface{ Handle() *Tx }

// From returns the transaction of the handler that runs, or ran, with this context. It returns nil
// if there is none.
func From(ctx context.Context) *Tx {
	switch tx := ctx.Value(Key{}).(type) {
	case *Tx:
		return tx
	case Lazy:
		return tx.Handle()
	}
	return nil
}

// OnPool reports whether the transaction is on a connection of this pool. It also reports true if
// the transaction could not be opened: every use of it fails.
func (tx *Tx) OnPool(pool *pgxpool.Pool) bool { return tx.settings == nil || tx.settings.Pool == pool }

// Isolation returns the level of the transaction.
func (tx *Tx) Isolation() pgx.TxIsoLevel { return tx.settings.Isolation }

// Same reports whether two handles belong to one transaction.
func (tx *Tx) Same(other *Tx) bool { return tx.transaction == other.transaction }

// BeginExclusive opens a savepoint like Begin. Until the savepoint ends, the methods of this file
// return [ErrBusy] on all other handles: with another driver, database/sql would use another
// connection for them, outside of the nested transaction.
func (tx *Tx) BeginExclusive(ctx context.Context) (_ *Tx, err error) {
	if err := tx.useSQL(); err != nil {
		return nil, err
	}
	defer func() { tx.done(err) }()
	if err := tx.ready(ctx); err != nil {
		return nil, err
	}
	return tx.push(savepoint{exclusive: true}), nil
}

// RollbackLate is Rollback at a time that the handler did not choose. It refuses if a handle from
// outside was used since the savepoint was opened, because it might undo what the handler did after
// it was done with the savepoint. Then the savepoint stays open, which fails the handler.
func (tx *Tx) RollbackLate(ctx context.Context) (err error) {
	if err := tx.use(); err != nil {
		return err
	}
	defer func() { tx.done(err) }()
	if tx.savepoints[tx.depth()].shared {
		return fmt.Errorf("%w: the context of a sql.Tx has ended, but other calls of the handler are part of it", ErrBusy)
	}
	return tx.undo(ctx)
}

// useSQL is like use, but returns ErrBusy while another handle is exclusive or rows are open.
func (tx *Tx) useSQL() error {
	if err := tx.enter(); err != nil {
		return err
	}
	exclusive := 0
	for _, s := range tx.savepoints {
		if s.exclusive {
			exclusive = s.number
		}
	}
	switch {
	case exclusive != tx.savepoint:
		tx.give()
		return fmt.Errorf("%w: a sql.Tx is open in this handler: use it, or end it first", ErrBusy)
	case tx.conn.PgConn().IsBusy() && !tx.conn.IsClosed():
		tx.give()
		return fmt.Errorf("%w: rows are open in this handler: read them to the end or close them first", ErrBusy)
	}
	return nil
}

// Rows are the rows of a query.
type Rows = handlerRows

// Ran states that a statement has run before in this process, and has the types of its parameters.
// With it Run and Rows can send the statement together with unsent statements. Otherwise a text
// that can't be prepared would fail the transaction before its savepoint, and pgx would close the
// connection if an argument in a batch can't be encoded.
type Ran struct {
	parameters []uint32
	alone      bool
}

// Alone is the Ran of a statement that must not be sent together with others.
var Alone = &Ran{alone: true}

// Run runs a statement and returns its tag. before is the Ran that an earlier run of the text
// returned, or nil. ran is the one for later runs, or nil if this run does not tell.
func (tx *Tx) Run(ctx context.Context, before *Ran, sql string, arguments []any) (tag pgconn.CommandTag, ran *Ran, err error) {
	if err := tx.useSQL(); err != nil {
		return tag, nil, err
	}
	defer func() { tx.done(err) }()
	if arguments, err = tx.admit(sql, arguments); err != nil {
		return tag, nil, err
	}
	if before != nil && tx.canBatch(before, arguments) {
		results, err := tx.sendBehind(ctx, sql, arguments)
		if err != nil {
			return tag, nil, err
		}
		tag, err = results.Exec()
		return tag, before, closeBehind(results, err)
	}
	if ran, err = tx.flushFor(ctx, before, sql, arguments); err != nil {
		return tag, nil, err
	}
	tag, err = tx.run(ctx, sql, arguments)
	return tag, ran, err
}

// Rows runs a query; see Run for before and ran. Its columns have the given formats. Only if it is
// sent together with unsent statements, pgx chooses the formats.
func (tx *Tx) Rows(ctx context.Context, before *Ran, sql string, formats pgx.QueryResultFormatsByOID, arguments []any) (_ *Rows, ran *Ran, err error) {
	if err := tx.useSQL(); err != nil {
		return nil, nil, err
	}
	defer func() { tx.done(err) }()
	if arguments, err = tx.admit(sql, arguments); err != nil {
		return nil, nil, err
	}
	if before != nil && tx.canBatch(before, arguments) {
		results, err := tx.sendBehind(ctx, sql, arguments)
		if err != nil {
			return nil, nil, err
		}
		rows, err := results.Query()
		if err != nil {
			return nil, nil, closeBehind(results, err)
		}
		return &handlerRows{Rows: &behindRows{Rows: rows, results: results}, tx: tx.transaction}, before, nil
	}
	if ran, err = tx.flushFor(ctx, before, sql, arguments); err != nil {
		return nil, nil, err
	}
	arguments = append([]any{formats}, arguments...)
	rows, err := tx.conn.Query(ctx, sql, tx.extended(arguments, false)...)
	if err != nil {
		return nil, nil, err
	}
	return &handlerRows{Rows: rows, tx: tx.transaction}, ran, nil
}

// describes reports whether pgx encodes arguments for the types that the server describes. In the
// other modes it needs no types, and encodes before it sends anything.
func (tx *Tx) describes() bool {
	switch tx.settings.Mode {
	case pgx.QueryExecModeCacheStatement, pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeDescribeExec:
		return true
	}
	return false
}

// flushFor is flush in front of a statement. It returns the statement's Ran, which counts once the
// statement has run. If there were unsent statements and there are arguments, it asks the server for
// the types of the parameters: a round trip, once for each text.
func (tx *Tx) flushFor(ctx context.Context, before *Ran, sql string, arguments []any) (*Ran, error) {
	unsent := len(tx.unsent) > 0
	if err := tx.flush(ctx); err != nil {
		return nil, err
	}
	switch {
	case before != nil:
		return before, nil
	case len(arguments) == 0 || !tx.describes():
		return new(Ran), nil
	case !unsent || hasOption(arguments):
		return nil, nil
	}
	description, err := tx.conn.PgConn().Prepare(ctx, "", sql, nil)
	if err != nil {
		return nil, err
	}
	return &Ran{parameters: description.ParamOIDs}, nil
}

// hasOption reports whether an option of pgx is in front of the arguments.
func hasOption(arguments []any) bool {
	if len(arguments) == 0 {
		return false
	}
	switch arguments[0].(type) {
	case pgx.QueryExecMode, pgx.QueryResultFormats, pgx.QueryResultFormatsByOID, pgx.QueryRewriter:
		return true
	}
	return false
}

// canBatch reports whether there are unsent statements, and a statement with these arguments can be
// sent behind them in one batch.
func (tx *Tx) canBatch(before *Ran, arguments []any) bool {
	// The simple protocol would send them as one string.
	if len(tx.unsent) == 0 || before.alone || hasOption(arguments) || tx.settings.Mode == pgx.QueryExecModeSimpleProtocol || tx.conn.PgConn().TxStatus() != 'T' {
		return false
	}
	if !tx.describes() {
		return true
	}
	var encoded pgx.ExtendedQueryBuilder
	return encoded.Build(tx.conn.TypeMap(), &pgconn.StatementDescription{ParamOIDs: before.parameters}, arguments) == nil
}

// sendBehind sends the unsent statements and this one in one round trip.
func (tx *Tx) sendBehind(ctx context.Context, sql string, arguments []any) (pgx.BatchResults, error) {
	var batch pgx.Batch
	for _, text := range tx.unsent {
		batch.Queue(text)
	}
	batch.Queue(sql, arguments...)
	results := tx.conn.SendBatch(ctx, &batch)
	for len(tx.unsent) > 0 {
		if _, err := results.Exec(); err != nil {
			err = closeBehind(results, err)
			if pgErr := (*pgconn.PgError)(nil); errors.As(err, &pgErr) { // preparing the statement failed
				err = pgErr
			}
			return nil, err
		}
		tx.sent(1)
	}
	return results, nil
}

// closeBehind closes the results of a batch. It returns err, or if that is nil the error of
// closing. It does not wrap the error, because libraries compare its type.
func closeBehind(results pgx.BatchResults, err error) error {
	if closed := results.Close(); err == nil {
		return closed
	}
	return err
}

// behindRows are the rows of the last statement of a batch. Their end closes the batch.
type behindRows struct {
	pgx.Rows
	results pgx.BatchResults
	err     error // of closing the batch
}

func (r *behindRows) Next() bool {
	more := r.Rows.Next()
	if !more {
		r.Close()
	}
	return more
}

func (r *behindRows) Close() {
	r.Rows.Close()
	if r.results != nil {
		r.err = closeBehind(r.results, r.Rows.Err())
		r.results = nil
	}
}

func (r *behindRows) Err() error { return cmp.Or(r.err, r.Rows.Err()) }

// Read goes to the next row, calls read with its values, and reports whether there was a row. The
// values are in the connection's buffer: read must not keep them.
func (r *handlerRows) Read(read func(values [][]byte) error) (more bool, err error) {
	if err := r.tx.use(); err != nil {
		return false, err
	}
	defer func() { r.tx.done(err) }()
	if more = r.Rows.Next(); !more {
		return false, r.Rows.Err()
	}
	return true, read(r.Rows.RawValues())
}

// Savepoint is a statement about a savepoint.
type Savepoint struct {
	Verb string // SAVEPOINT, RELEASE or ROLLBACK
	Name string
}

// ParseSavepoint returns the statement if the SQL text is one SAVEPOINT, RELEASE or ROLLBACK TO,
// and nothing else. Otherwise ok is false.
func ParseSavepoint(sql string) (sp Savepoint, ok bool) {
	s := &scanner{rest: sql}
	keyword := func(words ...string) bool {
		s.skip()
		before := s.rest
		word := s.word()
		for _, w := range words {
			if strings.EqualFold(word, w) {
				return true
			}
		}
		s.rest = before
		return false
	}
	switch {
	case keyword("SAVEPOINT"):
		sp.Verb = "SAVEPOINT"
	case keyword("RELEASE"):
		sp.Verb = "RELEASE"
		keyword("SAVEPOINT")
	case keyword("ROLLBACK"):
		sp.Verb = "ROLLBACK"
		keyword("WORK", "TRANSACTION")
		if !keyword("TO") {
			return Savepoint{}, false
		}
		keyword("SAVEPOINT")
	default:
		return Savepoint{}, false
	}
	s.skip()
	before := s.rest
	if strings.HasPrefix(s.rest, `"`) {
		for strings.HasPrefix(s.rest, `"`) { // a doubled quote is an end and a new beginning
			s.quoted('"', false)
		}
		sp.Name = before[:len(before)-len(s.rest)]
	} else {
		sp.Name = strings.ToLower(s.word())
		if sp.Name != "" {
			sp.Name = `"` + sp.Name + `"`
		}
	}
	for s.skip(); strings.HasPrefix(s.rest, ";"); s.skip() {
		s.rest = s.rest[1:]
	}
	return sp, len(sp.Name) > 2 && s.rest == "" && !s.open
}

// Do executes a statement about a savepoint on the savepoints of the transaction. It finds only
// savepoints that SQL text has opened, and that are newer than the handle's own.
func (tx *Tx) Do(ctx context.Context, sp Savepoint) (err error) {
	if err := tx.useSQL(); err != nil {
		return err
	}
	defer func() { tx.done(err) }()
	if sp.Verb == "SAVEPOINT" {
		if err := tx.ready(ctx); err != nil {
			return err
		}
		tx.push(savepoint{name: sp.Name})
		return nil
	}
	own := -1
	if tx.savepoint != 0 {
		own = tx.depth()
	}
	for depth := len(tx.savepoints) - 1; depth > own; depth-- {
		if tx.savepoints[depth].name != sp.Name {
			continue
		}
		if sp.Verb == "ROLLBACK" {
			return tx.backTo(ctx, depth)
		}
		if err := tx.ready(ctx); err != nil {
			return err
		}
		tx.pop(depth)
		return nil
	}
	return fmt.Errorf("idempotency/postgres: there is no savepoint %s", sp.Name)
}
