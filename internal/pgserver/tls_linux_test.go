package pgserver

import (
	"errors"
	"net/url"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

func TestTLSWantsEncryptionAndThePassword(t *testing.T) {
	t.Parallel()
	s := startServer(t, &Options{TLS: true})
	const encrypted = "SELECT ssl::text FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
	if got := queryText(t, s.TLSURL("postgres"), encrypted); got != "true" {
		t.Errorf("encrypted: %s", got)
	}
	if got := queryText(t, s.URL(), encrypted); got != "false" {
		t.Errorf("the socket is encrypted: %s", got)
	}
	if got := queryText(t, s.URL(), "SELECT (rolpassword LIKE 'SCRAM-SHA-256$%')::text FROM pg_authid WHERE rolname = current_user"); got != "true" {
		t.Errorf("the password is kept for SCRAM: %s", got)
	}
	for name, spoil := range map[string]func(*url.URL){
		"28000": func(u *url.URL) { u.RawQuery = "sslmode=disable" },
		"28P01": func(u *url.URL) { u.User = url.UserPassword(superuser, "another") },
	} {
		address, err := url.Parse(s.TLSURL("postgres"))
		if err != nil {
			t.Fatal(err)
		}
		spoil(address)
		conn, err := pgx.Connect(t.Context(), address.String())
		if err == nil {
			_ = conn.Close(t.Context())
		}
		if refused := new(pgconn.PgError); !errors.As(err, &refused) || refused.Code != name {
			t.Errorf("got %v, want %s", err, name)
		}
	}
	if err := s.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := Standby(t.Context(), s, &Options{TLS: true}); err == nil || !strings.Contains(err.Error(), "TLS") {
		t.Errorf("a standby with TLS: %v", err)
	}
}
