package sealed

import (
	"errors"
	"strconv"
	"strings"
	"testing"
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
		// This one is refused to be on the safe side.
		"CREATE FUNCTION one() RETURNS int LANGUAGE SQL BEGIN ATOMIC SELECT 1; SELECT 2; END",
	} {
		if err := admitSQL(sql, true); !errors.Is(err, ErrSealed) {
			t.Errorf("%q is admitted", sql)
		}
	}
	if err := admitSQL(`SELECT '\''`, false); !errors.Is(err, ErrSealed) {
		t.Error("a backslash is admitted while standard_conforming_strings is off")
	}
}

func TestParseSavepoint(t *testing.T) {
	t.Parallel()
	for sql, want := range map[string]Savepoint{
		"SAVEPOINT a":     {"SAVEPOINT", `"a"`},
		"savepoint SP_1;": {"SAVEPOINT", `"sp_1"`},
		" /* c */ SavePoint -- d\n \"A b\"\"c;\" ; -- e": {"SAVEPOINT", `"A b""c;"`},
		"RELEASE a":                                {"RELEASE", `"a"`},
		"RELEASE SAVEPOINT \"a\"":                  {"RELEASE", `"a"`},
		"ROLLBACK TO a":                            {"ROLLBACK", `"a"`},
		"ROLLBACK TO SAVEPOINT a":                  {"ROLLBACK", `"a"`},
		"rollback work to a;":                      {"ROLLBACK", `"a"`},
		"ROLLBACK TRANSACTION TO SAVEPOINT a/*b*/": {"ROLLBACK", `"a"`},
	} {
		if got, ok := ParseSavepoint(sql); !ok || got != want {
			t.Errorf("%q is %v %v, want %v", sql, got, ok, want)
		}
	}
	for _, sql := range []string{
		"", "SAVEPOINT", "RELEASE SAVEPOINT", "ROLLBACK", "ROLLBACK TO", "ROLLBACK WORK", "SAVEPOINT a b", "SAVEPOINT a; COMMIT", "SAVEPOINT \"a", "SAVEPOINT \"\"", "SAVEPOINT 'a'",
		"SAVEPOINT $1", "ROLLBACK TO SAVEPOINT a; COMMIT", "ROLLBACK PREPARED 'a'", "ROLLBACK AND CHAIN", ";SAVEPOINT a", "SAVEPOINTa", "SAVEPOINT a /*", "SELECT 1",
	} {
		if got, ok := ParseSavepoint(sql); ok {
			t.Errorf("%q is read as %v", sql, got)
		}
	}
}

// FuzzParseSavepoint: a text that is read as a statement about a savepoint holds no other statement:
// without its first word the guard admits it.
func FuzzParseSavepoint(f *testing.F) {
	for _, seed := range []string{"SAVEPOINT a", "RELEASE SAVEPOINT \"a;\"", "ROLLBACK TO a;", "SAVEPOINT a -- b", "SAVEPOINT a; COMMIT", "ROLLBACK/**/TO/*;*/é"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, sql string) {
		if _, ok := ParseSavepoint(sql); !ok {
			return
		}
		s := scanner{rest: sql}
		s.skip()
		s.word()
		if err := admitSQL("SELECT "+s.rest, true); err != nil {
			t.Errorf("%q: %v", sql, err)
		}
	})
}

// FuzzAdmitSQL: a COMMIT after an admitted text is always detected, unless the text left a string
// or a comment open, in which nothing is executed.
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

// FuzzCountRows: the statement made from an admitted one is one statement too, and ends at our end:
// a string or a comment that the text leaves open would swallow the count.
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
func BenchmarkAdmitSQL(b *testing.B) {
	for name, sql := range map[string]string{
		"short": "INSERT INTO entries (transfer_id, account_id, amount) VALUES ($1, $2, $3)",
		"long": `WITH locked AS (SELECT id, balance FROM accounts WHERE id = ANY ($1) ORDER BY id FOR UPDATE) -- both, in one order
			UPDATE accounts SET balance = balance + CASE accounts.id WHEN $2 THEN -$4 ELSE $4 END, note = 'it''s moved'
			FROM locked WHERE accounts.id = locked.id AND (accounts.id <> $2 OR locked.balance >= $4) RETURNING accounts.id, accounts.balance`,
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := admitSQL(sql, true); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// The guard reads an admitted text once, within two bounds, and a refused one each time.
func TestAdmittedTextsAreBounded(t *testing.T) {
	t.Parallel()
	var remembered texts
	admit := func(sql string, plainStrings, wantRemembered bool) {
		t.Helper()
		if err := remembered.admit(sql, plainStrings); err != nil {
			t.Fatal(err)
		}
		if _, ok := remembered.admitted[sql]; ok != wantRemembered {
			t.Errorf("a text of %d bytes, plain strings %t: remembered is %t", len(sql), plainStrings, ok)
		}
	}
	admit("SELECT 0", false, false)
	admit("SELECT '"+strings.Repeat("x", textBytesMax-9)+"'", true, true)
	admit("SELECT '"+strings.Repeat("x", textBytesMax-8)+"'", true, false)
	for n := len(remembered.admitted); n < textsMax; n++ {
		admit("SELECT "+strconv.Itoa(n), true, true)
	}
	if n := len(remembered.admitted); n != textsMax {
		t.Errorf("%d texts are remembered, want %d", n, textsMax)
	}
	admit("SELECT 'one more'", true, true)
	if n := len(remembered.admitted); n != 1 {
		t.Errorf("%d texts are remembered after one over the limit, want 1", n)
	}
	for range 2 {
		if err := remembered.admit("COMMIT", true); !errors.Is(err, ErrSealed) {
			t.Errorf("COMMIT: %v", err)
		}
	}
	// A text that was admitted with plain strings may hide another statement without them.
	sql := `SELECT '\'' ; COMMIT; --'`
	admit(`SELECT 'a\'`, true, true)
	if err := remembered.admit(`SELECT 'a\'`, false); !errors.Is(err, ErrSealed) {
		t.Errorf("a backslash without plain strings: %v", err)
	}
	if err := remembered.admit(sql, false); !errors.Is(err, ErrSealed) {
		t.Errorf("%s: %v", sql, err)
	}
}
