//go:build !unix

package wire

import "net"

// Unread always reports false: on this system nobody looks.
func Unread(net.Conn) bool { return false }
