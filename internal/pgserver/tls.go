package pgserver

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

const (
	certificateName = "server.crt"
	keyName         = "server.key"
	hbaName         = "pg_hba.conf"

	// certificateLife is longer than a test, and allows for a clock that is a little behind.
	certificateLife = 24 * time.Hour

	// tlsAccess refuses TCP connections without TLS and a password. The socket stays as it was.
	tlsAccess = "local all all trust\nlocal replication all trust\nhostssl all all 127.0.0.1/32 scram-sha-256\n"
)

// tlsListener is the second address of a server with [Options.TLS].
type tlsListener struct {
	dir, port, password string
}

// newTLSListener makes PostgreSQL's TLS files in dir, which the account may pass through.
func newTLSListener(dir string, acct *account) (*tlsListener, error) {
	if !unixSockets {
		return nil, errors.New("TLS: it needs Unix sockets beside it")
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	l := &tlsListener{dir: dir, port: port, password: rand.Text()}
	certificate, key, err := selfSigned(time.Now())
	if err != nil {
		return nil, fmt.Errorf("make certificate: %w", err)
	}
	for name, content := range map[string][]byte{certificateName: certificate, keyName: key, hbaName: []byte(tlsAccess)} {
		if err := os.WriteFile(l.file(name), content, 0o600); err != nil {
			return nil, fmt.Errorf("TLS: %w", err)
		}
		if err := acct.own(l.file(name)); err != nil {
			return nil, fmt.Errorf("TLS: %w", err)
		}
	}
	return l, os.Chmod(l.file(certificateName), 0o644) // clients verify the server with it
}

func (l *tlsListener) file(name string) string { return filepath.Join(l.dir, name) }

func (l *tlsListener) settings() map[string]string {
	return map[string]string{
		"listen_addresses": "127.0.0.1", "port": l.port, "hba_file": l.file(hbaName), "ssl": "on",
		"ssl_cert_file": l.file(certificateName), "ssl_key_file": l.file(keyName), "password_encryption": "scram-sha-256",
	}
}

// setPassword gives the superuser its password, over the socket.
func (l *tlsListener) setPassword(ctx context.Context, socketURL string) error {
	conn, err := pgconn.Connect(ctx, socketURL)
	if err != nil {
		return fmt.Errorf("set password: %w", err)
	}
	_, err = conn.Exec(ctx, "ALTER ROLE "+superuser+" PASSWORD '"+l.password+"'").ReadAll()
	if err := errors.Join(err, conn.Close(ctx)); err != nil {
		return fmt.Errorf("set password: %w", err)
	}
	return nil
}

// TLSURL returns the TLS address of the named database, with the superuser's password, for clients
// that verify the server's certificate. It panics without [Options.TLS].
func (s *Server) TLSURL(database string) string {
	query := url.Values{"sslmode": {"verify-full"}, "sslrootcert": {s.tls.file(certificateName)}}
	address := url.URL{
		Scheme: "postgres", User: url.UserPassword(superuser, s.tls.password), Path: "/" + database,
		Host: net.JoinHostPort("127.0.0.1", s.tls.port), RawQuery: query.Encode(),
	}
	return address.String()
}

// selfSigned returns a certificate for 127.0.0.1 that is its own authority, and its key, as PEM.
func selfSigned(now time.Time) (certificate, key []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "paidonce test"},
		NotBefore: now.Add(-certificateLife), NotAfter: now.Add(certificateLife),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		IsCA:        true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &private.PublicKey, private)
	if err != nil {
		return nil, nil, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), nil
}
