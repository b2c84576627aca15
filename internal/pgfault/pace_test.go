package pgfault

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgproto3"
)

func TestLatencyIsAddedEachWay(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	conn := connect(t, b.url)
	b.proxy.SetLatency(150 * time.Millisecond)
	started := time.Now()
	if err := conn.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(started); took < 300*time.Millisecond {
		t.Fatalf("a round trip took %v, want at least 300ms", took)
	}
	b.proxy.SetLatency(0)
	started = time.Now()
	if err := conn.Ping(t.Context()); err != nil || time.Since(started) > 150*time.Millisecond {
		t.Fatalf("without latency: %v, %v", err, time.Since(started))
	}
}

func TestRateLimitsEachDirection(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	conn := connect(t, b.url)
	b.proxy.SetRate(10_000)
	for _, sql := range []string{
		"SELECT length('" + strings.Repeat("x", 5000) + "')",
		"SELECT repeat('x', 5000)",
	} {
		started := time.Now()
		if err := conn.PgConn().Exec(t.Context(), sql).Close(); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(started); took < 500*time.Millisecond || took > 5*time.Second {
			t.Fatalf("5000 bytes at 10000 a second took %v", took)
		}
	}
}

func TestPausedNothingPassesAndNobodyHangsUp(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	conn := connect(t, b.url)
	other := connect(t, b.url)
	b.proxy.SetPaused(true)
	b.proxy.SetPaused(true) // a second call changes nothing
	answered := make(chan error, 1)
	go func() { answered <- conn.Ping(context.Background()) }()
	connected := make(chan error, 1)
	go func() {
		late, err := pgx.Connect(context.Background(), b.url)
		if err == nil {
			err = late.Close(context.Background())
		}
		connected <- err
	}()
	if _, err := b.direct.Exec(t.Context(), "SELECT pg_terminate_backend($1, 10000)", int32(other.PgConn().PID())); err != nil {
		t.Fatal(err)
	}
	hungUp := make(chan error, 1)
	go func() {
		_, err := other.PgConn().Conn().Read(make([]byte, 1))
		hungUp <- err
	}()
	select {
	case err := <-answered:
		t.Fatalf("an answer passed: %v", err)
	case err := <-connected:
		t.Fatalf("a connection was made: %v", err)
	case err := <-hungUp:
		t.Fatalf("PostgreSQL was heard: %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	b.proxy.SetPaused(false)
	if err := errors.Join(<-answered, <-connected, <-hungUp); err != nil {
		t.Fatal(err)
	}
}

// TestPausedHangUpIsNotSeen: while the proxy is paused, the client does not see that the server
// hung up without sending anything.
func TestPausedHangUpIsNotSeen(t *testing.T) {
	t.Parallel()
	server, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	proxy, err := Start(Options{Network: "tcp", Address: server.Addr().String()})
	if err != nil {
		t.Fatal(err)
	}
	defer proxy.Close()
	client, err := net.Dial("tcp", proxy.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if _, err := client.Write(encode(t, &pgproto3.StartupMessage{ProtocolVersion: pgproto3.ProtocolVersion30})); err != nil {
		t.Fatal(err)
	}
	accepted, err := server.Accept()
	if err != nil {
		t.Fatal(err)
	}
	proxy.SetPaused(true)
	if err := accepted.Close(); err != nil {
		t.Fatal(err)
	}
	if err := client.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the client saw %v", err)
	}
	proxy.SetPaused(false)
	if err := client.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Read(make([]byte, 1)); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal("the client never saw the end")
	}
}
