package sqldb

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/stdlib"

	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/internal/sealed"
)

// connector makes connections that exist only in this process.
type connector struct {
	store   *postgres.Store
	outside driver.Connector // to the pool; nil if calls outside of handlers are refused

	executed texts // ran before
	queried  texts // ran before; sealed.Alone unless decode gets the same values in the formats that pgx chooses
}

func (c *connector) Connect(context.Context) (driver.Conn, error) { return &conn{connector: c}, nil }

func (c *connector) Driver() driver.Driver { return namelessDriver{} }

// namelessDriver is the driver of a *sql.DB that has no address.
type namelessDriver struct{}

func (namelessDriver) Open(string) (driver.Conn, error) {
	return nil, errors.New("idempotency/sqldb: a connection has no address: use sqldb.Open")
}

// Limits of the SQL texts that are remembered.
const (
	textsMax     = 1024 // maximum size of texts, which is emptied before it would get larger
	textBytesMax = 4096 // a longer text goes alone each time
)

// texts remembers SQL texts that may travel together with SAVEPOINT. It is safe for concurrent use.
type texts struct {
	mu    sync.RWMutex
	known map[string]*sealed.Ran
}

// get returns the Ran of a text, sealed.Alone for one that is too long to be remembered, and nil
// for any other that is not remembered.
func (t *texts) get(text string) *sealed.Ran {
	if len(text) > textBytesMax {
		return sealed.Alone
	}
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.known[text]
}

func (t *texts) add(text string, ran *sealed.Ran) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.known == nil || len(t.known) >= textsMax {
		t.known = map[string]*sealed.Ran{}
	}
	t.known[strings.Clone(text)] = ran
}

// conn is a connection of database/sql. Each call finds its transaction by its context. So conn
// only keeps the open sql.Tx, and the connection of the pool that a call outside of handlers has
// taken.
type conn struct {
	connector *connector
	tx        *sealed.Tx   // of the open sql.Tx
	outside   *stdlib.Conn // taken by a call outside of handlers; given back by Close
	outsideTx bool         // a sql.Tx is open on it
}

var (
	_ driver.Conn               = (*conn)(nil)
	_ driver.ConnBeginTx        = (*conn)(nil)
	_ driver.ConnPrepareContext = (*conn)(nil)
	_ driver.ExecerContext      = (*conn)(nil)
	_ driver.QueryerContext     = (*conn)(nil)
	_ driver.NamedValueChecker  = (*conn)(nil)
	_ driver.Pinger             = (*conn)(nil)
	_ driver.SessionResetter    = (*conn)(nil)
	_ driver.Validator          = (*conn)(nil)
)

// route returns the transaction for a call with this context, or a connection of the pool.
func (c *conn) route(ctx context.Context) (*sealed.Tx, *stdlib.Conn, error) {
	tx := sealed.From(ctx)
	switch {
	case tx != nil && !tx.OnPool(c.connector.store.Pool()):
		return nil, nil, fmt.Errorf("%w: the handler's transaction is in another store's database", ErrTransactionMissing)
	case c.tx != nil:
		if tx != nil && !tx.Same(c.tx) {
			return nil, nil, fmt.Errorf("%w: the sql.Tx belongs to another handler, or to another phase", postgres.ErrSealed)
		}
		return c.tx, nil, nil
	case tx != nil && c.outsideTx:
		return nil, nil, fmt.Errorf("%w: the sql.Tx began outside of the handler, with another context: its writes would be committed apart", postgres.ErrPoolRefused)
	case tx != nil:
		return tx, nil, nil
	case c.outside != nil:
		return nil, c.outside, nil
	case c.connector.outside == nil:
		return nil, nil, ErrTransactionMissing
	}
	outside, err := c.connector.outside.Connect(ctx)
	if err != nil {
		return nil, nil, err
	}
	c.outside = outside.(*stdlib.Conn)
	return nil, c.outside, nil
}

func (c *conn) ExecContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Result, error) {
	tx, outside, err := c.route(ctx)
	switch {
	case err != nil:
		return nil, err
	case outside != nil:
		return outside.ExecContext(ctx, query, args)
	}
	if savepoint, ok := sealed.ParseSavepoint(query); ok {
		return driver.RowsAffected(0), tx.Do(ctx, savepoint)
	}
	before := c.connector.executed.get(query)
	tag, ran, err := tx.Run(ctx, before, query, values(args))
	if err != nil {
		return nil, err
	}
	if before == nil && ran != nil {
		c.connector.executed.add(query, ran)
	}
	return driver.RowsAffected(tag.RowsAffected()), nil
}

func (c *conn) QueryContext(ctx context.Context, query string, args []driver.NamedValue) (driver.Rows, error) {
	tx, outside, err := c.route(ctx)
	switch {
	case err != nil:
		return nil, err
	case outside != nil:
		return outside.QueryContext(ctx, query, args)
	}
	before := c.connector.queried.get(query)
	sealedRows, ran, err := tx.Rows(ctx, before, query, formats, values(args))
	if err != nil {
		return nil, err
	}
	r := &rows{rows: sealedRows}
	// An error may still come with the first row, and until then the columns may be unknown.
	r.ahead, err = sealedRows.Read(r.decode)
	if err != nil {
		sealedRows.Close()
		return nil, err
	}
	r.read = true
	if !r.ahead { // the connection is free for other statements, which reuse the descriptions
		r.fields = slices.Clone(sealedRows.FieldDescriptions())
	}
	if before == nil && ran != nil {
		if !r.anyFormat() {
			ran = sealed.Alone
		}
		c.connector.queried.add(query, ran)
	}
	return r, nil
}

// values returns the arguments as the caller passed them: CheckNamedValue converts none, because
// pgx encodes driver.Valuer, slices and more by itself.
func values(args []driver.NamedValue) []any {
	if len(args) == 0 {
		return nil
	}
	values := make([]any, len(args))
	for i, arg := range args {
		values[i] = arg.Value
	}
	return values
}

func (c *conn) CheckNamedValue(value *driver.NamedValue) error {
	if _, ok := value.Value.(sql.Out); ok || value.Name != "" {
		return errors.New("idempotency/sqldb: PostgreSQL has neither named nor output parameters: use $1, $2 and so on, and RETURNING")
	}
	return nil
}

// PrepareContext sends nothing: pgx prepares each statement once on each connection.
func (c *conn) PrepareContext(_ context.Context, query string) (driver.Stmt, error) {
	return &statement{conn: c, query: query}, nil
}

func (c *conn) Prepare(query string) (driver.Stmt, error) {
	return c.PrepareContext(context.Background(), query)
}

func (c *conn) BeginTx(ctx context.Context, opts driver.TxOptions) (driver.Tx, error) {
	tx, outside, err := c.route(ctx)
	switch {
	case err != nil:
		return nil, err
	case c.tx != nil || c.outsideTx:
		return nil, fmt.Errorf("%w: a sql.Tx is open on this connection", postgres.ErrBusy)
	case outside != nil:
		began, err := outside.BeginTx(ctx, opts)
		if err != nil {
			return nil, err
		}
		c.outsideTx = true
		return &outsideTx{began, c}, nil
	case opts.ReadOnly:
		return nil, errors.New("idempotency/sqldb: a handler's transaction is not read-only: leave sql.TxOptions.ReadOnly unset")
	}
	nested, err := tx.BeginExclusive(ctx)
	if err != nil {
		return nil, err
	}
	if level := sql.IsolationLevel(opts.Isolation); strength(level) > strengthOf(nested.Isolation()) {
		_ = nested.Rollback(ctx) // it sends nothing
		return nil, fmt.Errorf("idempotency/sqldb: a handler's transaction is %s, and can't become %s: leave sql.TxOptions.Isolation unset, or set Options.Isolation of the store", nested.Isolation(), level)
	}
	c.tx = nested
	return &nestedTx{conn: c, ctx: ctx}, nil
}

func (c *conn) Begin() (driver.Tx, error) {
	return c.BeginTx(context.Background(), driver.TxOptions{})
}

// strength orders the isolation levels. It returns 3 for those that PostgreSQL does not have.
func strength(level sql.IsolationLevel) int {
	switch level {
	case sql.LevelDefault, sql.LevelReadUncommitted, sql.LevelReadCommitted:
		return 0
	case sql.LevelRepeatableRead, sql.LevelSnapshot:
		return 1
	case sql.LevelSerializable:
		return 2
	}
	return 3
}

func strengthOf(level pgx.TxIsoLevel) int {
	switch level {
	case pgx.Serializable:
		return 2
	case pgx.RepeatableRead:
		return 1
	}
	return 0
}

// Ping pings the database, through the transaction of a handler, or else through the pool.
func (c *conn) Ping(ctx context.Context) error {
	if sealed.From(ctx) == nil && c.tx == nil {
		return c.connector.store.Pool().Ping(ctx)
	}
	_, err := c.ExecContext(ctx, "SELECT", nil)
	return err
}

// ResetSession implements [driver.SessionResetter]. Because of it and IsValid, database/sql uses a
// connection again after the context of its sql.Tx has ended.
func (c *conn) ResetSession(context.Context) error { return nil }

// IsValid implements [driver.Validator]. If it reports false database/sql calls Close, which gives
// a connection of the pool back.
func (c *conn) IsValid() bool { return c.outside == nil && c.tx == nil }

func (c *conn) Close() error {
	if c.outside == nil {
		return nil
	}
	return c.outside.Close()
}

// nestedTx is a sql.Tx in a handler: a savepoint.
type nestedTx struct {
	conn *conn
	ctx  context.Context
}

func (t *nestedTx) Commit() error { return t.end((*sealed.Tx).Commit) }

// Rollback may be called by database/sql, at any time after the context has ended.
func (t *nestedTx) Rollback() error {
	if t.ctx.Err() != nil {
		return t.end((*sealed.Tx).RollbackLate)
	}
	return t.end((*sealed.Tx).Rollback)
}

// endTimeout bounds Commit and Rollback of a sql.Tx. Its own context may have ended by then.
const endTimeout = 2 * time.Second

func (t *nestedTx) end(end func(*sealed.Tx, context.Context) error) error {
	tx := t.conn.tx
	t.conn.tx = nil
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.ctx), endTimeout)
	defer cancel()
	return end(tx, ctx)
}

// outsideTx is a sql.Tx on a connection of the pool.
type outsideTx struct {
	driver.Tx
	conn *conn
}

func (t *outsideTx) Commit() error {
	t.conn.outsideTx = false
	return t.Tx.Commit()
}

func (t *outsideTx) Rollback() error {
	t.conn.outsideTx = false
	return t.Tx.Rollback()
}

// statement is a prepared statement: only its text.
type statement struct {
	conn  *conn
	query string
}

var (
	_ driver.StmtExecContext   = (*statement)(nil)
	_ driver.StmtQueryContext  = (*statement)(nil)
	_ driver.NamedValueChecker = (*statement)(nil)
)

func (s *statement) Close() error  { return nil }
func (s *statement) NumInput() int { return -1 } // the server counts them

func (s *statement) CheckNamedValue(value *driver.NamedValue) error {
	return s.conn.CheckNamedValue(value)
}

func (s *statement) ExecContext(ctx context.Context, args []driver.NamedValue) (driver.Result, error) {
	return s.conn.ExecContext(ctx, s.query, args)
}

func (s *statement) QueryContext(ctx context.Context, args []driver.NamedValue) (driver.Rows, error) {
	return s.conn.QueryContext(ctx, s.query, args)
}

// The interface requires Exec and Query, but database/sql calls the methods with a context.
func (s *statement) Exec([]driver.Value) (driver.Result, error) { return nil, ErrTransactionMissing }
func (s *statement) Query([]driver.Value) (driver.Rows, error)  { return nil, ErrTransactionMissing }
