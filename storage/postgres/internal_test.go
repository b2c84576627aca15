package postgres

import (
	"errors"
	"reflect"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

func TestAdmitSQL(t *testing.T) {
	t.Parallel()
	for _, sql := range []string{
		"", ";", " -- nothing", "SELECT 1", "select 1;", "SELECT 1 ; -- done", "SELECT ';commit;'", `SELECT "a;b"`,
		"SELECT $$;commit;$$", "SELECT $x$;$$;commit;$x$", "SELECT E'\\';commit;'", "SELECT '';", "SELECT 'it''s; so'",
		"/* a; /* b; */ commit; */ SELECT 1", "SELECT $1 + $2", "INSERT INTO commits (begin_at) VALUES ($1)", "PREPARE x AS SELECT 1",
		"SELECT a$b$c FROM t", "SELECT 1 -- ; commit", "WITH rollback AS (SELECT 1) SELECT 1", "SELECT U&'\\0041;'", `SELECT '{"a":"b;c"}'::jsonb ? 'a'`, "select e.x from e where e.x = ';'",
		"NOTIFY paid", "UNLISTEN paid", "DECLARE c CURSOR FOR SELECT 'with hold'", "DECLARE c CURSOR WITHOUT HOLD FOR SELECT 1", "DECLARE c CURSOR FOR SELECT a AS with_ FROM hold", `DECLARE "with" CURSOR FOR SELECT 1`,
	} {
		if err := admitSQL(sql, true); err != nil {
			t.Errorf("%q is refused: %v", sql, err)
		}
	}
	for _, sql := range []string{
		"COMMIT", "commit;", " \n\tCommit", "-- c\nCOMMIT", "/* c */ROLLBACK", "/* /* */ */ end", ";COMMIT", "; ; -- x\n abort",
		"BEGIN", "START TRANSACTION", "ROLLBACK TO SAVEPOINT a", "SAVEPOINT a", "RELEASE a", "PREPARE TRANSACTION 'a'", "prepare /* x */ transaction 'a'", "COMMIT PREPARED 'a'",
		"SELECT 1; COMMIT", "SELECT 1;SELECT 2", "SELECT '';COMMIT", "SELECT ''';';COMMIT", `SELECT "a";COMMIT`, "SELECT $$ $$;COMMIT",
		"SELECT $a$ $a$;COMMIT", "SELECT '\\';COMMIT;--'", "SELECT E'a''\\'';COMMIT", "SELECT 1 /* ; */;COMMIT", "SELECT a$$;COMMIT;$$",
		"INSERT INTO t VALUES (1); commit; begin",
		"LISTEN paid", "/* c */ listen paid", "DECLARE c CURSOR WITH HOLD FOR SELECT 1", "declare c no scroll cursor /* c */ with -- d\n hold for select 1",
		`DECLARE "for" INSENSITIVE CURSOR WITH HOLD FOR SELECT 1`,
		"INSERT INTO t VALUES (E'a'\n'\\''); commit; begin; select ''", "SELECT E'a' -- c\n '\\'';COMMIT", "SELECT 1;;COMMIT", "SELECT $1;COMMIT;--$1",
		"CREATE FUNCTION one() RETURNS int LANGUAGE SQL BEGIN ATOMIC SELECT 1; SELECT 2; END", // refused to be on the safe side
	} {
		if err := admitSQL(sql, true); !errors.Is(err, ErrSealed) {
			t.Errorf("%q is admitted", sql)
		}
	}
	if err := admitSQL(`SELECT '\''`, false); !errors.Is(err, ErrSealed) {
		t.Error("a backslash is admitted while standard_conforming_strings is off")
	}
}

// FuzzAdmitSQL: whatever an admitted text is followed by, a COMMIT after it is seen, unless the text left a string or a
// comment open, in which nothing is executed.
func FuzzAdmitSQL(f *testing.F) {
	for _, seed := range []string{"SELECT 1", "SELECT 'a'", "SELECT $a$b$a$", "SELECT /* a */ 1", "SELECT E'\\''", "SELECT \"a\"", "é", "SELECT 1 -- a\n"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, sql string) {
		if admitSQL(sql, true) != nil {
			return
		}
		s := scanner{rest: sql + "\n;COMMIT"}
		for s.rest != ";COMMIT" {
			if s.rest == "" {
				return // left open
			}
			if s.rest[0] == ';' {
				s.rest = s.rest[1:]
			}
			s.token()
		}
		if admitSQL(sql+"\n;COMMIT", true) == nil {
			t.Errorf("COMMIT after %q is admitted", sql)
		}
	})
}

// FuzzCountRows: what is made of an admitted statement is one statement too, which ends where ours does: what the text
// leaves open would swallow the count.
func FuzzCountRows(f *testing.F) {
	for _, seed := range []string{"INSERT INTO t VALUES ($1) -- a", "UPDATE t SET a = '(' RETURNING b;", "delete from t where b in (1)", "SELECT $$)$$ /* ( */", "SELECT 1) SELECT (1"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, sql string) {
		if admitSQL(sql, true) != nil {
			return
		}
		counted, _, err := countRows(sql, 2)
		if err != nil {
			if !errors.Is(err, ErrSealed) {
				t.Errorf("%q: %v", sql, err)
			}
			return
		}
		if err := admitSQL(counted, true); err != nil {
			t.Errorf("%q becomes %q: %v", sql, counted, err)
		}
		depth, closed := 0, 0
		for s := (scanner{rest: counted}); s.rest != ""; {
			s.skip()
			before := s.rest
			s.token()
			switch before[:len(before)-len(s.rest)] {
			case "(":
				depth++
			case ")":
				if depth--; depth == 0 {
					closed = len(s.rest)
				}
			}
			if depth == 0 && closed > 0 {
				break
			}
		}
		const count = " SELECT 1 OPERATOR(pg_catalog./) CASE WHEN pg_catalog.count(*) OPERATOR(pg_catalog.=) 2 THEN 1 ELSE 0 END FROM idempotency_deferred"
		if closed != len(count) {
			t.Errorf("%q becomes %q: the count is not all that follows it", sql, counted)
		}
	})
}

func TestHeadersRoundTrip(t *testing.T) {
	t.Parallel()
	for _, header := range []map[string][]string{
		{},
		{"A": {""}},
		{"Vary": {"a", "b, c"}, "Content-Type": {"text/plain"}, "X": {"\tü\xff"}},
	} {
		decoded, err := decodeHeaders(encodeHeaders(nil, header))
		if err != nil || !reflect.DeepEqual(decoded, header) {
			t.Errorf("%v became %v, %v", header, decoded, err)
		}
	}
	for _, stored := range []string{"", "\x01", "\x02\x00", "\x01\x01", "\x01\x00\x00", "\x01\x80\x00", "\x01\x02\x01B\x00\x01A\x00", "\x01\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"} {
		if _, err := decodeHeaders([]byte(stored)); err == nil {
			t.Errorf("%q is read", stored)
		}
	}
}

// FuzzDecodeHeaders: what is read is what was written, byte for byte.
func FuzzDecodeHeaders(f *testing.F) {
	for _, header := range []map[string][]string{{}, {"A": {"b"}}, {"A": {"b", "c"}, "D": {""}}} {
		f.Add(encodeHeaders(nil, header))
	}
	f.Fuzz(func(t *testing.T, stored []byte) {
		header, err := decodeHeaders(stored)
		if err != nil {
			return
		}
		if again := encodeHeaders(nil, header); string(again) != string(stored) {
			t.Errorf("%q was read, and is written as %q", stored, again)
		}
	})
}

func TestLockNumberIsFrozen(t *testing.T) {
	t.Parallel()
	if got := (idempotency.Key{Scope: "acme", Value: "k"}).LockNumber("public." + TableName); got != lockNumberOfAcmeK {
		t.Errorf("lock number %d, want %d: programs of different versions would not meet", got, int64(lockNumberOfAcmeK))
	}
}

const lockNumberOfAcmeK = -4293143674885497847

// Only an ERROR by PostgreSQL itself, outside of class 08, proves that a COMMIT did not happen.
func TestDefinite(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		err  error
		want bool
	}{
		{&pgconn.PgError{SeverityUnlocalized: "ERROR", Severity: "FEHLER", Code: "23505"}, true},
		{&pgconn.PgError{SeverityUnlocalized: "ERROR", Code: "40001"}, true},
		{&pgconn.PgError{SeverityUnlocalized: "ERROR", Code: "08006"}, false},
		{&pgconn.PgError{SeverityUnlocalized: "FATAL", Code: "57P01"}, false},
		{&pgconn.PgError{SeverityUnlocalized: "PANIC", Code: "53100"}, false},
		{&pgconn.PgError{Severity: "ERROR", Code: "23505"}, false}, // a pooler's
		{&pgconn.PgError{Severity: "FATAL", Code: "08P01"}, false}, // PgBouncer's
		{errors.New("unexpected EOF"), false},
	} {
		if _, got := wire.Definite(c.err); got != c.want {
			t.Errorf("%v: %v, want %v", c.err, got, c.want)
		}
	}
}

func TestClassify(t *testing.T) {
	t.Parallel()
	for code, want := range map[string]error{
		"40001": idempotency.ErrSerialization, "40P01": idempotency.ErrSerialization,
		"08006": idempotency.ErrUnavailable, "53100": idempotency.ErrUnavailable, "53300": idempotency.ErrUnavailable,
		"57014": idempotency.ErrUnavailable, "57P01": idempotency.ErrUnavailable, "58030": idempotency.ErrUnavailable,
		"55P03": idempotency.ErrUnavailable, "25006": idempotency.ErrAborted,
		"23505": idempotency.ErrAborted, "22012": idempotency.ErrAborted, "55000": idempotency.ErrAborted, "": idempotency.ErrAborted,
	} {
		if got := classify(&pgconn.PgError{Code: code}); !errors.Is(got, want) {
			t.Errorf("%q: %v, want %v", code, got, want)
		}
	}
	if got := classify(&pgconn.PgError{Code: "57014", Routine: "CopyGetData"}); !errors.Is(got, idempotency.ErrAborted) {
		t.Errorf("a COPY that the handler's rows ended: %v", got)
	}
	if got := classify(errors.New("unexpected EOF")); !errors.Is(got, idempotency.ErrUnavailable) {
		t.Errorf("an I/O error: %v", got)
	}
}

// A server's message may quote what a client sent; ours may not.
func TestErrorsQuoteNothing(t *testing.T) {
	t.Parallel()
	err := fail("claim", idempotency.ErrUnavailable, &pgconn.PgError{Code: "22P02", Message: `invalid input syntax: "canary"`, Detail: "canary", ConstraintName: "c"})
	if got, want := err.Error(), "claim: store is unavailable: SQLSTATE 22P02 on constraint c"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestHintsAreAboutOneNumber(t *testing.T) {
	t.Parallel()
	h := new(hints)
	one, samePlace := int64(5), int64(5+hintsMax)
	h.set(one)
	if !h.has(one) || h.has(samePlace) || h.has(6) {
		t.Error("a hint is about other numbers")
	}
	h.clear(samePlace)
	if !h.has(one) {
		t.Error("a hint was cleared for another number")
	}
	h.set(samePlace)
	if h.has(one) || !h.has(samePlace) {
		t.Error("a hint does not take the place of another")
	}
	if h.clear(samePlace); h.has(samePlace) {
		t.Error("a hint is there after it was cleared")
	}
	if negative := int64(-7); h.has(negative) {
		t.Error("a hint of a negative number")
	} else if h.set(negative); !h.has(negative) {
		t.Error("no hint of a negative number")
	}
}
