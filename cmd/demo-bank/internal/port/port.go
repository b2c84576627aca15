// Package port opens the addresses of the bank's commands.
package port

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"syscall"
)

// Listen opens the address for a command with the flag --addr. The error is one line that names the
// remedy.
func Listen(ctx context.Context, addr string) (net.Listener, error) {
	var config net.ListenConfig
	listener, err := config.Listen(ctx, "tcp", addr)
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("the address %s is taken: stop the program that listens there, or choose another with --addr (127.0.0.1:0 takes any free port)", addr)
	case err != nil:
		return nil, fmt.Errorf("can't listen on %s: %w: choose another address with --addr", addr, err)
	}
	return listener, nil
}

// URL returns the URL of a listener as seen from this machine.
func URL(addr net.Addr) string {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return "http://" + addr.String()
	}
	host := tcp.IP.String()
	if tcp.IP.IsUnspecified() {
		host = "127.0.0.1"
	}
	return "http://" + net.JoinHostPort(host, strconv.Itoa(tcp.Port))
}
