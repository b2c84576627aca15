package chaos

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/process"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/internal/pgserver"
)

// The application_name of the banks' pools and of this program in pg_stat_activity.
const (
	applicationBank = "chaos-bank"
	applicationOwn  = "chaos"
)

const (
	// lockTimeout of the banks' conns is shorter than their handlers' timeout, so that PostgreSQL
	// ends a wait before the handler does.
	lockTimeout = time.Second

	databaseTimeout = 10 * time.Second // for one look at the database
	connectTimeout  = 5 * time.Second
)

// cluster is a PostgreSQL with real fsync, and a proxy in front of it for each bank. Its data
// outlives its crashes.
type cluster struct {
	run     *run
	dir     string
	proxies []*pgfault.Proxy
	admin   session

	mu     sync.Mutex // held while the server is down
	server *pgserver.Server
}

func newCluster(r *run, dir string) *cluster { return &cluster{run: r, dir: dir} }

func (c *cluster) start(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.launch(ctx); err != nil {
		return err
	}
	for range c.run.config.Banks {
		network, address, err := pgfault.Upstream(c.server.URL())
		if err != nil {
			return err
		}
		number := len(c.proxies)
		proxy, err := pgfault.Start(pgfault.Options{
			Network: network, Address: address,
			OnCommit: func(commit pgfault.Commit) pgfault.Fault { return c.run.commits.fault(number, commit) },
		})
		if err != nil {
			return fmt.Errorf("start a proxy: %w", err)
		}
		c.proxies = append(c.proxies, proxy)
	}
	return nil
}

// launch starts PostgreSQL on the data folder.
func (c *cluster) launch(ctx context.Context) (err error) {
	c.server, err = pgserver.Start(ctx, &pgserver.Options{
		DataDir: c.dir,
		Settings: map[string]string{
			"max_connections":  "200", // backends of cut conns linger
			"deadlock_timeout": "200ms",
		},
	})
	return err
}

// crash is an immediate shutdown and a start on the same data. It is as good as a crash of the
// machine, except for data that the disk had not written.
func (c *cluster) crash(ctx context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := process.Quit(c.server.PID()); err != nil {
		return fmt.Errorf("crash PostgreSQL: %w", err)
	}
	select {
	case <-c.server.Done():
	case <-ctx.Done():
		return ctx.Err()
	}
	if err := c.server.Stop(); err != nil {
		return fmt.Errorf("after the crash of PostgreSQL: %w", err)
	}
	if err := c.launch(ctx); err != nil {
		return fmt.Errorf("after the crash of PostgreSQL: %w", err)
	}
	network, address, err := pgfault.Upstream(c.server.URL())
	if err != nil {
		return err
	}
	for _, proxy := range c.proxies {
		proxy.SetUpstream(network, address)
	}
	return nil
}

// urlOf returns the URL of the database for a bank, through its proxy.
func (c *cluster) urlOf(bank int) (string, error) {
	u, err := url.Parse(c.proxies[bank].URL(c.server.URL()))
	if err != nil {
		return "", fmt.Errorf("address of the proxy: %w", err)
	}
	query := u.Query()
	query.Set("application_name", applicationBank)
	query.Set("lock_timeout", fmt.Sprint(lockTimeout.Milliseconds()))
	u.RawQuery = query.Encode()
	return u.String(), nil
}

// connect opens a conn past the proxies, once the cluster is up.
func (c *cluster) connect(ctx context.Context) (*pgx.Conn, error) {
	c.mu.Lock()
	address := c.server.URL()
	c.mu.Unlock()
	config, err := pgx.ParseConfig(address)
	if err != nil {
		return nil, fmt.Errorf("connect past the proxies: %w", err)
	}
	config.ConnectTimeout = connectTimeout
	config.RuntimeParams["search_path"] = bank.Schema
	config.RuntimeParams["application_name"] = applicationOwn
	conn, err := pgx.ConnectConfig(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("connect past the proxies: %w", err)
	}
	return conn, nil
}

// with calls do with a conn of its own past the proxies, and closes the conn. limit bounds both.
func (c *cluster) with(ctx context.Context, limit time.Duration, do func(context.Context, *pgx.Conn) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	conn, err := c.connect(ctx)
	if err != nil {
		return err
	}
	defer func() {
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = conn.Close(closing) // on an error too the conn is closed
	}()
	return do(ctx, conn)
}

// session is a conn past the proxies that is kept between uses: opening one costs the cluster more
// than most uses do. The zero value is ready. It is safe for concurrent use.
type session struct {
	mu   sync.Mutex
	conn *pgx.Conn
}

// use calls do with the session's conn, for at most databaseTimeout. If an error closed the conn,
// the next use opens another.
func (s *session) use(ctx context.Context, c *cluster, do func(context.Context, *pgx.Conn) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, databaseTimeout)
	defer cancel()
	if s.conn == nil || s.conn.IsClosed() {
		conn, err := c.connect(ctx)
		if err != nil {
			return err
		}
		s.conn = conn
	}
	return do(ctx, s.conn)
}

func (s *session) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = s.conn.Close(ctx) // on an error too the conn is closed
}

// heal undoes the proxies' faults.
func (c *cluster) heal() {
	for _, proxy := range c.proxies {
		proxy.SetPaused(false)
		proxy.SetLatency(0)
		proxy.SetRate(0)
		proxy.SetRefuse(false)
	}
}

// version returns PostgreSQL's version, or "" before the first start.
func (c *cluster) version() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.server == nil {
		return ""
	}
	return c.server.Version()
}

func (c *cluster) close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.admin.close()
	var errs []error
	for _, proxy := range c.proxies {
		errs = append(errs, proxy.Close())
	}
	if c.server != nil {
		errs = append(errs, c.server.Stop())
	}
	return errors.Join(errs...)
}
