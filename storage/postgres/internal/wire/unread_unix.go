//go:build unix

package wire

import (
	"net"
	"syscall"
)

// Unread reports whether bytes from the server, or the end of the connection, wait to be read. It
// also reports true after a Close, and false for a kind of connection that it does not know. It
// takes nothing from the connection, and does not disturb a Read or Write in another goroutine.
func Unread(conn net.Conn) bool {
	for {
		outer, ok := conn.(interface{ NetConn() net.Conn }) // as tls.Conn
		if !ok {
			break
		}
		conn = outer.NetConn()
	}
	socket, ok := conn.(syscall.Conn)
	if !ok { // a DialFunc's own kind
		return false
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return true
	}
	waits := false
	err = raw.Control(func(fd uintptr) {
		var first [1]byte
		_, _, err := syscall.Recvfrom(int(fd), first[:], syscall.MSG_PEEK) // a socket of Go's never blocks
		waits = err != syscall.EAGAIN && err != syscall.EINTR
	})
	return waits || err != nil
}
