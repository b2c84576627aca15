package wire

import "github.com/jackc/pgx/v5/pgconn"

// warningMark is the key under which a connection's custom data holds the server routine that sent
// a warning. If the wait of a COMMIT for the standbys was canceled, a warning is the only sign:
// COMMIT succeeds.
const warningMark = "paidonce/idempotency/warned"

// canceledWait is the routine that warns of such a COMMIT.
const canceledWait = "SyncRepWaitForLSN"

// ForgetWarning removes the mark of a warning from the connection.
func ForgetWarning(conn *pgconn.PgConn) { delete(conn.CustomData(), warningMark) }

// WarningForgotten takes the row of the last statement before COMMIT. A warning of the statements,
// constraints and triggers up to there is not taken for a warning of COMMIT.
type WarningForgotten struct{ Conn *pgconn.PgConn }

// ReadRow implements [RowReader].
func (r WarningForgotten) ReadRow([][]byte) error {
	ForgetWarning(r.Conn)
	return nil
}

// Warned reports whether a warning has come since the last ForgetWarning.
func Warned(conn *pgconn.PgConn) bool { return conn.CustomData()[warningMark] != nil }

// WaitedInVain reports whether the wait of the last COMMIT for the standbys was cut short.
// synchronous means that there were standbys when the transaction began: then any warning counts,
// because not every server names its routines.
func WaitedInVain(conn *pgconn.PgConn, synchronous bool) bool {
	routine, ok := conn.CustomData()[warningMark].(string)
	return ok && (synchronous || routine == canceledWait)
}

// MarkWarnings returns a notice handler that calls inner, and marks the connection if the notice is
// a warning.
func MarkWarnings(inner pgconn.NoticeHandler) pgconn.NoticeHandler {
	return func(conn *pgconn.PgConn, notice *pgconn.Notice) {
		if inner != nil {
			inner(conn, notice)
		}
		if notice.SeverityUnlocalized == "WARNING" {
			// Keep the mark of a canceled wait if other warnings follow.
			if mark := conn.CustomData(); mark[warningMark] != canceledWait {
				mark[warningMark] = notice.Routine
			}
		}
	}
}
