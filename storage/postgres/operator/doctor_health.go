package operator

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
)

// open looks for open requests that nobody ends.
func (e *examination) open(ctx context.Context) error {
	var there, readable bool
	var role string
	if err := e.row(ctx, "SELECT to_regclass($1) IS NOT NULL, COALESCE(has_table_privilege(to_regclass($1)::oid, 'SELECT'), false), quote_ident(current_user)",
		[]any{e.o.open}, &there, &readable, &role); err != nil {
		return err
	}
	switch {
	case !there:
		e.ok("no table: no service can have open requests")
		return nil
	case !readable:
		e.warn(fmt.Sprintf("GRANT SELECT ON %[1]s.%[2]s, %[1]s.%[3]s TO %[4]s", e.o.store.Schema(), postgres.OpenTableName, postgres.EffectsTableName, role), "this role can't see open requests")
		return nil
	}
	type route struct {
		name           string
		open, parked   int
		oldest, behind float64 // seconds: the age of the oldest, and the time since the first that is not parked was due
	}
	var routes []route
	err := e.o.read(ctx, func(ctx context.Context, tx pgx.Tx) error {
		rows, err := tx.Query(ctx, `
			SELECT route, count(*), count(parked), extract(epoch FROM statement_timestamp() - min(started_at))::float8,
			       COALESCE(extract(epoch FROM statement_timestamp() - min(next_at) FILTER (WHERE parked IS NULL)), 0)::float8
			FROM `+e.o.open+` GROUP BY route ORDER BY route`)
		if err != nil {
			return err
		}
		routes, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (r route, err error) {
			return r, row.Scan(&r.name, &r.open, &r.parked, &r.oldest, &r.behind)
		})
		return err
	})
	if err != nil {
		return err
	}
	seconds := func(s float64) time.Duration { return time.Duration(s * float64(time.Second)).Round(time.Second) }
	for _, r := range routes {
		if r.parked > 0 {
			e.warn("idemctl effect list --parked --route "+r.name+", then effect settle for each: docs/operations.md, What to do with a parked request at night",
				"%d requests of route %s wait for a person", r.parked, r.name)
		}
		if behind := seconds(r.behind); behind > OpenAgeMax {
			e.warn("run a completer in a program that serves this route; a route that was renamed must be served until idemctl effect list --route "+r.name+" is empty",
				"requests of route %s have been due for %v, and nobody takes them over", r.name, behind)
		}
	}
	if len(e.findings) == 0 || e.findings[len(e.findings)-1].Check != e.check {
		text := make([]string, 0, len(routes))
		for _, r := range routes {
			text = append(text, fmt.Sprintf("%d of route %s, the oldest %v old", r.open, r.name, seconds(r.oldest)))
		}
		e.ok("open requests: %s", cmp.Or(strings.Join(text, "; "), "none"))
	}
	return nil
}

// messageTable reports whether a table of messages is there and readable. If not, it adds the
// finding.
func (e *examination) messageTable(ctx context.Context, name string) (ok bool, err error) {
	table := pgx.Identifier{e.o.store.Schema(), name}.Sanitize()
	var there, readable bool
	var role string
	if err := e.row(ctx, "SELECT to_regclass($1) IS NOT NULL, COALESCE(has_table_privilege(to_regclass($1)::oid, 'SELECT'), false), quote_ident(current_user)",
		[]any{table}, &there, &readable, &role); err != nil {
		return false, err
	}
	switch {
	case !there:
		e.ok("no table: no service can have messages")
	case !readable:
		e.warn("GRANT SELECT ON "+e.o.store.Schema()+"."+name+" TO "+role, "this role can't see messages")
	}
	return there && readable, nil
}

// outbox looks for messages that nobody publishes.
func (e *examination) outbox(ctx context.Context) error {
	if ok, err := e.messageTable(ctx, postgres.OutboxTable); err != nil || !ok {
		return err
	}
	box, err := e.o.Outbox(ctx)
	if err != nil {
		return err
	}
	var late []string
	oldest := time.Duration(0)
	for _, s := range box.Shards {
		oldest = max(oldest, s.Oldest)
		if s.Oldest > OutboxAgeMax {
			late = append(late, fmt.Sprint(s.Number))
		}
	}
	if len(late) > 0 {
		e.warn("run a relay.Relay in the service, or its consumer where a topic is a queue; where one runs, its log says what the broker or the database answers",
			"%d messages wait in the outbox, the oldest for %v (shards %s): no relay publishes them", box.Pending, oldest.Round(time.Second), strings.Join(late, ", "))
	}
	if box.Refused > 0 {
		e.warn("idemctl message outbox shows why; mend that, then message retry, or message drop --outbox: docs/operations.md, Messages that the broker refused",
			"the broker refused %d messages, and %d of their keys wait behind them", box.Refused, box.Behind)
	}
	if len(late) == 0 && box.Refused == 0 {
		e.ok("%d messages wait, the oldest for %v", box.Pending, oldest.Round(time.Second))
	}
	return nil
}

// consumers looks for messages that a person must decide on, and for consumers that do not go on.
func (e *examination) consumers(ctx context.Context) error {
	for _, table := range []string{postgres.OffsetsTable, postgres.ParkedTable} {
		if ok, err := e.messageTable(ctx, table); err != nil || !ok {
			return err
		}
	}
	list, err := e.o.Consumers(ctx, "")
	if err != nil {
		return err
	}
	found := len(e.findings)
	var text []string
	for i := range list.Consumers {
		c := &list.Consumers[i]
		if c.Dead > 0 {
			e.warn("idemctl message parked --consumer "+c.Name+" --state dead, then message redrive or drop for each: docs/operations.md, Dead letters at night",
				"%d messages of consumer %s are dead, and wait for a person", c.Dead, c.Name)
		}
		if c.OldestDue > ConsumerAgeMax {
			e.warn("run consumer "+c.Name+"; where it runs, its log says what keeps it; idemctl message consumers shows who holds its partitions",
				"a parked message of consumer %s has been due for %v, and nobody tries it", c.Name, c.OldestDue.Round(time.Second))
		}
		deaths, stuck := 0, 0
		for j := range c.Positions {
			if p := &c.Positions[j]; p.Deaths > 0 && p.Age > ConsumerAgeMax {
				deaths, stuck = deaths+p.Deaths, stuck+1
			}
		}
		if stuck > 0 {
			e.warn("look at its log, and at idemctl message consumers; a consumer that ended for good leaves rows in "+postgres.OffsetsTable+", which may be deleted",
				"%d processes of consumer %s began a batch, and ended none, in %d partitions that have not moved for %v", deaths, c.Name, stuck, ConsumerAgeMax)
		}
		if err := e.retention(ctx, c); err != nil {
			return err
		}
		text = append(text, fmt.Sprintf("%s: %d positions, %d waiting, %d behind", c.Name, len(c.Positions), c.Waiting, c.Behind))
	}
	if len(e.findings) == found {
		e.ok("consumers: %s", cmp.Or(strings.Join(text, "; "), "none"))
	}
	return nil
}

// retention warns if records of a consumer expire before its dead letters are decided on: a copy
// that was handled is forgotten then, and a redrive would handle the message once more.
func (e *examination) retention(ctx context.Context, c *Consumer) error {
	if c.OldestDead == 0 {
		return nil
	}
	var seconds float64
	err := e.row(ctx, "SELECT COALESCE((SELECT extract(epoch FROM expires_at - created_at) FROM "+e.o.keys+" WHERE scope = $1 AND status <> 0 ORDER BY key LIMIT 1), 0)::float8",
		[]any{idempotency.MessageScopePrefix + c.Name}, &seconds)
	kept := time.Duration(seconds * float64(time.Second)).Round(time.Second)
	if err == nil && kept > 0 && c.OldestDead > kept/2 {
		e.warn("redrive or drop them now, or raise the consumer's Options.Retention", "consumer %s keeps records for %v, and its oldest dead letter is %v old: when the records have expired, a copy that was handled is not known any more",
			c.Name, kept, c.OldestDead.Round(time.Second))
	}
	return err
}

func (e *examination) isolation(ctx context.Context) error {
	var level string
	if err := e.row(ctx, "SELECT reset_val FROM pg_settings WHERE name = 'default_transaction_isolation'", nil, &level); err != nil {
		return err
	}
	if level != "read committed" {
		e.warn("nothing, where it is meant: a claim names its own level (postgres.Options.Isolation)", "transactions are %s by default", level)
		return nil
	}
	e.ok("read committed by default")
	return nil
}

// timeouts checks the timeouts that the server, the database or the role sets for sessions that set
// none.
func (e *examination) timeouts(ctx context.Context) error {
	var statementMS, idleMS, transactionMS int64
	err := e.row(ctx, `
		SELECT COALESCE(max(reset_val::bigint) FILTER (WHERE name = 'statement_timeout'), 0),
		       COALESCE(max(reset_val::bigint) FILTER (WHERE name = 'idle_in_transaction_session_timeout'), 0),
		       COALESCE(max(reset_val::bigint) FILTER (WHERE name = 'transaction_timeout'), 0)
		FROM pg_settings WHERE name IN ('statement_timeout', 'idle_in_transaction_session_timeout', 'transaction_timeout')`, nil, &statementMS, &idleMS, &transactionMS)
	if err != nil {
		return err
	}
	ms := func(n int64) time.Duration { return time.Duration(n) * time.Millisecond }
	longest := 15 * time.Second // an engine's default for a handler and its commit
	if transactionMS != 0 && ms(transactionMS) < longest {
		e.warn("set transaction_timeout to more than Timeouts.Handler and Timeouts.Commit together, or to 0",
			"transaction_timeout is %v: attempts that take longer end as unavailable, and the defaults allow %v", ms(transactionMS), longest)
		return nil
	}
	e.ok("for sessions that set none: statement %s, idle in transaction %s, transaction %s", none(ms(statementMS)), none(ms(idleMS)), none(ms(transactionMS)))
	return nil
}

func none(d time.Duration) string {
	if d == 0 {
		return "none"
	}
	return d.String()
}

func (e *examination) connections(ctx context.Context) error {
	var most, used, roleMost int
	err := e.row(ctx, `
		SELECT current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int,
		       (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' OR backend_type IS NULL),
		       (SELECT rolconnlimit FROM pg_roles WHERE rolname = session_user)`, nil, &most, &used, &roleMost)
	if err != nil {
		return err
	}
	switch {
	case float64(used) > connectionsShare*float64(most):
		e.warn("raise max_connections, lower the pools, or put a pooler in between: a request holds a connection for as long as it runs", "%d of %d connections are in use", used, most)
	case roleMost >= 0 && int(e.o.pool.Config().MaxConns) > roleMost:
		e.warn("ALTER ROLE ... CONNECTION LIMIT, or a smaller pool", "this pool may have %d connections and its role %d", e.o.pool.Config().MaxConns, roleMost)
	default:
		e.ok("%d of %d connections are in use", used, most)
	}
	return nil
}

func (e *examination) replication(ctx context.Context) error {
	var names string
	var standbys, synchronous, lostSlots int
	var slotBytes int64
	err := e.row(ctx, `
		SELECT current_setting('synchronous_standby_names'), (SELECT count(*) FROM pg_stat_replication),
		       (SELECT count(*) FROM pg_stat_replication WHERE sync_state IN ('sync', 'quorum')),
		       (SELECT count(*) FROM pg_replication_slots WHERE NOT active),
		       (SELECT COALESCE(max(CASE WHEN pg_is_in_recovery() THEN 0 ELSE pg_current_wal_lsn() - restart_lsn END), 0)::bigint FROM pg_replication_slots WHERE NOT active)`,
		nil, &names, &standbys, &synchronous, &lostSlots, &slotBytes)
	if err != nil {
		return err
	}
	switch {
	case names != "" && synchronous == 0:
		e.fail("bring the standby back, or take its name from synchronous_standby_names and know what a fail-over then loses",
			"COMMIT waits for a synchronous standby, and none is connected: requests, and replays, hang and end as unknown")
	case names == "" && standbys > 0:
		e.warn("synchronous replication (synchronous_standby_names), where no payment may be lost",
			"%d standbys, none of them synchronous: one that is promoted can lack a payment together with its key", standbys)
	case names != "":
		e.ok("%d standbys, %d of them synchronous", standbys, synchronous)
	default:
		e.ok("no standby is connected")
	}
	if slotBytes > slotBytesMax {
		e.warn("bring its standby back, or pg_drop_replication_slot", "%d replication slots that nobody reads; one keeps %d GB of WAL", lostSlots, slotBytes>>30)
	}
	return nil
}

func (e *examination) clock(ctx context.Context) error {
	var server time.Time
	skew, uncertain := time.Duration(0), time.Hour
	for range 3 { // the quickest answer is the most exact
		err := e.o.read(ctx, func(ctx context.Context, tx pgx.Tx) error {
			asked := time.Now()
			err := tx.QueryRow(ctx, "SELECT clock_timestamp()").Scan(&server)
			if took := time.Since(asked); took/2 < uncertain {
				skew, uncertain = server.Sub(asked.Add(took/2)), took/2
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	skew = skew.Round(time.Millisecond)
	if skew.Abs()-uncertain > ClockSkewMax {
		e.warn("NTP, on both: no request asks the service's clock, but logs and the history do, and records expire by the server's",
			"the server's clock and this machine's are %v apart", skew)
		return nil
	}
	e.ok("the server's clock and this machine's are %v apart", skew)
	return nil
}

func (e *examination) attempts(ctx context.Context) error {
	var s Stats
	if err := e.o.read(ctx, func(ctx context.Context, tx pgx.Tx) error { return e.o.inFlight(ctx, tx, &s) }); err != nil {
		return err
	}
	old := 0
	for _, h := range s.Holders {
		if h.Age > AttemptAgeMax {
			old++
		}
	}
	if old > 0 {
		e.warn("idemctl top shows them; pg_terminate_backend ends one, which undoes what it wrote. postgres.Configure has PostgreSQL end those that idle; one that stopped in the middle of a COPY is ended by nothing else",
			"%d of %d attempts have held their key for over %v", old, s.InFlight, AttemptAgeMax)
		return nil
	}
	e.ok("%d in flight, none for over %v", s.InFlight, AttemptAgeMax)
	return nil
}

func (e *examination) reaper(ctx context.Context) error {
	s, err := e.o.Stats(ctx)
	if err != nil {
		return err
	}
	about := ""
	if s.Expired.Estimated {
		about = "about "
	}
	if s.OldestExpired > ReaperBehindMax {
		e.warn("run a postgres.Reaper in the service, or idemctl gc by cron; where one runs, its log says why it fails",
			"%s%d records are expired, one of them for %v: no reaper comes by", about, s.Expired.Rows, s.OldestExpired.Round(time.Second))
		return nil
	}
	e.ok("%s%d records are expired, %s%d live", about, s.Expired.Rows, about, s.Live.Rows)
	return nil
}

func (e *examination) vacuum(ctx context.Context) error {
	var server bool
	var table *string
	var dead, live int64
	err := e.row(ctx, `
		SELECT current_setting('autovacuum')::bool,
		       (SELECT option_value FROM pg_options_to_table(c.reloptions) WHERE option_name = 'autovacuum_enabled'),
		       COALESCE(u.n_dead_tup, 0), COALESCE(u.n_live_tup, 0)
		FROM pg_class AS c LEFT JOIN pg_stat_user_tables AS u ON u.relid = c.oid WHERE c.oid = $1::text::regclass`, []any{e.o.keys}, &server, &table, &dead, &live)
	if err != nil {
		return err
	}
	switch {
	case !server:
		e.fail("ALTER SYSTEM SET autovacuum = on", "autovacuum is off: what the reaper deletes is never used again, and the server stops when its transaction ids run out")
	case table != nil && *table != "true" && *table != "on" && *table != "1":
		e.fail("ALTER TABLE "+e.o.table+" RESET (autovacuum_enabled)", "autovacuum is off for the table")
	case dead > deadRowsMin && float64(dead) > deadRowsShareMax*float64(dead+live):
		e.warn("VACUUM "+e.o.table+", and see what keeps autovacuum from it: the check transactions, or autovacuum_vacuum_cost_limit", "%d of %d rows are dead and wait for vacuum", dead, dead+live)
	default:
		e.ok("%d dead rows", dead)
	}
	return nil
}

// bloat compares the size of the table with the size that its rows need, by the planner's
// statistics.
func (e *examination) bloat(ctx context.Context) error {
	var bytes, rows, width int64
	err := e.row(ctx, `
		SELECT pg_relation_size(c.oid), greatest(c.reltuples, 0)::bigint,
		       COALESCE((SELECT sum(avg_width)::bigint FROM pg_stats WHERE schemaname = $2 AND tablename = c.relname), 0)
		FROM pg_class AS c WHERE c.oid = $1::text::regclass`, []any{e.o.keys, e.o.store.Schema()}, &bytes, &rows, &width)
	if err != nil {
		return err
	}
	const rowOverheadBytes = 28 // a row's header and its pointer
	needed := rows * (width + rowOverheadBytes)
	switch {
	case bytes < bloatBytesMin:
		e.ok("the table has %d MB", bytes>>20)
	case width == 0 || rows == 0:
		e.ok("the table has %d MB, and was not analyzed yet", bytes>>20)
	case float64(bytes-needed) > bloatShareMax*float64(bytes):
		e.warn("nothing where expiry comes in waves: the room is used again. Else pg_repack or, while no service runs, VACUUM FULL", "the table has %d MB, and its rows need %d", bytes>>20, needed>>20)
	default:
		e.ok("the table has %d MB, and its rows need %d", bytes>>20, needed>>20)
	}
	return nil
}

func (e *examination) transactions(ctx context.Context) error {
	var age, preparedAge float64
	err := e.row(ctx, `
		SELECT COALESCE(max(extract(epoch FROM clock_timestamp() - xact_start)) FILTER (WHERE backend_type = 'client backend'), 0)::float8,
		       COALESCE((SELECT max(extract(epoch FROM clock_timestamp() - prepared)) FROM pg_prepared_xacts), 0)::float8
		FROM pg_stat_activity`, nil, &age, &preparedAge)
	if err != nil {
		return err
	}
	oldest := time.Duration(max(age, preparedAge) * float64(time.Second)).Round(time.Second)
	switch {
	case oldest <= TransactionAgeMax:
		e.ok("the oldest is %v old", oldest)
	case preparedAge > age:
		e.warn("COMMIT PREPARED or ROLLBACK PREPARED (pg_prepared_xacts)", "a prepared transaction is %v old: until it ends, vacuum cleans nothing up that died since", oldest)
	default:
		e.warn("find it in pg_stat_activity, by xact_start", "a transaction is %v old: until it ends, vacuum cleans nothing up that died since", oldest)
	}
	return nil
}

func (e *examination) wraparound(ctx context.Context) error {
	var xids, multixacts int64
	err := e.row(ctx, "SELECT max(age(datfrozenxid))::bigint, max(mxid_age(datminmxid))::bigint FROM pg_database", nil, &xids, &multixacts)
	if err != nil {
		return err
	}
	oldest := max(xids, multixacts)
	const remedy = "VACUUM (FREEZE) in the database that is oldest, and see what keeps autovacuum from it: long transactions, prepared ones, replication slots"
	switch {
	case oldest > xidAgeFail:
		e.fail(remedy, "%d million transaction ids are in use of 2147: the server stops soon", oldest/1e6)
	case oldest > xidAgeWarn:
		e.warn(remedy, "%d million transaction ids are in use of 2147", oldest/1e6)
	default:
		e.ok("%d million transaction ids are in use of 2147", oldest/1e6)
	}
	return nil
}
