//go:build !unix

package wire

import "net"

// Unread always reports false: it can't look on this system.
func Unread(net.Conn) bool { return false }
