package sealed

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"sync"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// deferred are the statements that a handler deferred.
type deferred struct {
	together int // bytes of parameters since the last Sync

	mu       sync.Mutex // a goroutine that finds the transaction in use takes it too
	calls    []wire.Call
	messages []message.Message
	refused  error // why a statement or a message is missing
}

// deferring returns the list, which it makes if there is none. It does not use the connection.
func (t *transaction) deferring() *deferred {
	t.deferred.CompareAndSwap(nil, new(deferred))
	return t.deferred.Load()
}

// refuse keeps the first error.
func (d *deferred) refuse(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refuseLocked(err)
}

func (d *deferred) refuseLocked(err error) {
	if d.refused == nil {
		d.refused = err
	}
}

// refuseStatement is refuse with the place of the statement.
func (d *deferred) refuseStatement(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refuseLocked(fmt.Errorf("deferred statement %d: %w", len(d.calls)+1, err))
}

// note writes the state of the list into a savepoint. d may be nil.
func (d *deferred) note(s *savepoint) {
	if d == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	s.deferred, s.messages, s.together, s.refused = len(d.calls), len(d.messages), d.together, d.refused
}

// Deferred returns the deferred statements, the bytes of their parameters since the last Sync, and
// an error if one of them was refused.
func (t *Transaction) Deferred() (calls []wire.Call, together int, refused error) {
	d := t.deferred.Load()
	if d == nil {
		return nil, 0, nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.calls, d.together, d.refused
}

// backTo goes back to the state that note wrote. d may be nil.
func (d *deferred) backTo(s *savepoint) {
	if d == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls, d.messages, d.together, d.refused = d.calls[:s.deferred], d.messages[:s.messages], s.together, s.refused
}

// DeferredTogetherMax is the maximum number of statements that the handlers of a batch may defer
// together: their replies, some 50 bytes each, must fit into the socket's buffer.
const DeferredTogetherMax = 1000

// deferredMax returns the maximum number of deferred statements.
func (t *transaction) deferredMax() int {
	one := t.settings.DeferredMax
	return max(min(one*t.handlers, DeferredTogetherMax), one)
}

// Messages returns the published messages.
func (t *Transaction) Messages() []message.Message {
	d := t.deferred.Load()
	if d == nil {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.messages
}

// Add implements [message.Outbox].
func (tx *Tx) Add(m *message.Message) error {
	d := tx.deferring()
	if err := tx.use(); err != nil {
		if errors.Is(err, ErrBusy) {
			d.refuse(err)
		}
		return err
	}
	defer tx.give()
	err := error(nil)
	switch {
	case len(d.messages) >= message.PublishedMax:
		err = fmt.Errorf("%w: the transaction has %d messages already", message.ErrInvalid, message.PublishedMax)
	case slices.ContainsFunc(d.messages, func(other message.Message) bool { return other.ID == m.ID }):
		err = fmt.Errorf("%w: the transaction has a message of this name: give each its own", message.ErrInvalid)
	}
	if err != nil {
		d.refuse(err)
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.messages = append(d.messages, *m)
	return nil
}

// Refuse implements [message.Outbox].
func (tx *Tx) Refuse(err error) { tx.deferring().refuse(err) }

// errArguments stands for pgx's error, which quotes the argument, and for a panic of its encoder.
var errArguments = errors.New("an argument can't be encoded: DeferExec returned the reason, or panicked")

// Defer adds a statement to those that the last flush sends. statement returns it, and the number
// of rows that it must touch, negative for any.
func (tx *Tx) Defer(ctx context.Context, statement func() (rows int, sql string, args []any, err error)) (err error) {
	d := tx.deferring()
	if err := tx.use(); err != nil {
		if errors.Is(err, ErrBusy) {
			d.refuseStatement(err)
		}
		return err
	}
	added := false
	defer func() {
		if !added { // even if an argument's encoder panics, and the handler recovers
			d.refuseStatement(cmp.Or(err, errArguments))
		}
		tx.done(err)
	}()
	if tx.conn.PgConn().IsBusy() { // by rows that are open
		return ErrBusy
	}
	if most := tx.deferredMax(); len(d.calls) >= most {
		return fmt.Errorf("idempotency/postgres: more than %d deferred statements (Options.DeferredMax): use a statement that writes several rows", most)
	}
	rows, sql, args, err := statement()
	if err != nil {
		return err
	}
	s, err := tx.deferredStatement(ctx, sql, rows)
	if err != nil {
		return err
	}
	if len(args) != s.params {
		return fmt.Errorf("idempotency/postgres: deferred statement has %d parameters and %d arguments", s.params, len(args))
	}
	var encoded pgx.ExtendedQueryBuilder
	if err := encoded.Build(tx.conn.TypeMap(), s.description, args); err != nil {
		d.refuseStatement(errArguments)
		return fmt.Errorf("idempotency/postgres: %w", err)
	}
	number := len(d.calls) + 1
	c := wire.Call{Statement: &s.Statement, Params: encoded.ParamValues, Formats: encoded.ParamFormats}
	c.Meaning = func(err *pgconn.PgError) (sentinel, explained error) {
		stale := s.stale(err)
		tx.stalePlans = tx.stalePlans || stale
		return tx.settings.Meaning(number, stale, err)
	}
	size := 0
	for _, param := range c.Params {
		size += len(param)
	}
	if d.together += size; d.together > wire.TogetherBytesMax {
		c.Apart, d.together = true, size
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls, added = append(d.calls, c), true
	return nil
}

// deferredStatement is the SQL text of a deferred statement, made ready for a connection.
type deferredStatement struct {
	wire.Statement
	params      int
	description *pgconn.StatementDescription // nil: parameters are encoded as in pgx.QueryExecModeExec
}

// stale reports whether an error shows that the types of the parameters are no longer those that
// the server returned when the statement was prepared, because a column's type was changed. Any
// other error of class 42 would have failed the preparation. There are two exceptions: a function's
// own error, which names the function in its context, and a missing privilege, which is found only
// now.
func (s *deferredStatement) stale(err *pgconn.PgError) bool {
	return len(s.OIDs) > 0 && wire.Class(err) == "42" && err.Code != "42501" && err.Where == ""
}

// deferredText is the key of a deferred statement among those that are remembered.
type deferredText struct {
	sql  string
	rows int
}

// DeferredMark is the key under which a connection's custom data keeps its deferred statements, by
// their text.
const DeferredMark = "paidonce/idempotency/deferred"

// DeferredTextsMax is the maximum number of texts that are remembered for one connection.
const DeferredTextsMax = 128

// deferredStatement returns the statement for a text. In pgx's modes that describe statements it is
// prepared or described once for each connection, a round trip, and then remembered. In the others
// the server infers the types of the parameters, and nothing is sent ahead.
func (tx *Tx) deferredStatement(ctx context.Context, sql string, rows int) (*deferredStatement, error) {
	conn := tx.conn.PgConn()
	text := deferredText{sql, rows}
	known, _ := conn.CustomData()[DeferredMark].(map[deferredText]*deferredStatement)
	if s := known[text]; s != nil && wire.PlainText(conn) && conn.ParameterStatus("standard_conforming_strings") != "off" {
		return s, nil // admitted before
	}
	if _, err := tx.admit(sql, nil); err != nil {
		return nil, err
	}
	counted, params, err := countRows(sql, rows)
	if err != nil {
		return nil, err
	}
	s := &deferredStatement{Statement: wire.Statement{SQL: counted}, params: params}
	switch tx.settings.Mode {
	case pgx.QueryExecModeCacheStatement:
		s.Name = "idempotency_deferred_" + rand.Text()
	case pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeDescribeExec:
	default:
		return s, nil
	}
	if err := tx.flush(ctx); err != nil { // a statement that can't be prepared fails the transaction
		return nil, err
	}
	if s.description, err = conn.Prepare(ctx, s.Name, s.SQL, nil); err != nil {
		return nil, fmt.Errorf("idempotency/postgres: prepare a deferred statement: %w", err)
	}
	s.OIDs = s.description.ParamOIDs
	if known == nil {
		known = map[deferredText]*deferredStatement{}
		conn.CustomData()[DeferredMark] = known
	}
	for text, other := range known { // any that this request does not use
		if len(known) < DeferredTextsMax {
			break
		}
		if tx.defers(other) {
			continue
		}
		if other.Name != "" {
			if err := conn.Deallocate(ctx, other.Name); err != nil {
				return nil, fmt.Errorf("idempotency/postgres: deallocate a deferred statement: %w", err)
			}
		}
		delete(known, text)
	}
	known[text] = s
	return s, nil
}

// defers reports whether the statement is on the list of this transaction.
func (t *transaction) defers(s *deferredStatement) bool {
	return slices.ContainsFunc(t.deferring().calls, func(c wire.Call) bool { return c.Statement == &s.Statement })
}
