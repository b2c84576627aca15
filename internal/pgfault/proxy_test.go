package pgfault

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"go.uber.org/goleak"

	"github.com/paidonce/idempotency/internal/pgtest"
)

func TestRefusedConnectionsAreClosed(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	conn := connect(t, b.url)
	b.proxy.SetRefuse(true)
	if late, err := pgx.Connect(t.Context(), b.url); err == nil {
		_ = late.Close(t.Context())
		t.Fatal("a connection was let in")
	}
	if err := conn.Ping(t.Context()); err != nil {
		t.Fatalf("an old connection: %v", err)
	}
	b.proxy.SetRefuse(false)
	connect(t, b.url)
}

func TestCutAllEndsEveryConnection(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	conns := []*pgx.Conn{connect(t, b.url), connect(t, b.url), connect(t, b.url)}
	if n := b.proxy.Connections(); n != len(conns) {
		t.Fatalf("%d connections", n)
	}
	b.proxy.SetPaused(true) // also conns that wait
	if n := b.proxy.CutAll(); n != len(conns) {
		t.Fatalf("%d connections cut", n)
	}
	for _, conn := range conns {
		if err := conn.Ping(t.Context()); err == nil {
			t.Fatal("a connection still answers")
		}
	}
	// For pgx's CancelRequests, which are conns too.
	b.proxy.SetPaused(false)
	eventually(t, "nothing is open", func() bool { return b.proxy.Connections() == 0 && b.backends(t, "") == 0 })
}

func TestSetUpstreamLeadsNewConnectionsElsewhere(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	old := connect(t, b.url)
	elsewhere, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer elsewhere.Close()
	b.proxy.SetUpstream("tcp", elsewhere.Addr().String())
	result := make(chan error, 1)
	go func() {
		late, err := pgx.Connect(context.Background(), b.url)
		if err == nil {
			_ = late.Close(context.Background())
		}
		result <- err
	}()
	server, err := elsewhere.Accept()
	if err != nil {
		t.Fatal(err)
	}
	_ = server.Close()
	if err := <-result; err == nil {
		t.Fatal("the new connection leads to PostgreSQL")
	}
	if err := old.Ping(t.Context()); err != nil {
		t.Fatalf("the old connection: %v", err)
	}
}

func TestUpstreamThatIsNotThereHangsUp(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.proxy.SetUpstream("unix", "/nowhere/.s.PGSQL.5432")
	if conn, err := pgx.Connect(t.Context(), b.url); err == nil {
		_ = conn.Close(t.Context())
		t.Fatal("connected to nothing")
	}
}

// TestTCPUpstream goes through two proxies; the first reaches the second by TCP.
func TestTCPUpstream(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	network, address, err := Upstream(b.url)
	if err != nil || network != "tcp" || address != b.proxy.Addr() {
		t.Fatalf("%s %s: %v", network, address, err)
	}
	second, err := Start(Options{Network: network, Address: address})
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	conn := connect(t, second.URL(b.url))
	if _, err := conn.Exec(t.Context(), "INSERT INTO payments VALUES ('1')"); err != nil || b.payments(t) != 1 {
		t.Fatal(err, b.payments(t))
	}
}

func TestEncryptionIsDeclined(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	conn := connect(t, strings.Replace(b.url, "sslmode=disable", "sslmode=prefer", 1))
	if err := conn.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	gss, err := net.Dial("tcp", b.proxy.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer gss.Close()
	message, err := (&pgproto3.GSSEncRequest{}).Encode(nil)
	if err != nil {
		t.Fatal(err)
	}
	reply := make([]byte, 1)
	if _, err := gss.Write(message); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(gss, reply); err != nil || reply[0] != 'N' {
		t.Fatalf("%q, %v", reply, err)
	}
}

func TestCancelRequestPasses(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	conn := connect(t, b.url)
	result := make(chan error, 1)
	go func() { result <- conn.PgConn().Exec(context.Background(), "SELECT pg_sleep(30)").Close() }()
	eventually(t, "it sleeps", func() bool {
		return b.count(t, "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND pid = $1", int32(conn.PgConn().PID())) == 1
	})
	if err := conn.PgConn().CancelRequest(t.Context()); err != nil {
		t.Fatal(err)
	}
	var pgErr *pgconn.PgError
	if err := <-result; !errors.As(err, &pgErr) || pgErr.Code != "57014" {
		t.Fatalf("got %v", err)
	}
}

func TestManyConnectionsAtOnce(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	const clients, payments = 8, 50
	var running sync.WaitGroup
	for client := range clients {
		conn := connect(t, b.url)
		running.Go(func() {
			for i := range payments {
				err := pgx.BeginFunc(context.Background(), conn, func(tx pgx.Tx) error {
					_, err := tx.Exec(context.Background(), "INSERT INTO payments VALUES ($1)", fmt.Sprint(client, " ", i))
					return err
				})
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	running.Wait()
	if n := b.payments(t); n != clients*payments || b.proxy.Hits()[Forward] != clients*payments {
		t.Fatalf("%d payments, hits %v", n, b.proxy.Hits())
	}
}

// TestCloseLeavesNothing closes a proxy in every state that a conn can be in.
func TestCloseLeavesNothing(t *testing.T) {
	url := pgtest.Database(t)
	before := goleak.IgnoreCurrent()
	for _, kind := range []Kind{Forward, Silence, HalfOpen, LateCommit, DelayReply} {
		network, address, err := Upstream(url)
		if err != nil {
			t.Fatal(err)
		}
		proxy, err := Start(Options{Network: network, Address: address, OnCommit: func(Commit) Fault {
			return Fault{Kind: kind, Delay: time.Hour}
		}})
		if err != nil {
			t.Fatal(err)
		}
		idle, err := net.Dial("tcp", proxy.Addr())
		if err != nil {
			t.Fatal(err)
		}
		conn, err := pgconn.Connect(t.Context(), proxy.URL(url))
		if err != nil {
			t.Fatal(err)
		}
		result := make(chan error, 1)
		go func() { result <- conn.Exec(context.Background(), "BEGIN; COMMIT").Close() }()
		eventually(t, "the COMMIT is there", func() bool { return proxy.Hits()[kind] == 1 })
		proxy.SetPaused(true)
		if err := errors.Join(proxy.Close(), proxy.Close()); err != nil {
			t.Fatal(err)
		}
		<-result
		_ = conn.Close(t.Context())
		<-conn.CleanupDone()
		_ = idle.Close()
	}
	if err := goleak.Find(before); err != nil {
		t.Fatal(err)
	}
}

func TestCloseWaitsForHooks(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	b := setup(t, func(Commit) Fault {
		return Fault{Kind: CallBefore, Hook: func() { <-release }}
	})
	conn := connect(t, b.url)
	result := make(chan error, 1)
	go func() {
		_, err := conn.Exec(context.Background(), "COMMIT")
		result <- err
	}()
	eventually(t, "the COMMIT is there", func() bool { return b.proxy.Hits()[CallBefore] == 1 })
	closed := make(chan error, 1)
	go func() { closed <- b.proxy.Close() }()
	select {
	case err := <-closed:
		t.Errorf("Close returned before the hook did: %v", err)
		closed <- err
	case <-time.After(100 * time.Millisecond):
	}
	close(release)
	if err := <-closed; err != nil {
		t.Error(err)
	}
	<-result
}

func TestURLKeepsEverythingButTheHost(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	got := b.proxy.URL("postgres://user:p%40ss@db:1/bank?host=/tmp/x&port=5&sslmode=require&application_name=a")
	if want := "postgres://user:p%40ss@" + b.proxy.Addr() + "/bank?application_name=a&sslmode=disable"; got != want {
		t.Fatalf("got  %s\nwant %s", got, want)
	}
}
