package client_test

import (
	"net"
	"net/http"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
)

// blackHole returns an address of the loopback interface that answers no SYN, because its queue is
// full.
func blackHole(t *testing.T) string {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Close(fd) }) // a test's socket
	if err := syscall.Bind(fd, &syscall.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	name, err := syscall.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	address := net.JoinHostPort("127.0.0.1", strconv.Itoa(name.(*syscall.SockaddrInet4).Port))
	for range 4 {
		conn, err := net.DialTimeout("tcp", address, 200*time.Millisecond)
		if err != nil {
			return address
		}
		t.Cleanup(func() { _ = conn.Close() }) // it was there to fill the queue
	}
	t.Skip("THIS FAULT WAS NOT TESTED: this kernel's queue does not fill")
	return ""
}

// TestBlackHoleIsNotExecuted: the timeouts of the dialer and of the attempt are equal by default,
// and either may end first.
func TestBlackHoleIsNotExecuted(t *testing.T) {
	t.Parallel()
	address := blackHole(t)
	const both = 200 * time.Millisecond
	for range 8 {
		base := &http.Transport{DialContext: (&net.Dialer{Timeout: both}).DialContext}
		c := &http.Client{Transport: client.New(base, quick(func(o *client.Options) { o.AttemptTimeout, o.AttemptsMax = both, 1 }))}
		_, _, err := post(t, c, t.Context(), "http://"+address, "body")
		expectError(t, err, idempotency.OutcomeNotExecuted, client.ErrAttemptsSpent)
	}
}
