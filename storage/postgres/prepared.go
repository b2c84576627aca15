package postgres

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
)

// statement is one of our own statements. Parameters and results are in binary format throughout.
type statement struct {
	number int // its place in the names of a connection that has it prepared; 0: it is never prepared
	sql    string
	oids   []uint32 // of the parameters, so that nothing has to be described first
	name   string   // of a deferred statement that is prepared on its connection
}

// set is the statements of a store that are prepared on each connection of its pool. It is safe for
// concurrent use.
type set struct {
	statements []statement
	table      string // of the records; sanitized
	mark       string // the key of their *preparedNames in a connection's custom data
	deferred   string // the key of what is prepared for handlers, which is forgotten together with them
}

// newSet numbers the statements and returns the set of them.
func newSet(table, deferred string, statements ...*statement) set {
	s := set{table: table, deferred: deferred}
	texts := sha256.New()
	for i, one := range statements {
		one.number = i + 1
		s.statements = append(s.statements, *one)
		sum := sha256.Sum256([]byte(one.sql))
		_, _ = texts.Write(sum[:]) // a hash never fails
	}
	s.mark = preparedMark + hex.EncodeToString(texts.Sum(nil))
	return s
}

// preparedMark begins the keys under which a connection's custom data says that a store's statements are prepared on
// it, and by what names: a *preparedNames. The rest of the key is of their texts: those of another schema or isolation
// level are others, and both may be prepared.
const preparedMark = "paidonce/idempotency/prepared/"

// preparedNames are the names of prepared statements, by number; that of number 0 is empty.
type preparedNames struct{ names []string }

// newNames draws names that nobody else knows. EXECUTE is SQL text as any other to the guard that reads what a handler
// sends, and COMMIT is among the statements.
func (s *set) newNames() *preparedNames {
	prefix := "idempotency_" + rand.Text() + "_"
	p := &preparedNames{names: []string{""}}
	for _, one := range s.statements {
		p.names = append(p.names, prefix+strconv.Itoa(one.number))
	}
	return p
}

// namesOn returns the names of these statements on a connection, nil where they are not prepared there.
func (s *set) namesOn(conn *pgconn.PgConn) *preparedNames {
	p, _ := conn.CustomData()[s.mark].(*preparedNames)
	return p
}

// othersOn reports whether the statements of a store with other options are prepared on a connection, and these are not.
func (s *set) othersOn(conn *pgconn.PgConn) (others bool) {
	for mark := range conn.CustomData() {
		others = others || strings.HasPrefix(mark, preparedMark)
	}
	return others && s.namesOn(conn) == nil
}

// prepare prepares the statements on a new connection, in one round trip. The connection is usable
// without them: they are then sent as text, which adds no round trip. So a missing table or column
// is no error, because a migration, or Check, may need the connection. Neither is a table that has a rule, or that
// somebody keeps locked for longer than timeout, because the connection may be for a request that
// needs no record. If the table has row-level security, they are sent as text too: see
// [ErrRowSecurity].
func (s *set) prepare(ctx context.Context, conn *pgconn.PgConn, p *preparedNames, timeout time.Duration) error {
	pipeline := conn.StartPipeline(ctx)
	// Local to the transaction: all messages before the Sync run in one.
	pipeline.SendQueryParams("SELECT pg_catalog.set_config('lock_timeout', $1, true)",
		[][]byte{strconv.AppendInt(nil, timeout.Milliseconds(), 10)}, []uint32{pgtype.TextOID}, nil, nil)
	for _, one := range s.statements {
		pipeline.SendPrepare(p.names[one.number], one.sql, one.oids)
	}
	// Read after the statements were parsed, and regardless of the roles that it applies to.
	pipeline.SendQueryParams("SELECT relrowsecurity FROM pg_catalog.pg_class WHERE oid = '"+s.table+"'::pg_catalog.regclass", nil, nil, nil, nil)
	rowSecurity := "t"
	err := pipeline.Sync()
	for err == nil {
		var result any
		if result, err = pipeline.GetResults(); result == nil {
			break
		}
		if reader, ok := result.(*pgconn.ResultReader); ok {
			if reader.NextRow() { // the last query's value remains
				rowSecurity = string(reader.Values()[0])
			}
			_, err = reader.Close()
		}
	}
	if closeErr := pipeline.Close(); err == nil {
		err = closeErr
	}
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		switch pgErr.Code {
		case "42P01", "42703", "3F000", "42883", "0A000", "55P03", "57014": // no table, column, schema or function, a rule, lock_timeout, statement_timeout
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("idempotency/postgres: prepare: %w", sqlError(err))
	}
	if rowSecurity == "f" {
		conn.CustomData()[s.mark] = p
	}
	return nil
}

// forgetPrepared has our statements sent as text from now on, and deferred ones prepared once more.
func (s *set) forgetPrepared(conn *pgconn.PgConn) {
	delete(conn.CustomData(), s.mark)
	delete(conn.CustomData(), s.deferred)
}

// unprepared reports whether a prepared statement can't be used any more: somebody deallocated it on this connection,
// or the table changed under its plan.
func unprepared(err error) bool {
	if err == nil { // saves the allocation below
		return false
	}
	var pgErr *pgconn.PgError
	return stalePlan(err) || errors.As(err, &pgErr) && pgErr.Code == "26000"
}
