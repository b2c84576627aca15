package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/deadline"
	"github.com/paidonce/idempotency/storage/postgres/internal/sealed"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// TableName is the name of the table of the records. The schema is configurable, the name is not.
const TableName = "idempotency_keys"

// IdleInTransactionTimeoutMax bounds Options.IdleInTransactionTimeout, and so the time that a dead
// service holds a key.
const IdleInTransactionTimeoutMax = 60 * time.Second

// Options tune a [Store]. Nil and the zero value are the defaults, which are the safest. For a pool
// of your own pass the same to [Configure] and to [New].
type Options struct {
	// Schema holds the tables: 1 to 63 lower-case letters, digits and underscores. Defaults to
	// "public".
	Schema string

	// Isolation is the isolation level of handlers. Defaults to pgx.ReadCommitted. Above it expect
	// restarts: the claim shares the transaction's snapshot, and only the primary key decides a
	// race.
	Isolation pgx.TxIsoLevel

	// AcquireTimeout is the time that a request waits for a connection. Defaults to 1 second.
	AcquireTimeout time.Duration

	// StatementTimeout, LockTimeout and IdleInTransactionTimeout are the settings of the same names
	// on each connection. If one of the first two cuts off a statement, its request is unavailable.
	// The last frees the key of a service that vanished. From PostgreSQL 17 on it is also the
	// transaction_timeout of each request, so that the server ends a session that stopped in the
	// middle of its messages too. It must exceed the handler's timeout by 5 seconds or, if that is
	// longer, by the engine's Timeouts.Commit, and be less than 60 seconds
	// ([IdleInTransactionTimeoutMax]). They default to 10, 5 and 20 seconds.
	StatementTimeout         time.Duration
	LockTimeout              time.Duration
	IdleInTransactionTimeout time.Duration

	// PrepareTimeout is the time that a new connection waits for the table when [Configure]
	// prepares the store's statements on it. If somebody keeps the table locked for longer, as a
	// migration may, the connection works without them, and the server parses each statement every
	// time. Defaults to 250 milliseconds; at least 1 millisecond.
	PrepareTimeout time.Duration

	// SynchronousCommit is PostgreSQL's setting synchronous_commit: "on", the default, or
	// "remote_apply". Weaker values are refused: with them an answer is sent before it is safe.
	SynchronousCommit string

	// ResolversMax is the maximum number of connections that look up lost COMMITs at the same time,
	// beside those of the pool: plan for them in max_connections. Further look-ups wait for their
	// turn. Defaults to 8.
	ResolversMax int

	// DeferredMax is the maximum number of statements that one request may defer: see [DeferExec].
	// The handlers of a batch of messages may defer as many each, and 1000 together. Defaults to 64.
	DeferredMax int

	// TransactionPooling must be true if the pool's connections lead to a pooler that hands out a
	// server connection per transaction, such as PgBouncer in that mode. Settings then travel with
	// each claim, and nothing is prepared: pgx's default mode becomes pgx.QueryExecModeExec;
	// pgx.QueryExecModeCacheDescribe works too.
	TransactionPooling bool

	// PoolConfig changes the config of the pool that [Open] makes, before [Configure] completes it:
	// its size, BeforeConnect for a token in place of a password, a tracer. Nothing else calls it.
	PoolConfig func(config *pgxpool.Config)
}

// full returns a copy with every default filled in. It panics on values that can't work.
func (o *Options) full() *Options {
	var full Options
	if o != nil {
		full = *o
	}
	full.Schema = cmp.Or(full.Schema, "public")
	full.Isolation = cmp.Or(full.Isolation, pgx.ReadCommitted)
	full.SynchronousCommit = cmp.Or(full.SynchronousCommit, "on")
	full.ResolversMax = cmp.Or(full.ResolversMax, 8)
	if full.ResolversMax < 0 {
		panic(fmt.Sprintf("idempotency/postgres: Options.ResolversMax is %d: it must be positive", full.ResolversMax))
	}
	full.DeferredMax = cmp.Or(full.DeferredMax, 64)
	if full.DeferredMax < 0 {
		panic(fmt.Sprintf("idempotency/postgres: Options.DeferredMax is %d: it must be positive", full.DeferredMax))
	}
	for _, field := range []struct {
		name    string
		value   *time.Duration
		initial time.Duration
	}{
		{"AcquireTimeout", &full.AcquireTimeout, time.Second},
		{"StatementTimeout", &full.StatementTimeout, 10 * time.Second},
		{"LockTimeout", &full.LockTimeout, 5 * time.Second},
		{"PrepareTimeout", &full.PrepareTimeout, 250 * time.Millisecond},
		{"IdleInTransactionTimeout", &full.IdleInTransactionTimeout, 20 * time.Second},
	} {
		if *field.value == 0 {
			*field.value = field.initial
		}
		if *field.value < time.Millisecond {
			panic(fmt.Sprintf("idempotency/postgres: Options.%s is %v: it must be at least a millisecond", field.name, *field.value))
		}
	}
	if !validSchema(full.Schema) {
		panic(fmt.Sprintf("idempotency/postgres: Options.Schema is %q: it must be 1 to 63 lower-case letters, digits and underscores, and not begin with a digit or pg_", full.Schema))
	}
	switch full.Isolation {
	case pgx.ReadCommitted, pgx.RepeatableRead, pgx.Serializable:
	default:
		panic(fmt.Sprintf("idempotency/postgres: Options.Isolation is %q: it must be pgx.ReadCommitted, pgx.RepeatableRead or pgx.Serializable", full.Isolation))
	}
	switch full.SynchronousCommit {
	case "on", "remote_apply":
	default:
		panic(fmt.Sprintf("idempotency/postgres: Options.SynchronousCommit is %q: it must be on or remote_apply", full.SynchronousCommit))
	}
	if full.IdleInTransactionTimeout >= IdleInTransactionTimeoutMax {
		panic(fmt.Sprintf("idempotency/postgres: Options.IdleInTransactionTimeout is %v: it must be under %v", full.IdleInTransactionTimeout, IdleInTransactionTimeoutMax))
	}
	return &full
}

func validSchema(s string) bool {
	if s == "" || len(s) > 63 || s[0] >= '0' && s[0] <= '9' || len(s) >= 3 && s[:3] == "pg_" {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '_' {
			return false
		}
	}
	return true
}

// setting is a setting of PostgreSQL, and the option that decides it.
type setting struct{ name, value, option string }

// settings returns the settings that every connection must have.
func (o *Options) settings() []setting {
	ms := func(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }
	return []setting{
		{"synchronous_commit", o.SynchronousCommit, "SynchronousCommit"},
		{"statement_timeout", ms(o.StatementTimeout), "StatementTimeout"},
		{"lock_timeout", ms(o.LockTimeout), "LockTimeout"},
		{"idle_in_transaction_session_timeout", ms(o.IdleInTransactionTimeout), "IdleInTransactionTimeout"},
	}
}

// transactionTimeout returns a SQL expression that limits the transaction that evaluates it, if the
// server has transaction_timeout. It is set in each of our transactions and not for the session:
// the service's own work on the pool may take as long as it needs.
func (o *Options) transactionTimeout() string {
	const since = 170000
	return fmt.Sprintf("CASE WHEN pg_catalog.current_setting('server_version_num')::pg_catalog.int4 OPERATOR(pg_catalog.>=) %d"+
		" THEN pg_catalog.set_config('transaction_timeout', '%d', true) END", since, o.IdleInTransactionTimeout.Milliseconds())
}

// Store keeps records in PostgreSQL, each in the transaction of its handler. It is safe for
// concurrent use.
type Store struct {
	pool         *pgxpool.Pool
	owned        bool // Open made the pool
	options      *Options
	table        string // qualified, unquoted: a part of the lock number
	statements   statements
	open         openStatements
	transactions sealed.Settings // of handlers
	resolvers    chan struct{}   // a place for each that runs
	recent       *recentKeys

	// withoutPosition is set once a server refuses to return the position of its log, as some
	// services that speak PostgreSQL's protocol do. Claims then have no position, and an old
	// primary can't be recognized by it.
	withoutPosition atomic.Bool

	nudges nudges // for the readers of the outbox in this process

	synchronousCommit []byte // the option, as a parameter
}

var (
	_ idempotency.Store         = (*Store)(nil)
	_ idempotency.BudgetChecker = (*Store)(nil)
)

// New returns a store on a pool of the caller's; [Open] makes one itself. The pool's config should
// have gone through [Configure] with the same options. New sends nothing: package migrations makes
// the table, and [Store.Check] reports whether all is well. It panics if the pool is nil or the
// options can't work.
func New(pool *pgxpool.Pool, opts *Options) *Store {
	if pool == nil {
		panic("idempotency/postgres: New needs a pool")
	}
	o := opts.full()
	return &Store{
		pool: pool, options: o, table: o.Schema + "." + TableName, statements: newStatements(o), open: newOpenStatements(o),
		transactions: sealed.Settings{
			Pool: pool, Mode: pool.Config().ConnConfig.DefaultQueryExecMode, Isolation: o.Isolation, DeferredMax: o.DeferredMax, Meaning: deferredMeaning,
		},
		resolvers: make(chan struct{}, o.ResolversMax), recent: new(recentKeys),
		synchronousCommit: []byte(o.SynchronousCommit),
	}
}

// CheckBudget returns an error if PostgreSQL might end the transaction while handler and commit are
// still within their timeouts: Options.IdleInTransactionTimeout must exceed the handler's timeout
// by 5 seconds or, if that is longer, by the commit's.
func (s *Store) CheckBudget(handlerTimeout, commitTimeout time.Duration) error {
	if least := handlerTimeout + max(5*time.Second, commitTimeout); s.options.IdleInTransactionTimeout < least {
		return fmt.Errorf("postgres: Options.IdleInTransactionTimeout is %v: with a Timeouts.Handler of %v and a Timeouts.Commit of %v it must be at least %v",
			s.options.IdleInTransactionTimeout, handlerTimeout, commitTimeout, least)
	}
	return nil
}

// errStale marks a claim that failed because its connection was dead when it was taken, or had lost
// our statements.
var errStale = errors.New("connection was stale")

// acquireFunc takes a connection from the pool.
type acquireFunc func(context.Context) (*pgxpool.Conn, error)

// Begin implements [idempotency.Store]: BEGIN, lock and look-up in one round trip. For a record
// that this store has seen before, a look-up is enough.
func (s *Store) Begin(ctx context.Context, claim *idempotency.Claim) (idempotency.Attempt, *idempotency.Record, error) {
	attempt, record, err := s.begin(ctx, claim, s.acquire)
	if errors.Is(err, errStale) && ctx.Err() == nil {
		// Nothing but the claim was sent, and nothing of it remains.
		acquire := s.acquireFresh
		if wire.Unprepared(err) {
			acquire = s.acquireUnprepared
		}
		return s.begin(ctx, claim, acquire)
	}
	return attempt, record, err
}

// begin takes a connection on which the server reads our text as it is, and claims on it.
func (s *Store) begin(ctx context.Context, claim *idempotency.Claim, acquire acquireFunc) (idempotency.Attempt, *idempotency.Record, error) {
	conn, err := acquire(ctx)
	if err != nil {
		return nil, nil, fail("acquire a connection", idempotency.ErrUnavailable, err)
	}
	if !wire.PlainText(conn.Conn().PgConn()) {
		// An earlier handler set the encoding for the session. A new connection has its own again.
		_ = conn.Conn().Close(ctx)
		conn.Release()
		return nil, nil, fail("claim", idempotency.ErrUnavailable, errors.Join(errStale, errEncoding))
	}
	if claim.Keyless() {
		return s.claimKeyless(ctx, claim, conn)
	}
	return s.claim(ctx, claim, conn)
}

var errEncoding = errors.New("client_encoding is not UTF8, or the database's is neither UTF8 nor SQL_ASCII: put the pool's config through Configure, leave it alone in handlers, and see Store.Check")

// acquire takes a connection from the pool.
func (s *Store) acquire(ctx context.Context) (*pgxpool.Conn, error) {
	if budget, ok := ctx.(*deadline.Context); ok { // the engine's, and cheaper
		part := budget.Within(s.options.AcquireTimeout)
		defer part.End()
		return s.pool.Acquire(part)
	}
	ctx, cancel := context.WithTimeout(ctx, s.options.AcquireTimeout)
	defer cancel()
	return s.pool.Acquire(ctx)
}

// limited bounds a statement that belongs to no request. The client too waits no longer than
// Options.StatementTimeout, so that a connection that has fallen silent blocks nothing for ever.
func (s *Store) limited(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, s.options.StatementTimeout)
}

// acquireFresh takes a connection that answers. After a restart of the server every idle connection
// is dead.
func (s *Store) acquireFresh(ctx context.Context) (*pgxpool.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, s.options.AcquireTimeout)
	defer cancel()
	for {
		conn, err := s.pool.Acquire(ctx)
		if err != nil {
			return nil, err
		}
		if conn.Ping(ctx) == nil {
			return conn, nil
		}
		conn.Release() // which destroys a dead one
	}
}

// acquireUnprepared takes a connection that answers, and has our statements sent on it as text. If
// they were deallocated on one connection they may be on others: a pool may reset its sessions.
func (s *Store) acquireUnprepared(ctx context.Context) (*pgxpool.Conn, error) {
	conn, err := s.acquireFresh(ctx)
	if err == nil {
		s.statements.ForgetPrepared(conn.Conn().PgConn())
	}
	return conn, err
}
