package postgres

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// Rows is the exact number of rows that a deferred statement must touch. Put it in front of the
// arguments of [DeferExec]; without it the number is 1.
type Rows int

// AnyRowsUnchecked accepts every number of rows. A statement that finds nothing to update is then
// committed with the answer, and nobody learns of it.
const AnyRowsUnchecked Rows = -1

// DeferExec adds a statement to those that run after the handler has returned, in the same
// transaction and in the order of the calls. They travel together with the record and COMMIT, so
// the last statements of a handler cost no round trip of their own if it does not need their
// results:
//
//	postgres.DeferExec(ctx, "UPDATE accounts SET balance = balance - $2 WHERE id = $1", from, amount)
//	postgres.DeferExec(ctx, "DELETE FROM holds WHERE payment = $1", postgres.Rows(2), payment)
//
// COMMIT is on its way behind them, so each statement must touch exactly one row, or as many as a
// [Rows] in front of the arguments says. Otherwise nothing is committed: the request is answered 500
// not-executed. So is any other error of theirs, except that 40001 and 40P01 start the request again
// and an outage or a timeout is 503, as for statements of [Tx]. By then the handler has given its
// answer and can't turn the error into another one: check what a client may get wrong before.
//
// The statement is an INSERT, UPDATE or DELETE, or a SELECT, which counts the rows that it returns;
// any rows are discarded. It must not begin with WITH. Arguments are encoded as pgx does in the
// pool's mode, at once; pgx.NamedArgs may come in front of them. In the modes that describe
// statements, one costs a round trip when a connection first meets it. Tracers of pgx don't see
// deferred statements.
//
// With an answer that undoes the handler's writes, such as a 4xx or 5xx, the statements are not
// sent. Those that were deferred while a nested transaction was open go if it is rolled back.
// Their time counts for the engine's Timeouts.Commit.
//
// An error means that the statement was not added; ignoring it does not commit the rest, but fails
// the request. As [Tx], DeferExec is for one goroutine at a time, returns [ErrBusy] or [ErrSealed],
// and panics outside an idempotent handler.
func DeferExec(ctx context.Context, sql string, args ...any) error {
	return handleOf(ctx, "DeferExec").deferExec(ctx, sql, args)
}

// deferred are the statements that a handler deferred.
type deferred struct {
	together int // bytes of parameters since the last Sync

	mu      sync.Mutex // a goroutine that finds the transaction in use takes it too
	calls   []wire.Call
	refused error // why a statement is missing
}

// deferring returns the list, which it makes if need be. It needs no use of the connection.
func (t *transaction) deferring() *deferred {
	t.deferred.CompareAndSwap(nil, new(deferred))
	return t.deferred.Load()
}

func (d *deferred) refuse(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.refused == nil {
		d.refused = fmt.Errorf("deferred statement %d: %w", len(d.calls)+1, err)
	}
}

// state returns the length of the list, and why a statement is missing from it. d may be nil.
func (d *deferred) state() (calls int, refused error) {
	if d == nil {
		return 0, nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.calls), d.refused
}

// backTo undoes what came after a state. d may be nil.
func (d *deferred) backTo(calls int, refused error) {
	if d == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls, d.refused = d.calls[:calls], refused
}

// errArguments stands for pgx's error, which quotes the argument.
var errArguments = errors.New("an argument can't be encoded: DeferExec returned the reason")

func (tx *sealedTx) deferExec(ctx context.Context, sql string, args []any) (err error) {
	d := tx.deferring()
	if err := tx.use(); err != nil {
		if errors.Is(err, ErrBusy) {
			d.refuse(err)
		}
		return err
	}
	defer func() {
		if err != nil {
			d.refuse(err)
		}
		tx.done(err)
	}()
	if tx.conn.PgConn().IsBusy() { // by rows that are open
		return ErrBusy
	}
	if len(d.calls) >= tx.deferredMax {
		return fmt.Errorf("idempotency/postgres: more than %d deferred statements (Options.DeferredMax): use a statement that writes several rows", tx.deferredMax)
	}
	rows, sql, args, err := deferOptions(ctx, sql, args)
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
		d.refuse(errArguments)
		return fmt.Errorf("idempotency/postgres: %w", err)
	}
	number := len(d.calls) + 1
	c := wire.Call{Statement: &s.Statement, Params: encoded.ParamValues, Formats: encoded.ParamFormats}
	c.Meaning = func(err *pgconn.PgError) (sentinel, explained error) { return deferredMeaning(number, err) }
	size := 0
	for _, param := range c.Params {
		size += len(param)
	}
	if d.together += size; d.together > togetherBytesMax {
		c.Apart, d.together = true, size
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls = append(d.calls, c)
	return nil
}

// deferOptions takes what precedes the arguments.
func deferOptions(ctx context.Context, sql string, args []any) (Rows, string, []any, error) {
	rows, rewriter := Rows(1), pgx.QueryRewriter(nil)
options:
	for len(args) > 0 {
		switch option := args[0].(type) {
		case Rows:
			if rows = option; rows < AnyRowsUnchecked {
				return 0, "", nil, fmt.Errorf("idempotency/postgres: Rows is %d: it must be the number of rows, or AnyRowsUnchecked", rows)
			}
		case pgx.QueryRewriter:
			rewriter = option
		case pgx.QueryExecMode, pgx.QueryResultFormats, pgx.QueryResultFormatsByOID:
			return 0, "", nil, fmt.Errorf("idempotency/postgres: a deferred statement takes no %T", option)
		default:
			break options
		}
		args = args[1:]
	}
	if rewriter != nil {
		var err error
		if sql, args, err = rewriter.RewriteQuery(ctx, nil, sql, args); err != nil {
			return 0, "", nil, fmt.Errorf("idempotency/postgres: rewrite a deferred statement: %w", err)
		}
	}
	for _, arg := range args {
		if _, ok := arg.(Rows); ok {
			return 0, "", nil, errors.New("idempotency/postgres: Rows comes in front of the arguments of a deferred statement")
		}
	}
	return rows, sql, args, nil
}

// deferredStatement is the SQL text of a deferred statement, made ready for a connection.
type deferredStatement struct {
	wire.Statement
	params      int
	description *pgconn.StatementDescription // nil: parameters are encoded as in pgx.QueryExecModeExec
}

// deferredText is what a deferred statement is made of.
type deferredText struct {
	sql  string
	rows Rows
}

// deferredMark is the key under which a connection's custom data keeps its deferred statements, by
// their text.
const deferredMark = "paidonce/idempotency/deferred"

// deferredTextsMax is the maximum number of texts that are remembered of one connection.
const deferredTextsMax = 128

// deferredStatement returns the statement for a text. In pgx's modes that describe statements it is
// prepared or described once for each connection, a round trip, and then remembered. In the others
// the server infers the types of the parameters, and nothing is sent ahead.
func (tx *sealedTx) deferredStatement(ctx context.Context, sql string, rows Rows) (*deferredStatement, error) {
	conn := tx.conn.PgConn()
	text := deferredText{sql, rows}
	known, _ := conn.CustomData()[deferredMark].(map[deferredText]*deferredStatement)
	if s := known[text]; s != nil && plainText(conn) && conn.ParameterStatus("standard_conforming_strings") != "off" {
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
	switch tx.mode {
	case pgx.QueryExecModeCacheStatement:
		s.Name = "idempotency_deferred_" + rand.Text()
	case pgx.QueryExecModeCacheDescribe, pgx.QueryExecModeDescribeExec:
	default:
		return s, nil
	}
	if s.description, err = conn.Prepare(ctx, s.Name, s.SQL, nil); err != nil {
		return nil, fmt.Errorf("idempotency/postgres: prepare a deferred statement: %w", err)
	}
	s.OIDs = s.description.ParamOIDs
	if known == nil {
		known = map[deferredText]*deferredStatement{}
		conn.CustomData()[deferredMark] = known
	}
	for text, other := range known { // any of them
		if len(known) < deferredTextsMax {
			break
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

// countRows returns a statement that does what sql does, and fails with a division by zero unless
// the number of rows that sql touches is the one given. It also returns the number of parameters.
// sql has been admitted: it is one statement, and ends outside of strings and comments.
func countRows(sql string, rows Rows) (counted string, params int, err error) {
	s := &scanner{rest: sql}
	for s.skip(); s.rest != "" && s.rest[0] == ';'; s.skip() { // empty statements
		s.rest = s.rest[1:]
	}
	body := s.rest
	verb := strings.ToUpper(s.word())
	with := " AS ("
	returning := false
	switch verb {
	case "INSERT", "UPDATE", "DELETE":
	case "SELECT":
		with, returning = " AS MATERIALIZED (", true
	case "WITH":
		return "", 0, fmt.Errorf("%w: a deferred statement must not begin with WITH, because PostgreSQL does not count the rows of one WITH inside another: defer its parts one by one, or use Tx", ErrSealed)
	default:
		return "", 0, fmt.Errorf("%w: a deferred statement must be an INSERT, UPDATE, DELETE or SELECT: use Tx for others", ErrSealed)
	}
	depth := 0
	for s.skip(); s.rest != "" && s.rest[0] != ';' && depth >= 0; s.skip() {
		if n := parameter(s.rest); n > 0 {
			params = max(params, n)
		}
		before := s.rest
		s.token()
		switch token := before[:len(before)-len(s.rest)]; {
		case token == "(":
			depth++
		case token == ")":
			depth--
		case depth == 0 && strings.EqualFold(token, "RETURNING"):
			returning = true
		}
	}
	if depth != 0 {
		return "", 0, fmt.Errorf("%w: parentheses of a deferred statement do not match", ErrSealed)
	}
	body = body[:len(body)-len(s.rest)]
	if !returning {
		body += "\nRETURNING 1"
	}
	count := "pg_catalog.count(*)"
	if rows >= 0 {
		count = "1 OPERATOR(pg_catalog./) CASE WHEN pg_catalog.count(*) OPERATOR(pg_catalog.=) " + strconv.Itoa(int(rows)) + " THEN 1 ELSE 0 END"
	}
	// Each part on a line of its own: the text may end with a comment.
	return "WITH idempotency_deferred" + with + "\n" + body + "\n) SELECT " + count + " FROM idempotency_deferred", params, nil
}

// parameter returns the number of the parameter that the text begins with, 0 if it begins with
// something else.
func parameter(text string) (n int) {
	const most = 65535 // PostgreSQL's
	if text[0] != '$' {
		return 0
	}
	for i := 1; i < len(text) && text[i] >= '0' && text[i] <= '9' && n <= most; i++ {
		n = n*10 + int(text[i]-'0')
	}
	return n
}

// deferredMeaning returns the sentinel for PostgreSQL's error in the handler's deferred statement
// of this number, and the error with its place added. It is never about the record.
func deferredMeaning(number int, err *pgconn.PgError) (sentinel, explained error) {
	if err.Code == "26000" && err.Where == "" { // deallocated by somebody: the next run prepares it once more
		return idempotency.ErrSerialization, err
	}
	remedy := "deferred statement " + strconv.Itoa(number)
	if err.Code == "22012" && err.Where == "" { // a function's own error would name it in its context
		remedy += " touched another number of rows than it must, or divides by zero itself: give DeferExec a Rows, or look before the handler answers"
	}
	return classify(err), explain(err, remedy)
}

// refusal returns the sentinel for a statement that was not deferred.
func refusal(err error) error {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return idempotency.ErrUnavailable
	}
	return idempotency.ErrAborted
}
