package wire

import (
	"errors"
	"testing"

	"github.com/jackc/pgx/v5/pgproto3"
)

// After the server has answered COMMIT, no message of the server or a pooler takes it back: neither
// an error of any severity, nor a connection that breaks.
func TestErrorBehindTheReplyToCommitTakesNothingBack(t *testing.T) {
	t.Parallel()
	committed := []pgproto3.BackendMessage{
		&pgproto3.BindComplete{}, &pgproto3.CommandComplete{CommandTag: []byte("INSERT 0 1")},
		&pgproto3.BindComplete{}, &pgproto3.CommandComplete{CommandTag: []byte("COMMIT")},
	}
	for _, severity := range []string{"ERROR", "FATAL", ""} {
		failure := &pgproto3.ErrorResponse{Severity: severity, SeverityUnlocalized: severity, Code: "57014"}
		for name, last := range map[string]pgproto3.BackendMessage{"ready": &pgproto3.ReadyForQuery{TxStatus: 'I'}, "broken": nil} {
			reader := replyReader{calls: make([]Call, 2), syncs: 1}
			for _, message := range append(committed, failure) {
				if over, err := reader.read(message); over || err != nil {
					t.Fatal(over, err)
				}
			}
			err := reader.err
			if last == nil {
				err = reader.broken(errors.New("connection reset"))
			} else if over, broken := reader.read(last); !over || broken != nil {
				t.Errorf("%s, %q: %v, %v", name, severity, over, broken)
			}
			if err != nil || !reader.reply.Committed || reader.reply.Failed != 2 {
				t.Errorf("%s, %q: %v, %+v", name, severity, err, reader.reply)
			}
		}
	}
}
