package pgfault

import "bytes"

// hasCommit reports whether one of the statements in sql is COMMIT or END. It reads only enough to
// find where statements begin: quotes, dollar quotes and comments may contain semicolons.
func hasCommit(sql []byte) bool {
	for {
		sql = skipBlank(sql)
		word, rest := cutWord(sql)
		switch {
		case isWord(word, "end"):
			return true
		case isWord(word, "commit"):
			next, _ := cutWord(skipBlank(rest))
			if !isWord(next, "prepared") {
				return true
			}
		}
		if bytes.IndexByte(rest, ';') < 0 { // nearly always
			return false
		}
		var ok bool
		if sql, ok = skipStatement(sql); !ok {
			return false
		}
	}
}

// skipStatement returns everything after the statement's semicolon, or false if nothing follows.
// The body of an SQL function (BEGIN ATOMIC) has semicolons and an END of its own; nothing after it
// is examined.
func skipStatement(sql []byte) ([]byte, bool) {
	var last []byte
	for len(sql) > 0 {
		switch c := sql[0]; {
		case c == ';':
			return sql[1:], true
		case c == '\'':
			sql = skipQuoted(sql, isWord(last, "e"))
		case c == '"':
			sql = skipQuoted(sql, false)
		case c == '$':
			sql = skipDollar(sql)
		case isWordByte(c):
			word, rest := cutWord(sql)
			if isWord(word, "atomic") && isWord(last, "begin") {
				return nil, false
			}
			last, sql = word, rest
			continue // an E belongs to the quote only if nothing comes between
		default:
			if rest := skipBlank(sql); len(rest) < len(sql) {
				sql = rest
				if isWord(last, "e") {
					last = nil
				}
				continue
			}
			sql = sql[1:]
		}
		last = nil
	}
	return nil, false
}

// skipBlank skips spaces, comments and empty statements.
func skipBlank(sql []byte) []byte {
	for len(sql) > 0 {
		switch {
		case sql[0] == ' ', '\t' <= sql[0] && sql[0] <= '\r':
			sql = sql[1:]
		case bytes.HasPrefix(sql, []byte("--")):
			end := bytes.IndexAny(sql, "\r\n")
			if end < 0 {
				return nil
			}
			sql = sql[end:]
		case bytes.HasPrefix(sql, []byte("/*")):
			sql = skipComment(sql)
		default:
			return sql
		}
	}
	return nil
}

// skipComment skips a comment, which may contain others.
func skipComment(sql []byte) []byte {
	depth := 0
	for i := 0; i+1 < len(sql); i++ {
		switch {
		case sql[i] == '/' && sql[i+1] == '*':
			depth++
			i++
		case sql[i] == '*' && sql[i+1] == '/':
			depth--
			i++
			if depth == 0 {
				return sql[i+1:]
			}
		}
	}
	return nil
}

// skipQuoted skips a literal or a quoted name. It reads a doubled quote as the end of one and the
// start of another, which has the same effect.
func skipQuoted(sql []byte, escapes bool) []byte {
	for i := 1; i < len(sql); i++ {
		switch {
		case escapes && sql[i] == '\\':
			i++
		case sql[i] == sql[0] && escapes && i+1 < len(sql) && sql[i+1] == sql[0]:
			i++ // the next character still has escapes
		case sql[i] == sql[0]:
			return sql[i+1:]
		}
	}
	return nil
}

// skipDollar skips a dollar-quoted literal, or the dollar of a parameter.
func skipDollar(sql []byte) []byte {
	end := 1
	for end < len(sql) && isWordByte(sql[end]) {
		end++
	}
	if end == len(sql) || sql[end] != '$' || end > 1 && '0' <= sql[1] && sql[1] <= '9' {
		return sql[1:]
	}
	tag := sql[:end+1]
	_, rest, _ := bytes.Cut(sql[len(tag):], tag)
	return rest
}

// cutWord cuts off a keyword or name. A dollar inside a word begins no quote.
func cutWord(sql []byte) (word, rest []byte) {
	n := 0
	for n < len(sql) && (isWordByte(sql[n]) || n > 0 && sql[n] == '$') {
		n++
	}
	return sql[:n], sql[n:]
}

func isWordByte(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '_' || c >= 0x80
}

func isWord(word []byte, lower string) bool {
	return len(word) == len(lower) && bytes.EqualFold(word, []byte(lower))
}
