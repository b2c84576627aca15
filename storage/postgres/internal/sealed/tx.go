// Package sealed is a pgx.Tx that a handler can't end: it refuses Commit and Rollback, SQL text
// that controls transactions, and everything once the handler has returned. It knows pgx, and
// nothing of keys and records.
package sealed

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// Errors of a handler that uses its transaction in a way that it must not.
var (
	ErrSealed = errors.New("idempotency/postgres: the transaction is sealed")
	ErrBusy   = errors.New("idempotency/postgres: the transaction is busy")
)

// transaction is the state that the handles of one transaction share: the connection, and its use
// by the handler.
//
// A handler may leave goroutines behind that still use it. So every use takes the one slot, and
// none begins once sealed is set. A use never waits for the slot, because callbacks run while it is
// taken.
type transaction struct {
	settings *Settings
	conn     *pgx.Conn
	handlers int // the number of handlers that may defer statements: 1 unless it is a batch
	sealed   atomic.Bool
	slot     sync.Mutex                 // taken while conn is in use; guards it and the fields below
	row      atomic.Pointer[handlerRow] // has taken the slot, and gives it back when it is scanned

	deferred atomic.Pointer[deferred] // nil until the handler defers a statement

	batch handlerBatch // used for the first batch: most handlers send one or two

	failure    error // the first error of the database that no savepoint undid
	savepoints []savepoint
	unsent     []string // SAVEPOINT and RELEASE, which go in front of the next statement
	sequence   int
	lost       bool // the transaction had ended after a use
	stalePlans bool // a table changed under a prepared statement
	abandoned  bool // a use went on past the seal: the connection is not ours any more
}

// savepoint is an open nested transaction.
type savepoint struct {
	number    int
	unsent    int    // index of its SAVEPOINT among the unsent statements; negative if it was sent
	name      string // that SQL text gave it; "" if Begin opened it
	exclusive bool   // see Tx.BeginExclusive
	shared    bool   // a handle from outside of it was used since
	failure   error  // of the transaction when it was opened: ROLLBACK TO restores it

	// Of the deferred statements and the messages when it was opened.
	deferred, messages, together int
	refused                      error
}

// Settings are shared by the transactions of a store, and do not change once the first of them has
// begun.
type Settings struct {
	Pool        *pgxpool.Pool
	Mode        pgx.QueryExecMode // the default of its connections
	Isolation   pgx.TxIsoLevel    // of the transactions
	DeferredMax int               // the maximum number of statements that a handler defers

	// Meaning returns the sentinel for an error of the deferred statement of this number, and the
	// error with its place added. stale means that it must be prepared once more.
	Meaning func(number int, stale bool, err *pgconn.PgError) (sentinel, explained error)

	texts texts
}

// Transaction is the store's side of a transaction. Its methods are not on [Tx], which handlers
// hold.
type Transaction struct{ transaction }

// Init makes t the open transaction of a connection.
func (t *Transaction) Init(settings *Settings, conn *pgx.Conn) {
	t.settings, t.conn, t.handlers = settings, conn, 1
}

// Share makes t the transaction of several handlers, one after another.
func (t *Transaction) Share(handlers int) { t.handlers = handlers }

// Handle returns the handler's handle.
func (t *Transaction) Handle() Tx { return Tx{transaction: &t.transaction} }

// End makes all further uses return [ErrSealed], even if Seal was not called.
func (t *Transaction) End() { t.sealed.Store(true) }

// Abandoned reports whether Seal gave up on a use that went on: the connection must not be touched.
func (t *Transaction) Abandoned() bool { return t.abandoned }

// StalePlans reports whether a table changed under a statement that is prepared on the connection.
func (t *Transaction) StalePlans() bool { return t.stalePlans }

// AbandonTimeout is the time that Seal waits for a use to end after it closed the socket.
const AbandonTimeout = time.Second

// State is the state of a transaction after the handler.
type State int

// The states. All but StateReady come with an error that has the details.
const (
	StateReady  State = iota // it can be committed
	StateLost                // the handler ended it: its writes may stand
	StateClosed              // its connection is closed
	StateFailed              // the error is the database's, and no savepoint undid it
	StateUnfit               // aborted, in use, or with something left open
)

// Seal ends the handler's use of the transaction and returns its state.
func (t *Transaction) Seal() (State, error) {
	t.sealed.Store(true)
	// If a row was never scanned, it holds the slot, but no goroutine does.
	if !t.take() && t.row.Swap(nil) == nil {
		return StateUnfit, t.interrupt()
	}
	defer t.give()
	return t.state()
}

// Check returns the state between two handlers of a batch: nothing that the first left open may
// reach the second.
func (t *Transaction) Check() (State, error) {
	if !t.take() {
		return StateUnfit, errors.New("the transaction is still in use")
	}
	defer t.give()
	return t.state()
}

func (t *transaction) state() (State, error) {
	conn := t.conn.PgConn()
	switch {
	case t.lost:
		// This comes first: writes that the handler committed stay, whatever happened to the
		// connection since.
		return StateLost, errors.New("the handler ended the transaction")
	case conn.IsClosed():
		return StateClosed, errors.Join(t.failure, errors.New("the connection is closed"))
	case conn.IsBusy():
		return StateUnfit, errors.New("rows, a batch or a copy were left open")
	case conn.TxStatus() == 'I':
		return StateLost, errors.New("no transaction is open")
	case t.failure != nil:
		return StateFailed, t.failure
	case conn.TxStatus() != 'T':
		return StateUnfit, errors.New("the transaction is aborted")
	case len(t.savepoints) > 0:
		return StateUnfit, errors.New("a nested transaction was left open: commit it or roll it back before the handler returns")
	}
	return StateReady, nil
}

// interrupt takes the connection from a goroutine that the handler left behind. It closes the
// socket.
func (t *transaction) interrupt() error {
	_ = t.conn.PgConn().Conn().Close() // a socket is safe for concurrent use; a connection is not
	taken := make(chan struct{})
	// The goroutine ends when the use does, and keeps the slot: nobody must use an abandoned
	// connection.
	go func() {
		t.slot.Lock()
		close(taken)
	}()
	select {
	case <-taken:
	case <-time.After(AbandonTimeout):
		t.abandoned = true // only the attempt's goroutine reads and writes it
		return errors.New("the transaction is still in use")
	}
	defer t.give()
	// The socket is closed already: this only marks the connection, and can't wait.
	_ = t.conn.Close(context.Background())
	return errors.New("the transaction was still in use")
}

// take takes the slot and reports whether it was free; give gives it back.
func (t *transaction) take() bool { return t.slot.TryLock() }

func (t *transaction) give() { t.slot.Unlock() }

// use begins one use of the connection; done ends it. In between no other goroutine touches the
// connection.
func (t *transaction) use() error {
	if t.sealed.Load() {
		return fmt.Errorf("%w: the handler has returned", ErrSealed)
	}
	if !t.take() {
		if t.sealed.Load() {
			return fmt.Errorf("%w: the handler has returned", ErrSealed)
		}
		return fmt.Errorf("%w: another goroutine uses it, or a callback of its own call: make one call at a time", ErrBusy)
	}
	if t.sealed.Load() {
		t.give()
		return fmt.Errorf("%w: the handler has returned", ErrSealed)
	}
	return nil
}

// done ends a use. It remembers the error if it is the database's, and whether the transaction has
// ended.
func (t *transaction) done(err error) {
	t.remember(err)
	if conn := t.conn.PgConn(); conn.TxStatus() == 'I' && !conn.IsBusy() {
		t.lost = true // even if another one begins at the next use
	}
	t.give()
}

func (t *transaction) remember(err error) {
	if err == nil {
		return
	}
	t.stalePlans = t.stalePlans || wire.StalePlan(err)
	if t.failure != nil {
		return
	}
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		t.failure = err
	}
}

// exec runs one of our statements on behalf of a handle.
func (t *transaction) exec(ctx context.Context, sql string) error {
	_, err := t.conn.Exec(ctx, sql)
	return err
}

// Tx is a handle on a transaction: the whole of it, or one of its savepoints.
type Tx struct {
	*transaction
	savepoint int // its number; 0 is the transaction itself
}

var _ pgx.Tx = (*Tx)(nil)

// Holds reports whether the handler still runs and its transaction is on a connection of this pool.
func (tx *Tx) Holds(pool *pgxpool.Pool) bool { return tx.settings.Pool == pool && !tx.sealed.Load() }

// use begins a use through this handle.
func (tx *Tx) use() error {
	if err := tx.enter(); err != nil {
		return err
	}
	for i := range tx.savepoints {
		s := &tx.savepoints[i]
		s.shared = s.shared || s.number > tx.savepoint
	}
	return nil
}

// enter is use without a note in the savepoints that were opened since the handle's own.
func (tx *Tx) enter() error {
	if err := tx.transaction.use(); err != nil {
		return err
	}
	if tx.savepoint != 0 && tx.depth() < 0 {
		tx.give()
		return pgx.ErrTxClosed
	}
	return nil
}

// depth returns the index of the handle's savepoint among the open ones, -1 if it is closed.
func (tx *Tx) depth() int {
	for i, s := range tx.savepoints {
		if s.number == tx.savepoint {
			return i
		}
	}
	return -1
}

// savepointName returns the name of the savepoint at a depth. The name is free: if an earlier
// savepoint had it, its RELEASE goes in front of the new SAVEPOINT.
func savepointName(depth int) string { return "idempotency_" + strconv.Itoa(depth+1) }

// flush sends the unsent statements about savepoints, in one message.
func (t *transaction) flush(ctx context.Context) error {
	if len(t.unsent) == 0 {
		return nil
	}
	if err := t.exec(ctx, strings.Join(t.unsent, "; ")); err != nil {
		return err
	}
	t.sent(len(t.unsent))
	return nil
}

// sent removes the first n unsent statements, which were executed.
func (t *transaction) sent(n int) {
	t.unsent = t.unsent[n:]
	for i := range t.savepoints {
		t.savepoints[i].unsent -= n
	}
}

// ready returns an error unless the next statement can be sent and executed.
func (t *transaction) ready(ctx context.Context) error {
	switch conn := t.conn.PgConn(); {
	case conn.IsClosed():
		return errors.New("idempotency/postgres: the connection is closed")
	case conn.IsBusy():
		return fmt.Errorf("%w: rows, a batch or a copy are open: read them to the end or close them first", ErrBusy)
	case conn.TxStatus() != 'T':
		return cmp.Or(t.exec(ctx, "SELECT"), errors.New("idempotency/postgres: no transaction is open"))
	}
	return ctx.Err()
}

// Begin opens a savepoint. SAVEPOINT is sent with, or in front of, the next statement.
func (tx *Tx) Begin(ctx context.Context) (_ pgx.Tx, err error) {
	if err := tx.use(); err != nil {
		return nil, err
	}
	defer func() { tx.done(err) }()
	if err := tx.ready(ctx); err != nil {
		return nil, err
	}
	return tx.push(savepoint{}), nil
}

func (tx *Tx) push(s savepoint) *Tx {
	tx.sequence++
	s.number, s.unsent, s.failure = tx.sequence, len(tx.unsent), tx.failure
	tx.deferred.Load().note(&s)
	tx.unsent = append(tx.unsent, "SAVEPOINT "+savepointName(len(tx.savepoints)))
	tx.savepoints = append(tx.savepoints, s)
	return &Tx{transaction: tx.transaction, savepoint: s.number}
}

// pop closes the savepoint at a depth, and those above it, and keeps their writes. RELEASE is sent
// in front of the next statement. Without one there is no need for it: COMMIT keeps the writes too.
func (t *transaction) pop(depth int) {
	if at := t.savepoints[depth].unsent; at >= 0 {
		t.unsent = t.unsent[:at]
	} else { // the unsent statements belong to savepoints above it
		t.unsent = append(t.unsent[:0], "RELEASE SAVEPOINT "+savepointName(depth))
	}
	t.savepoints = t.savepoints[:depth]
}

// errUnsent means that a statement could not be prepared, which was done in front of its SAVEPOINT.
var errUnsent = errors.New("idempotency/postgres: the transaction failed before its savepoint was sent")

// backTo undoes everything since the savepoint at a depth was opened, and leaves it open.
func (t *transaction) backTo(ctx context.Context, depth int) error {
	s := &t.savepoints[depth]
	switch {
	case s.unsent < 0:
		// A message of its own: in its error recovery the server treats several statements in one
		// string as one.
		if err := t.exec(ctx, "ROLLBACK TO SAVEPOINT "+savepointName(depth)); err != nil {
			return err
		}
		t.unsent = t.unsent[:0]
	case t.conn.PgConn().TxStatus() != 'T':
		return errUnsent
	default:
		t.unsent = t.unsent[:s.unsent+1]
	}
	t.savepoints = t.savepoints[:depth+1]
	t.failure = s.failure
	t.deferred.Load().backTo(s)
	return nil
}

// Commit releases a savepoint; on the transaction itself it is refused.
func (tx *Tx) Commit(ctx context.Context) (err error) {
	if tx.savepoint == 0 {
		return fmt.Errorf("%w: it is committed with the answer when the handler returns", ErrSealed)
	}
	if err := tx.use(); err != nil {
		return err
	}
	defer func() { tx.done(err) }()
	if err := tx.ready(ctx); err != nil {
		return err
	}
	tx.pop(tx.depth())
	return nil
}

// Rollback undoes a savepoint; on the transaction itself it is refused.
func (tx *Tx) Rollback(ctx context.Context) (err error) {
	if tx.savepoint == 0 {
		return fmt.Errorf("%w: answer 4xx or 5xx to have its writes undone", ErrSealed)
	}
	if err := tx.use(); err != nil {
		return err
	}
	defer func() { tx.done(err) }()
	return tx.undo(ctx)
}

// undo undoes the handle's savepoint and closes it.
func (tx *Tx) undo(ctx context.Context) error {
	depth := tx.depth()
	if err := tx.backTo(ctx, depth); err != nil {
		return err
	}
	tx.pop(depth)
	return nil
}

func (tx *Tx) Exec(ctx context.Context, sql string, arguments ...any) (tag pgconn.CommandTag, err error) {
	if err := tx.use(); err != nil {
		return tag, err
	}
	defer func() { tx.done(err) }()
	if arguments, err = tx.admit(sql, arguments); err != nil {
		return tag, err
	}
	if err = tx.flush(ctx); err != nil {
		return tag, err
	}
	return tx.run(ctx, sql, arguments)
}

// run runs a statement that was admitted.
func (tx *Tx) run(ctx context.Context, sql string, arguments []any) (tag pgconn.CommandTag, err error) {
	// pgx's Exec would choose the protocol itself.
	rows, err := tx.conn.Query(ctx, sql, tx.extended(arguments, true)...)
	if err != nil {
		return tag, err
	}
	rows.Close()
	return rows.CommandTag(), rows.Err()
}

func (tx *Tx) Query(ctx context.Context, sql string, arguments ...any) (_ pgx.Rows, err error) {
	if err := tx.use(); err != nil {
		return failedRows{err}, err
	}
	defer func() { tx.done(err) }()
	if arguments, err = tx.admit(sql, arguments); err != nil {
		return failedRows{err}, err
	}
	if err = tx.flush(ctx); err != nil {
		return failedRows{err}, err
	}
	rows, err := tx.conn.Query(ctx, sql, tx.extended(arguments, false)...)
	return &handlerRows{Rows: rows, tx: tx.transaction}, err
}

// QueryRow sends the query and keeps the connection in use until the row is scanned: the two are
// one use of it.
func (tx *Tx) QueryRow(ctx context.Context, sql string, arguments ...any) pgx.Row {
	row := new(handlerRow)
	if err := tx.use(); err != nil {
		row.rows = failedRows{err}
		return row
	}
	var err error
	sent := false
	defer func() { // even if an argument's encoder panics
		if !sent {
			tx.done(err)
		}
	}()
	if arguments, err = tx.admit(sql, arguments); err == nil {
		err = tx.flush(ctx)
	}
	if err != nil {
		row.rows = failedRows{err}
		return row
	}
	rows, err := tx.conn.Query(ctx, sql, tx.extended(arguments, false)...)
	if err != nil {
		row.rows = failedRows{err}
		return row
	}
	row.own.Rows = rows
	row.tx, sent = tx.transaction, true
	tx.row.Store(row)
	// Seal waits for the slot, and this row may never be scanned
	if tx.sealed.Load() && tx.row.CompareAndSwap(row, nil) {
		tx.done(nil)
	}
	return row
}

func (tx *Tx) Prepare(ctx context.Context, name, sql string) (_ *pgconn.StatementDescription, err error) {
	if err := tx.use(); err != nil {
		return nil, err
	}
	defer func() { tx.done(err) }()
	if _, err := tx.admit(sql, nil); err != nil {
		return nil, err
	}
	if err := tx.flush(ctx); err != nil {
		return nil, err
	}
	return tx.conn.Prepare(ctx, name, sql)
}

func (tx *Tx) CopyFrom(ctx context.Context, table pgx.Identifier, columns []string, source pgx.CopyFromSource) (_ int64, err error) {
	if err := tx.use(); err != nil {
		return 0, err
	}
	defer func() { tx.done(err) }()
	if err := tx.flush(ctx); err != nil {
		return 0, err
	}
	return tx.conn.CopyFrom(ctx, table, columns, source)
}

func (tx *Tx) SendBatch(ctx context.Context, batch *pgx.Batch) pgx.BatchResults {
	if err := tx.use(); err != nil {
		return failedBatch{err}
	}
	var err error
	defer func() { tx.done(err) }()
	for _, query := range batch.QueuedQueries {
		arguments, err := tx.admit(query.SQL, query.Arguments)
		if err != nil {
			return failedBatch{err}
		}
		query.Arguments = arguments
		if callback := query.Fn; callback != nil {
			query.Fn = func(results pgx.BatchResults) error {
				held := &heldUsage{transaction: tx.transaction}
				defer held.end()
				return callback(&handlerBatch{BatchResults: results, tx: held})
			}
		}
	}
	if err = tx.flush(ctx); err != nil {
		return failedBatch{err}
	}
	results := &tx.batch
	if results.tx != nil { // taken, by a batch before this one
		results = new(handlerBatch)
	}
	*results = handlerBatch{BatchResults: tx.conn.SendBatch(ctx, batch), tx: tx.transaction}
	return results
}

// LargeObjects panics: its type can only be made around the seal.
func (tx *Tx) LargeObjects() pgx.LargeObjects {
	panic(idempotency.UsageError("idempotency/postgres: LargeObjects can't be used in an idempotent handler: call lo_create, lo_put and lo_get by SQL"))
}

// Conn returns nil: the connection would let the handler end the transaction.
func (tx *Tx) Conn() *pgx.Conn { return nil }

// admit refuses SQL text that controls transactions, even if a rewriter among the arguments makes
// it.
func (tx *Tx) admit(sql string, arguments []any) ([]any, error) {
	if !wire.PlainText(tx.conn.PgConn()) { // a quote may be half of a character there
		return nil, fmt.Errorf("%w: SQL is refused while client_encoding is not UTF8", ErrSealed)
	}
	plainStrings := tx.conn.PgConn().ParameterStatus("standard_conforming_strings") != "off"
	if err := tx.settings.texts.admit(sql, plainStrings); err != nil {
		return nil, err
	}
	for i, argument := range arguments {
		switch option := argument.(type) {
		case pgx.QueryExecMode, pgx.QueryResultFormats, pgx.QueryResultFormatsByOID:
		case pgx.QueryRewriter:
			arguments = slices.Clone(arguments)
			arguments[i] = admittedRewriter{option, &tx.settings.texts, plainStrings}
		default:
			return arguments, nil // options come first
		}
	}
	return arguments, nil
}

// extended returns the arguments with the mode that sends them by the extended protocol, in which
// the server itself refuses several statements in one string. pgx's Exec would send text without
// arguments by the simple protocol. Such text is not prepared either: that would cost a round trip
// the first time.
func (tx *Tx) extended(arguments []any, exec bool) []any {
	mode, explicit, options := tx.settings.Mode, false, 0
option:
	for ; options < len(arguments); options++ {
		switch option := arguments[options].(type) {
		case pgx.QueryExecMode:
			mode, explicit = option, true
		case pgx.QueryRewriter, pgx.QueryResultFormats, pgx.QueryResultFormatsByOID:
		default:
			break option
		}
	}
	if mode != pgx.QueryExecModeSimpleProtocol && (explicit || !exec || options < len(arguments)) {
		return arguments
	}
	// The last mode counts, so it goes after the other options.
	return slices.Insert(slices.Clone(arguments), options, any(pgx.QueryExecModeExec))
}

// admittedRewriter checks the SQL text of a rewriter.
type admittedRewriter struct {
	pgx.QueryRewriter
	texts        *texts
	plainStrings bool
}

func (r admittedRewriter) RewriteQuery(ctx context.Context, _ *pgx.Conn, sql string, arguments []any) (string, []any, error) {
	// Pass no connection: it would lead around the seal.
	sql, arguments, err := r.QueryRewriter.RewriteQuery(ctx, nil, sql, arguments)
	if err == nil {
		err = r.texts.admit(sql, r.plainStrings)
	}
	return sql, arguments, err
}
