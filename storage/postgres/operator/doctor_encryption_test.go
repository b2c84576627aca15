package operator_test

import (
	"context"
	"net"
	"net/url"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// wrapped is a hook's connection that hides the TLS connection below it.
type wrapped struct{ net.Conn }

// The doctor reports how a connection is protected, or names a remedy if it is not; the test tries
// each remedy.
func TestDoctorLooksAtTheEncryption(t *testing.T) {
	t.Parallel()
	server := pgtest.TLS(t)
	full := server.TLSURL("postgres")
	noBinding := full + "&channel_binding=disable"
	unverified := func(address string) string {
		return strings.Replace(address, "sslmode=verify-full", "sslmode=require", 1)
	}
	// libpq, and pgx like it, treat require as verify-ca if there is a root certificate.
	withoutRoot := func(address string) string {
		u, err := url.Parse(address)
		if err != nil {
			t.Fatal(err)
		}
		q := u.Query()
		q.Del("sslrootcert")
		u.RawQuery = q.Encode()
		return u.String()
	}
	wrap := func(c *pgxpool.Config) {
		c.ConnConfig.AfterNetConnect = func(_ context.Context, _ *pgconn.Config, conn net.Conn) (net.Conn, error) { return wrapped{conn}, nil }
	}
	// away leads to the socket through a connection that looks like one to another machine.
	away := func(c *pgxpool.Config) {
		dial := c.ConnConfig.DialFunc
		c.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dial(ctx, network, address)
			return distant{conn}, err
		}
	}
	for name, c := range map[string]struct {
		url    string
		change func(*pgxpool.Config)
		level  operator.Level
		says   string
	}{
		"the socket":                      {server.URL(), nil, operator.LevelOK, "does not leave the machine"},
		"another machine":                 {server.URL(), away, operator.LevelWarn, "read and change"},
		"bound":                           {withoutRoot(unverified(full)), nil, operator.LevelOK, "SCRAM-SHA-256-PLUS"},
		"bound and verified":              {full, nil, operator.LevelOK, "SCRAM-SHA-256-PLUS"},
		"verified":                        {noBinding, nil, operator.LevelOK, "certificate is verified"},
		"verified by a root certificate":  {unverified(noBinding), nil, operator.LevelOK, "certificate is verified"},
		"neither":                         {withoutRoot(unverified(noBinding)), nil, operator.LevelWarn, "neither"},
		"a hook wraps it":                 {withoutRoot(unverified(full)), wrap, operator.LevelWarn, "wraps the connection"},
		"a hook wraps it, it is verified": {full, wrap, operator.LevelWarn, "wraps the connection"},
	} {
		t.Run(name, func(t *testing.T) {
			config, err := pgxpool.ParseConfig(c.url)
			if err != nil {
				t.Fatal(err)
			}
			if c.change != nil {
				c.change(config)
			}
			postgres.Configure(config, nil)
			pool, err := pgxpool.NewWithConfig(t.Context(), config)
			if err != nil {
				t.Fatal(err)
			}
			defer pool.Close()
			var found []operator.Finding
			for _, f := range operator.New(postgres.New(pool, nil), nil).Doctor(t.Context()) {
				if f.Check == "encryption" {
					found = append(found, f)
				}
			}
			if len(found) != 1 || found[0].Level != c.level || !strings.Contains(found[0].What, c.says) || (found[0].Remedy == "") != (c.level == operator.LevelOK) {
				t.Errorf("%+v, want %s with %q", found, c.level, c.says)
			}
		})
	}
}

// distant is a connection to another machine, as far as its address tells.
type distant struct{ net.Conn }

func (distant) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 5432} }
