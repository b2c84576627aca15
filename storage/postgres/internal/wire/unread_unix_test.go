//go:build unix

package wire_test

import (
	"crypto/tls"
	"net"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// pair returns both ends of a connection by TCP.
func pair(t *testing.T) (client, server net.Conn) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = listener.Close() }()
	if client, err = net.Dial("tcp", listener.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if server, err = listener.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = client.Close(), server.Close() })
	return client, server
}

// wantUnread waits until something is to be read from the connection.
func wantUnread(t *testing.T, conn net.Conn) {
	t.Helper()
	for start := time.Now(); !wire.Unread(conn); time.Sleep(time.Millisecond) {
		if time.Since(start) > 20*time.Second {
			t.Fatal("nothing is to be read")
		}
	}
}

func TestUnreadSeesDataAndEnds(t *testing.T) {
	t.Parallel()
	client, server := pair(t)
	if wire.Unread(client) {
		t.Error("a connection without data has some")
	}
	received := make(chan error, 1)
	go func() { // does not hinder it
		_, err := client.Read(make([]byte, 1))
		received <- err
	}()
	if wire.Unread(client) {
		t.Error("a connection without data has some, while somebody reads")
	}
	if _, err := server.Write([]byte("ab")); err != nil {
		t.Fatal(err)
	}
	if err := <-received; err != nil {
		t.Fatal(err)
	}
	wantUnread(t, client)
	var rest [1]byte
	if _, err := client.Read(rest[:]); err != nil || rest[0] != 'b' || wire.Unread(client) {
		t.Errorf("after the look, read %q, %v", rest, err)
	}
	_ = server.Close()
	wantUnread(t, client)
	_ = client.Close()
	wantUnread(t, client)
}

func TestUnreadSeesTheEndOfAnEncryptedConnection(t *testing.T) {
	t.Parallel()
	service := httptest.NewTLSServer(nil)
	defer service.Close()
	conn, err := tls.Dial("tcp", service.Listener.Addr().String(), &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if wire.Unread(conn) {
		t.Error("a connection without data has some")
	}
	service.CloseClientConnections()
	wantUnread(t, conn)
}
