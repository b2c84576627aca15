package pgfault

import (
	"testing"
)

func TestHasCommit(t *testing.T) {
	t.Parallel()
	for sql, want := range map[string]bool{
		"commit":             true,
		"COMMIT":             true,
		" \t\r\n;; Commit ;": true,
		"end":                true,
		"END TRANSACTION":    true,
		"COMMIT AND CHAIN":   true,
		"/* a /* nested */ comment; */ -- and\nEND": true,
		"-- commit\rcommit":                         true,
		"insert into a values ('x'); commit":        true,
		"insert into a values (';'); commit":        true,
		`insert into a values (E'\'; x'); commit`:   true,
		`insert into a values (E'''\'; x'); commit`: true,
		`insert into a values ('\'); commit`:        true,
		"select $$;$$, $a$ $b$ ; $a$; commit":       true,
		"select $1; commit":                         true,
		"select a$b$ from c; commit":                true,
		`select ";"; commit`:                        true,
		"begin; select 1; end":                      true,

		"": false, ";": false, "e": false, "'": false, "/*": false, "$a$": false, "--": false,
		"committed":                  false,
		"endless":                    false,
		"rollback":                   false,
		"select 'x; commit'":         false,
		"select 'it''s; commit'":     false,
		`select E'\'; commit'`:       false,
		`select E'a'';\'; commit'`:   false,
		`select "x; commit"`:         false,
		"select $$; commit$$":        false,
		"select $a$; commit; $$ $a$": false,
		"/* ; commit */ select 1":    false,
		"-- ; commit":                false,
		"select 1 -- x\n; -- commit": false,
		"select commit":              false,
		"commit prepared 'a'":        false,
		"COMMIT /**/ PREPARED 'a'":   false,
		"create function f() returns int begin atomic select 1; end": false,
	} {
		if got := hasCommit([]byte(sql)); got != want {
			t.Errorf("hasCommit(%q) = %t", sql, got)
		}
	}
}
