package wire

import "github.com/jackc/pgx/v5/pgconn"

// PlainText reports whether the server takes our text as the bytes that we send, and keeps
// different texts different. With another client_encoding it would read another scope from the same
// bytes: the look-up would miss, the primary key would not conflict, and the handler would pay
// again. A database in EUC_JP, for example, may convert two scopes to the same text.
func PlainText(conn *pgconn.PgConn) bool {
	server := conn.ParameterStatus("server_encoding")
	kept := server == "UTF8" || server == "SQL_ASCII"
	switch conn.ParameterStatus("client_encoding") {
	case "UTF8":
		return kept || server == "" // a pooler might not report it; Check asks
	case "SQL_ASCII": // nothing is converted
		return kept
	}
	return false
}
