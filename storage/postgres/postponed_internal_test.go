package postgres

import (
	"io"
	"net"
	"testing"

	"github.com/jackc/pgx/v5/pgproto3"
)

// claimReplies are what the server sends when a claim succeeds, and one message that is pgx's.
func claimReplies(t *testing.T) (claim, rest []byte) {
	t.Helper()
	encode := func(to []byte, messages ...interface {
		Encode(dst []byte) ([]byte, error)
	}) []byte {
		for _, message := range messages {
			var err error
			if to, err = message.Encode(to); err != nil {
				t.Fatal(err)
			}
		}
		return to
	}
	bound, done := &pgproto3.BindComplete{}, func(tag string) *pgproto3.CommandComplete { return &pgproto3.CommandComplete{CommandTag: []byte(tag)} }
	row := &pgproto3.DataRow{Values: [][]byte{{0, 0, 0, 1}, make([]byte, 8), {0}}}
	claim = encode(nil, bound, done("BEGIN"), bound, row, done("SELECT 1"), bound, done("SELECT 0"))
	return claim, encode(nil, &pgproto3.ReadyForQuery{TxStatus: 'T'})
}

func newTestClaim(conn *tappedConn) *postponedClaim {
	o := (&Options{}).full()
	s := newStatements(o)
	a := &attempt{store: &Store{}}
	p := &postponedClaim{conn: conn, statements: &s, calls: [...]call{
		{statement: &s.begin}, {statement: &s.lockOrFail, row: lockOrFailRow{a}}, {statement: &s.lookUpAbsent, row: recordRow{a}},
	}}
	p.reader.calls, p.tap.claim = p.calls[:], p
	return p
}

// pgx is given what is its own, however the network cuts the messages, and although it began to read before there was a claim:
// pgconn does so in the background when a write takes long.
func TestTapTakesTheClaimsRepliesOutOfAnyRead(t *testing.T) {
	t.Parallel()
	claim, rest := claimReplies(t)
	sent := append(append([]byte{}, claim...), rest...)
	for _, early := range []bool{false, true} {
		for cut := 1; cut <= len(sent); cut++ {
			ours, server := net.Pipe()
			conn := &tappedConn{Conn: ours}
			p := newTestClaim(conn)
			got, begun := make(chan []byte, 1), make(chan struct{})
			read := func() {
				close(begun)
				buffer := make([]byte, len(rest))
				if _, err := io.ReadFull(conn, buffer); err != nil {
					t.Error(err)
				}
				got <- buffer
			}
			if early {
				go read()
				<-begun
			}
			conn.hold([]byte("held"), &p.tap)
			if !early {
				go read()
			}
			for from := 0; from < len(sent); from += cut {
				if _, err := server.Write(sent[from:min(from+cut, len(sent))]); err != nil {
					t.Fatal(err)
				}
			}
			if buffer := <-got; string(buffer) != string(rest) {
				t.Fatalf("cut at %d: pgx reads %q, want %q", cut, buffer, rest)
			}
			if !p.granted() || conn.tap.Load() != nil {
				t.Fatalf("cut at %d: granted: %t, the tap is gone: %t", cut, p.granted(), conn.tap.Load() == nil)
			}
			_, _ = ours.Close(), server.Close()
		}
	}
}
