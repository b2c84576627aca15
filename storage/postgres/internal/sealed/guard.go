package sealed

import (
	"fmt"
	"strconv"
	"strings"
	"sync"
)

// admitSQL refuses SQL text that controls transactions, and several statements in one string,
// before anything is sent: "insert ...; commit; begin" would leave a healthy transaction behind
// that is not ours, and the retry would pay again.
//
// It reads text as PostgreSQL's scanner does, and refuses text that the two could read differently.
// plainStrings is standard_conforming_strings: if it is off, a backslash may hide the end of a
// string.
func admitSQL(sql string, plainStrings bool) error {
	if !plainStrings && strings.IndexByte(sql, '\\') >= 0 {
		return fmt.Errorf("%w: a backslash in SQL text is refused while standard_conforming_strings is off", ErrSealed)
	}
	s := &scanner{rest: sql}
	for s.skip(); s.rest != "" && s.rest[0] == ';'; s.skip() { // empty statements
		s.rest = s.rest[1:]
	}
	switch verb := strings.ToUpper(s.word()); verb {
	case "COMMIT", "END", "ROLLBACK", "ABORT", "BEGIN", "START":
		return fmt.Errorf("%w: %s by SQL text is refused: it is ended when the handler returns; Begin opens a nested one", ErrSealed, verb)
	case "SAVEPOINT", "RELEASE":
		return fmt.Errorf("%w: %s by SQL text is refused: use Begin on the transaction", ErrSealed, verb)
	case "LISTEN":
		return fmt.Errorf("%w: LISTEN is refused: the connection goes back to the pool, and its notifications would pile up: listen on a connection of your own", ErrSealed)
	case "DECLARE":
		if s.holdsCursor() {
			return fmt.Errorf("%w: a cursor WITH HOLD is refused: COMMIT would run its query, after the record was written", ErrSealed)
		}
	case "PREPARE":
		if s.skip(); strings.ToUpper(s.word()) == "TRANSACTION" {
			return fmt.Errorf("%w: PREPARE TRANSACTION is refused", ErrSealed)
		}
	}
	for s.rest != "" {
		if s.rest[0] != ';' {
			s.token()
			continue
		}
		s.rest = s.rest[1:]
		if s.skip(); s.rest != "" && s.rest[0] != ';' {
			return fmt.Errorf("%w: several statements in one string are refused: send them one by one or as a batch", ErrSealed)
		}
	}
	if s.open { // in a batch of the simple protocol the next statement would end it
		return fmt.Errorf("%w: a string, name or comment that does not end is refused", ErrSealed)
	}
	return nil
}

// Limits of the SQL texts that are remembered as admitted.
const (
	textsMax     = 1024 // of a store; then all are forgotten
	textBytesMax = 4096 // of one; a longer text is read each time
)

// texts remembers the SQL texts that were admitted with plain strings, so that the guard reads each
// once. It is safe for concurrent use.
type texts struct {
	mu       sync.RWMutex
	admitted map[string]struct{}
}

// admit is like admitSQL, but returns nil at once for a text that is remembered.
func (t *texts) admit(sql string, plainStrings bool) error {
	if !plainStrings || len(sql) > textBytesMax {
		return admitSQL(sql, plainStrings)
	}
	t.mu.RLock()
	_, admitted := t.admitted[sql]
	t.mu.RUnlock()
	if admitted {
		return nil
	}
	if err := admitSQL(sql, plainStrings); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.admitted == nil || len(t.admitted) >= textsMax {
		t.admitted = map[string]struct{}{}
	}
	t.admitted[strings.Clone(sql)] = struct{}{}
	return nil
}

// scanner goes through SQL text token by token.
type scanner struct {
	rest string
	open bool // a string, name or comment reached the end of the text
}

// skip passes over white space and comments.
func (s *scanner) skip() {
	for {
		s.rest = strings.TrimLeft(s.rest, " \t\r\n\f\v")
		switch {
		case strings.HasPrefix(s.rest, "--"):
			end := strings.IndexAny(s.rest, "\r\n")
			if end < 0 {
				end = len(s.rest)
			}
			s.rest = s.rest[end:]
		case strings.HasPrefix(s.rest, "/*"):
			s.comment()
		default:
			return
		}
	}
}

// comment passes over a block comment. They nest.
func (s *scanner) comment() {
	depth := 0
	for s.rest != "" {
		switch {
		case strings.HasPrefix(s.rest, "/*"):
			depth++
			s.rest = s.rest[2:]
		case strings.HasPrefix(s.rest, "*/"):
			depth--
			s.rest = s.rest[2:]
			if depth == 0 {
				return
			}
		default:
			s.rest = s.rest[1:]
		}
	}
	s.open = true
}

// word takes a word and returns it. It returns "" if none begins here.
func (s *scanner) word() string {
	end := 0
	if s.rest != "" && s.rest[0] == '$' {
		return "" // of a parameter or a string
	}
	for end < len(s.rest) && isWordByte(s.rest[end]) {
		end++
	}
	word := s.rest[:end]
	s.rest = s.rest[end:]
	return word
}

// holdsCursor reports whether a DECLARE has WITH HOLD, which precedes its FOR.
func (s *scanner) holdsCursor() bool {
	for last := ""; ; {
		s.skip()
		if s.rest == "" || s.rest[0] == ';' {
			return false
		}
		word := strings.ToUpper(s.word())
		switch {
		case word == "HOLD" && last == "WITH":
			return true
		case word == "FOR":
			return false
		case word == "": // a quoted name
			s.token()
		}
		last = word
	}
}

// token takes one token, and white space and comments before it. At a semicolon it stops.
func (s *scanner) token() {
	s.skip()
	if s.rest == "" || s.rest[0] == ';' {
		return
	}
	switch c := s.rest[0]; {
	case c == '\'':
		s.quoted('\'', false)
	case c == '"':
		s.quoted('"', false)
	case c == '$':
		s.dollar()
	case isWordByte(c):
		word := s.word()
		for (word == "E" || word == "e") && s.rest != "" && s.rest[0] == '\'' {
			s.quoted('\'', true)
			s.skip() // after a new line the string continues, and so do its escapes
		}
	default:
		s.rest = s.rest[1:]
	}
}

// quoted passes over a quoted string or name, in which the quote is doubled or, in an E string,
// escaped. It reads a doubled quote as an end and a new beginning, which has the same result.
func (s *scanner) quoted(quote byte, escapes bool) {
	for i := 1; i < len(s.rest); i++ {
		switch {
		case s.rest[i] == '\\' && escapes:
			i++
		case s.rest[i] == quote && escapes && i+1 < len(s.rest) && s.rest[i+1] == quote:
			i++ // the string continues, and so do its escapes
		case s.rest[i] == quote:
			s.rest = s.rest[i+1:]
			return
		}
	}
	s.rest, s.open = "", true
}

// dollar passes over a dollar-quoted string, or only the sign of a parameter.
func (s *scanner) dollar() {
	end := 1
	for end < len(s.rest) && isWordByte(s.rest[end]) && s.rest[end] != '$' {
		end++
	}
	isTag := end < len(s.rest) && s.rest[end] == '$' && (end == 1 || s.rest[1] < '0' || s.rest[1] > '9')
	if !isTag {
		s.rest = s.rest[1:]
		return
	}
	tag := s.rest[:end+1]
	_, after, found := strings.Cut(s.rest[len(tag):], tag)
	if !found {
		after, s.open = "", true
	}
	s.rest = after
}

func isWordByte(c byte) bool {
	return c == '_' || c == '$' || c >= 0x80 || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

// countRows returns a statement that does the same as sql, but fails with a division by zero unless
// it touches the given number of rows. It also returns the number of parameters. sql has been
// admitted: it is one statement, and ends outside of strings and comments.
func countRows(sql string, rows int) (counted string, params int, err error) {
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
		count = "1 OPERATOR(pg_catalog./) CASE WHEN pg_catalog.count(*) OPERATOR(pg_catalog.=) " + strconv.Itoa(rows) + " THEN 1 ELSE 0 END"
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
