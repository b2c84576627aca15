package pgfault

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
)

// TestCopyBothWays copies more than any buffer holds, in and out, between COMMITs that are still
// seen.
func TestCopyBothWays(t *testing.T) {
	t.Parallel()
	var commits atomic.Int64
	b := setup(t, func(Commit) Fault {
		commits.Add(1)
		return Fault{Kind: CallAfter}
	})
	conn := connect(t, b.url)
	text := make([]byte, 3<<20)
	for i := 0; i < len(text); i += 64 {
		copy(text[i:], rand.Text())
		copy(text[i+26:], fmt.Sprintf("%037d\n", i))
	}
	if _, err := conn.Exec(t.Context(), "BEGIN; CREATE TABLE lines (line text); COMMIT"); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.PgConn().CopyFrom(t.Context(), bytes.NewReader(text), "COPY lines FROM STDIN"); err != nil {
		t.Fatal(err)
	}
	var back bytes.Buffer
	if _, err := conn.PgConn().CopyTo(t.Context(), &back, "COPY lines TO STDOUT"); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(text, back.Bytes()) {
		t.Fatal("what came back is not what went in")
	}
	if _, err := conn.Exec(t.Context(), "BEGIN; COMMIT"); err != nil || commits.Load() != 2 {
		t.Fatalf("%v, %d COMMITs", err, commits.Load())
	}
}

// hijack connects, for a test that sends its messages itself.
func hijack(t *testing.T, url string) *pgconn.HijackedConn {
	t.Helper()
	conn, err := pgconn.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	hijacked, err := conn.Hijack()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = hijacked.Conn.Close() })
	if err := hijacked.Conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return hijacked
}

// TestCopyByTheExtendedProtocol: PostgreSQL ignores a Sync that is sent before the data, so the
// next COMMIT's reply must not be taken for an earlier one's.
func TestCopyByTheExtendedProtocol(t *testing.T) {
	t.Parallel()
	fault := make(chan Fault, 1)
	b := setup(t, func(Commit) Fault { return <-fault })
	hijacked := hijack(t, b.url)
	frontend := hijacked.Frontend
	send := func(messages ...pgproto3.FrontendMessage) {
		for _, message := range messages {
			frontend.Send(message)
		}
		if err := frontend.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	await := func(ready bool) {
		for {
			message, err := frontend.Receive()
			if err != nil {
				t.Fatal(err)
			}
			switch m := message.(type) {
			case *pgproto3.CopyInResponse:
				if !ready {
					return
				}
			case *pgproto3.ReadyForQuery:
				return
			case *pgproto3.ErrorResponse:
				t.Fatal(m.Message)
			}
		}
	}
	send(&pgproto3.Query{String: "BEGIN"})
	await(true)
	send(&pgproto3.Parse{Query: "COPY payments FROM STDIN"}, &pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Sync{})
	await(false)
	send(&pgproto3.CopyData{Data: []byte("1\n")}, &pgproto3.CopyDone{}, &pgproto3.Sync{})
	await(true)
	fault <- Fault{Kind: CutAfter}
	send(&pgproto3.Query{String: "COMMIT"})
	if message, err := frontend.Receive(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the connection was not cut: %T, %v", message, err)
	}
	if n := b.payments(t); n != 1 {
		t.Fatalf("%d payments", n)
	}
}

// TestFlushMessageIsForwardedAtOnce: the client waits for an answer before it sends the COMMIT.
func TestFlushMessageIsForwardedAtOnce(t *testing.T) {
	t.Parallel()
	seen := make(chan Commit, 1)
	b := setup(t, func(commit Commit) Fault {
		seen <- commit
		return Fault{Kind: CutBefore}
	})
	conn := connect(t, b.url).PgConn()
	if err := conn.Exec(t.Context(), "BEGIN").Close(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	pipeline := conn.StartPipeline(ctx)
	pipeline.SendQueryParams("INSERT INTO payments VALUES ($1)", [][]byte{[]byte("payment-1")}, nil, nil, nil)
	pipeline.SendFlushRequest()
	if err := pipeline.Flush(); err != nil {
		t.Fatal(err)
	}
	results, err := pipeline.GetResults()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := results.(*pgconn.ResultReader).Close(); err != nil {
		t.Fatal(err)
	}
	pipeline.SendQueryParams("COMMIT", nil, nil, nil, nil)
	if err := finish(pipeline, pipeline.Sync()); err == nil {
		t.Fatal("the COMMIT was answered")
	}
	if commit := <-seen; !bytes.Contains(commit.Messages, []byte("payment-1")) || !bytes.Contains(commit.Messages, []byte("COMMIT")) {
		t.Errorf("messages: %q", commit.Messages)
	}
	if n := b.payments(t); n != 0 {
		t.Fatalf("%d payments", n)
	}
}

// TestClientThatHangsUpBehindItsCommit: everything that was sent is done, as without a proxy.
func TestClientThatHangsUpBehindItsCommit(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	hijacked := hijack(t, b.url)
	for _, message := range []pgproto3.FrontendMessage{
		&pgproto3.Query{String: "BEGIN; INSERT INTO payments VALUES ('1')"},
		&pgproto3.Parse{Query: "COMMIT"}, &pgproto3.Bind{}, &pgproto3.Execute{}, // without a Sync
	} {
		hijacked.Frontend.Send(message)
	}
	if err := hijacked.Frontend.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := hijacked.Conn.Close(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the payment is committed", func() bool { return b.payments(t) == 1 })
	eventually(t, "nothing is open", func() bool { return b.proxy.Connections() == 0 && b.backends(t, "") == 0 })
}

func TestFatalErrorReachesTheClient(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	_, err := pgx.Connect(t.Context(), strings.Replace(b.url, "/test_", "/absent_", 1))
	var pgErr *pgconn.PgError
	if !errors.As(err, &pgErr) || pgErr.Code != "3D000" {
		t.Fatalf("got %v", err)
	}
}
