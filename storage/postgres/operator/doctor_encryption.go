package operator

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
)

// encryption opens a connection as the pool does, and checks whether somebody in between could read
// or change its data.
func (e *examination) encryption(ctx context.Context) error {
	pool := e.o.pool.Config()
	config := pool.ConnConfig
	var login loginWatch
	build := config.BuildFrontend
	config.BuildFrontend = func(r io.Reader, w io.Writer) *pgproto3.Frontend {
		login = loginWatch{Writer: w} // new for each host that is tried: the last one is connected
		return build(r, &login)
	}
	var encrypted *tls.Conn // before the pool's hook gets the connection
	inner := config.AfterNetConnect
	config.AfterNetConnect = func(ctx context.Context, c *pgconn.Config, conn net.Conn) (net.Conn, error) {
		encrypted, _ = conn.(*tls.Conn)
		if inner == nil {
			return conn, nil
		}
		return inner(ctx, c, conn)
	}
	if pool.BeforeConnect != nil {
		if err := pool.BeforeConnect(ctx, config); err != nil {
			return err
		}
	}
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	socket := conn.PgConn().Conn()
	switch {
	case encrypted == nil && local(socket.RemoteAddr()):
		e.ok("none, and the connection does not leave the machine")
	case encrypted == nil:
		e.warn("sslmode=verify-full in the address, and hostssl in pg_hba.conf; nothing, if a tunnel or a DialFunc encrypts it",
			"none: whoever is in between can read and change statements and answers")
	case login.bound:
		e.ok("TLS, and the log-in is bound to it (SCRAM-SHA-256-PLUS)")
	case socket != net.Conn(encrypted) && config.ChannelBinding != "disable":
		e.warn("let ConnConfig.AfterNetConnect return the connection that it is given, and watch what passes by BuildFrontend",
			"TLS, but a hook of the pool's config wraps the connection: channel binding is given up")
	case verified(encrypted, config.TLSConfig):
		e.ok("TLS, and the server's certificate is verified")
	default:
		e.warn("sslmode=verify-full and sslrootcert in the address; or channel_binding=require and a password that is kept for scram-sha-256",
			"TLS, but neither is the server's certificate verified nor the log-in bound to the connection: somebody in between would not be noticed")
	}
	return nil
}

// verified reports whether the server's certificate was verified, by crypto/tls or by a function in
// the config, as for verify-ca.
func verified(conn *tls.Conn, config *tls.Config) bool {
	return len(conn.ConnectionState().VerifiedChains) > 0 || config != nil && (config.VerifyPeerCertificate != nil || config.VerifyConnection != nil)
}

// local reports whether an address belongs to this machine.
func local(address net.Addr) bool {
	tcp, ok := address.(*net.TCPAddr)
	return !ok || tcp.IP.IsLoopback()
}

// loginWatch records the mechanism by which a client logs in, and nothing else.
type loginWatch struct {
	io.Writer
	bound bool
}

func (w *loginWatch) Write(p []byte) (int, error) {
	const header = 5 // the type of the message and its length
	if len(p) > header && p[0] == 'p' && bytes.HasPrefix(p[header:], []byte("SCRAM-SHA-256-PLUS\x00")) {
		w.bound = true
	}
	return w.Writer.Write(p)
}
