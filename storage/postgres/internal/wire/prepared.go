package wire

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

// Statement is one of our own statements. Parameters and results are in binary format throughout.
type Statement struct {
	number int // its place in the names of a connection that has it prepared; 0: it is never prepared
	SQL    string
	OIDs   []uint32 // of the parameters, so that nothing has to be described first
	Name   string   // of a deferred statement that is prepared on its connection

	// Keep prepares the statement on a connection with its first use there, in the same flush, if the
	// set is prepared on it. It is for statements that few services send, or that need tables that few
	// databases have.
	Keep bool
}

// Set is the statements of a store that are prepared on each connection of its pool. It is safe for
// concurrent use.
type Set struct {
	statements []Statement
	table      string // of the records; sanitized
	mark       string // the key of their *Names in a connection's custom data
	// deferred is the key of the handlers' prepared statements, which are dropped together with
	// these.
	deferred string
}

// NewSet numbers the statements and returns the set of them.
func NewSet(table, deferred string, statements ...*Statement) Set {
	s := Set{table: table, deferred: deferred}
	texts := sha256.New()
	for i, one := range statements {
		one.number = i + 1
		s.statements = append(s.statements, *one)
		sum := sha256.Sum256([]byte(one.SQL))
		_, _ = texts.Write(sum[:]) // a hash never fails
	}
	s.mark = preparedMark + hex.EncodeToString(texts.Sum(nil))
	return s
}

// preparedMark is the beginning of the keys under which a connection's custom data keeps the names
// of prepared statements, a *Names. The rest of a key is a hash of their texts: stores with another
// schema or isolation level have other texts, and both may be prepared.
const preparedMark = "paidonce/idempotency/prepared/"

// Names are the names of prepared statements, by number; that of number 0 is empty.
type Names struct{ names []string }

// NewNames draws names that a handler can't guess. COMMIT is among the statements, and the guard
// that reads a handler's SQL admits EXECUTE.
func (s *Set) NewNames() *Names {
	prefix := "idempotency_" + rand.Text() + "_"
	p := &Names{names: []string{""}}
	for _, one := range s.statements {
		p.names = append(p.names, prefix+strconv.Itoa(one.number))
	}
	return p
}

// namesOn returns the names of these statements on a connection, nil if they are not prepared
// there.
func (s *Set) namesOn(conn *pgconn.PgConn) *Names {
	p, _ := conn.CustomData()[s.mark].(*Names)
	return p
}

// OthersOn reports whether a connection has the prepared statements of a store with other options,
// and not these.
func (s *Set) OthersOn(conn *pgconn.PgConn) (others bool) {
	for mark := range conn.CustomData() {
		others = others || strings.HasPrefix(mark, preparedMark)
	}
	return others && s.namesOn(conn) == nil
}

// Prepare prepares the statements on a new connection, in one round trip. The connection is usable
// without them: they are then sent as text, which adds no round trip. So a missing table or column
// is no error, because a migration, or Check, may need the connection. A table that has a rule, or
// that somebody keeps locked for longer than timeout, is no error either, because the connection
// may be for a request that needs no record. If the table has row-level security, they are sent as
// text too: a plan with policies would outlive them.
func (s *Set) Prepare(ctx context.Context, conn *pgconn.PgConn, p *Names, timeout time.Duration) error {
	pipeline := conn.StartPipeline(ctx)
	// Local to the transaction: all messages before the Sync run in one.
	pipeline.SendQueryParams("SELECT pg_catalog.set_config('lock_timeout', $1, true)",
		[][]byte{strconv.AppendInt(nil, timeout.Milliseconds(), 10)}, []uint32{pgtype.TextOID}, nil, nil)
	for _, one := range s.statements {
		pipeline.SendPrepare(p.names[one.number], one.SQL, one.OIDs)
	}
	// Read after the statements were parsed. It counts for every role, even one that row-level
	// security does not apply to.
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
		// No table, column, schema or function; a rule; lock_timeout; statement_timeout.
		case "42P01", "42703", "3F000", "42883", "0A000", "55P03", "57014":
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("idempotency/postgres: prepare: %w", SQLError(err))
	}
	if rowSecurity == "f" {
		conn.CustomData()[s.mark] = p
	}
	return nil
}

// keptMark is a key in a connection's custom data. Under it are the names of the statements that
// were prepared by their first use, by their text.
const keptMark = "paidonce/idempotency/kept"

// kept are the statements with Keep that a flush prepares.
type kept struct {
	names  map[string]string // of those that are prepared already
	parsed []string          // the texts that the flush parses, in order; "" if one is not kept
	drawn  []string          // their names
}

// keptOn returns the kept statements of a connection.
func keptOn(conn *pgconn.PgConn) kept {
	names, _ := conn.CustomData()[keptMark].(map[string]string)
	return kept{names: names}
}

// parse notes that the flush parses a statement, and returns the name to parse it under.
func (k *kept) parse(s *Statement, keep bool) (name string) {
	text := ""
	if keep {
		text, name = s.SQL, "idempotency_"+rand.Text()
	}
	k.parsed, k.drawn = append(k.parsed, text), append(k.drawn, name)
	return name
}

// done notes that the server has parsed the first statements of the flush.
func (k *kept) done(conn *pgconn.PgConn, parsed int) {
	for i, text := range k.parsed[:min(parsed, len(k.parsed))] {
		if text == "" {
			continue
		}
		if k.names == nil {
			k.names = map[string]string{}
			conn.CustomData()[keptMark] = k.names
		}
		k.names[text] = k.drawn[i]
	}
}

// Distrust makes the connection send our statements as text from now on: their plans may be wrong.
func (s *Set) Distrust(conn *pgconn.PgConn) { delete(conn.CustomData(), s.mark) }

// ForgetPrepared makes the connection send our statements as text from now on, and prepare deferred
// ones once more.
func (s *Set) ForgetPrepared(conn *pgconn.PgConn) {
	delete(conn.CustomData(), s.mark)
	delete(conn.CustomData(), s.deferred)
	delete(conn.CustomData(), keptMark)
}
