package postgres

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/envelope"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/storage/postgres/internal/sealed"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// The tables of open requests, in the schema of [TableName].
const (
	OpenTableName    = "idempotency_open"
	EffectsTableName = "idempotency_effects"
)

var _ idempotency.Keeper = (*Store)(nil)

// openStatements are the statements of requests that may become open. They are sent as text:
// compared with a call to another service the server's parsing costs nothing, and a missing table
// must not keep the other statements from being prepared.
type openStatements struct {
	begin   wire.Statement // READ COMMITTED: each statement sees the latest owner
	claim   wire.Statement // as statements.lock, but fails if the key is locked
	claimAt wire.Statement
	lock    wire.Statement // as statements.lock, but waits
	lockAt  wire.Statement
	key     wire.Statement // the row of an open request in the table of the records
	open    wire.Statement
	effect  wire.Statement // records a call that is about to be sent, or a phase; returns the time
	fence   wire.Statement // fails unless this owner has the open request; locks it
	renew   wire.Statement // as fence, but begins a new lease
	settle  wire.Statement // fails unless this owner has the effect and it is not settled
	end     wire.Statement // fails unless it records the answer and closes the request, as this owner
	state   string         // reads an open request
	take    string         // as state, and takes the request over if it is due
	due     string
	leave   string
	doubt   string
	panic   string

	// Of Settle.
	find          string
	hold          string
	settleOutside string
	hasten        string
	note          string
	audit         string

	// Of reconciliation.
	byKey   string
	between string
}

func newOpenStatements(o *Options) openStatements {
	keys := pgx.Identifier{o.Schema, TableName}.Sanitize()
	open := pgx.Identifier{o.Schema, OpenTableName}.Sanitize()
	effects := pgx.Identifier{o.Schema, EffectsTableName}.Sanitize()
	plain := newStatements(o)
	const try = "pg_catalog.pg_try_advisory_xact_lock($1)"
	claim := func(s wire.Statement) wire.Statement {
		return wire.Statement{OIDs: s.OIDs, SQL: strings.Replace(s.SQL, try, "(1 OPERATOR(pg_catalog./) CASE WHEN "+try+" THEN 1 ELSE 0 END) OPERATOR(pg_catalog.=) 1", 1)}
	}
	lock := func(s wire.Statement) wire.Statement {
		return wire.Statement{OIDs: s.OIDs, SQL: strings.Replace(s.SQL, try, "(SELECT true FROM pg_catalog.pg_advisory_xact_lock($1))", 1)}
	}
	const durable = "pg_catalog.set_config('synchronous_commit', $1, true) IS NOT NULL" + hearWarnings
	const counted = " SELECT 1 OPERATOR(pg_catalog./) pg_catalog.count(*)"
	const ours = " WHERE scope OPERATOR(pg_catalog.=) $2 AND key OPERATOR(pg_catalog.=) $3 AND epoch OPERATOR(pg_catalog.=) $4"
	const milliseconds = " OPERATOR(pg_catalog.*) interval '1 millisecond')"
	const now = "pg_catalog.clock_timestamp()"
	columns := "o.route, o.request, k.fingerprint_version, k.fingerprint, k.attempt_id, o.ttl_ms, o.epoch, o.runs, o.started_at, COALESCE(o.resumed_at, o.started_at), " + now +
		", o.next_at, o.lease_ms, o.owned, COALESCE(o.parked, ''), COALESCE(o.last_reason, '')," +
		" e.names, e.kinds, e.states, e.keys, e.inputs, e.outputs, e.tries, e.panics, e.sent, e.doubts" +
		" FROM " + open + " AS o JOIN " + keys + " AS k USING (scope, key), LATERAL (SELECT array_agg(name ORDER BY sent_first_at) AS names," +
		" array_agg(kind ORDER BY sent_first_at) AS kinds, array_agg(state ORDER BY sent_first_at) AS states," +
		" array_agg(derived_key::text ORDER BY sent_first_at) AS keys, array_agg(input ORDER BY sent_first_at) AS inputs," +
		" array_agg(output ORDER BY sent_first_at) AS outputs, array_agg(tries ORDER BY sent_first_at) AS tries," +
		" array_agg(panics ORDER BY sent_first_at) AS panics," +
		" array_agg(sent_first_at ORDER BY sent_first_at) AS sent, array_agg(doubt_at ORDER BY sent_first_at) AS doubts" +
		" FROM " + effects + " WHERE scope = $1 AND key = $2) AS e WHERE o.scope = $1 AND o.key = $2"
	records := "SELECT e.scope, e.key, k.attempt_id, e.name, e.kind, e.state, e.derived_key::text, e.input, e.output, e.tries, e.panics, e.sent_first_at" +
		" FROM " + effects + " AS e JOIN " + keys + " AS k USING (scope, key) WHERE e.kind <> 4 AND "
	return openStatements{
		begin: plain.resolveBegin,
		claim: claim(plain.lock), claimAt: claim(plain.lockAt),
		lock: lock(plain.lock), lockAt: lock(plain.lockAt),
		key: wire.Statement{
			// The far date keeps every reaper away, even one of a release without open requests. It is near
			// enough for a time.Duration, which older admin pages need.
			SQL: "WITH written AS (INSERT INTO " + keys + " (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body, trace_id)" +
				" VALUES (CASE WHEN " + durable + " THEN pg_catalog.transaction_timestamp() END, '2200-01-01 00:00:00+00', 0, $2, $3, $4, $5, $6, pg_catalog.decode('0100', 'hex'), '', $7)" +
				" RETURNING attempt_id OPERATOR(pg_catalog.=) $3 AND scope OPERATOR(pg_catalog.=) $4 AND key OPERATOR(pg_catalog.=) $5 AND fingerprint OPERATOR(pg_catalog.=) $6" +
				" AND pg_catalog.pg_client_encoding() OPERATOR(pg_catalog.=) ANY ('{UTF8,SQL_ASCII}'::pg_catalog.name[]) AS same)" + counted + " FILTER (WHERE same) FROM written",
			OIDs: []uint32{pgtype.TextOID, pgtype.Int2OID, pgtype.UUIDOID, pgtype.TextOID, pgtype.TextOID, pgtype.ByteaOID, pgtype.TextOID},
		},
		open: wire.Statement{
			SQL: "WITH written AS (INSERT INTO " + open + " (next_at, started_at, epoch, lease_ms, ttl_ms, runs, owned, scope, key, route, request)" +
				" VALUES (" + now + " OPERATOR(pg_catalog.+) ($1" + milliseconds + ", " + now + ", $7, $1, $2, 1, true, $3, $4, $5, $6) RETURNING 1)" + counted + " FROM written",
			OIDs: []uint32{pgtype.Int8OID, pgtype.Int8OID, pgtype.TextOID, pgtype.TextOID, pgtype.TextOID, pgtype.ByteaOID, pgtype.Int8OID},
		},
		effect: wire.Statement{
			SQL: "WITH written AS (INSERT INTO " + effects + " (sent_first_at, settled_at, epoch, tries, panics, state, kind, derived_key, scope, key, name, input, output)" +
				" VALUES (" + now + ", CASE WHEN $8 OPERATOR(pg_catalog.<>) 1 THEN " + now + " END, $1, 1, 0, $8, $2, $3, $4, $5, $6, $7, $9) RETURNING sent_first_at)" +
				counted + ", pg_catalog.max(sent_first_at) FROM written",
			OIDs: []uint32{pgtype.Int8OID, pgtype.Int2OID, pgtype.UUIDOID, pgtype.TextOID, pgtype.TextOID, pgtype.TextOID, pgtype.ByteaOID, pgtype.Int2OID, pgtype.ByteaOID},
		},
		fence: wire.Statement{
			SQL:  "WITH held AS (SELECT FROM " + open + ours + " AND " + durable + " FOR UPDATE)" + counted + ", " + synchronousStandbys + " FROM held",
			OIDs: []uint32{pgtype.TextOID, pgtype.TextOID, pgtype.TextOID, pgtype.Int8OID},
		},
		renew: wire.Statement{
			SQL: "WITH held AS (UPDATE " + open + " SET lease_ms = $5, next_at = " + now + " OPERATOR(pg_catalog.+) ($5" + milliseconds + ours + " AND " + durable + " RETURNING 1)" +
				counted + ", " + synchronousStandbys + " FROM held",
			OIDs: []uint32{pgtype.TextOID, pgtype.TextOID, pgtype.TextOID, pgtype.Int8OID, pgtype.Int8OID},
		},
		settle: wire.Statement{
			SQL: "WITH settled AS (UPDATE " + effects + " SET state = $5, output = $6, settled_at = " + now + ours +
				" AND name OPERATOR(pg_catalog.=) $7 AND state OPERATOR(pg_catalog.=) 1 AND " + durable + " RETURNING 1)" +
				counted + ", " + synchronousStandbys + " FROM settled",
			OIDs: []uint32{pgtype.TextOID, pgtype.TextOID, pgtype.TextOID, pgtype.Int8OID, pgtype.Int2OID, pgtype.ByteaOID, pgtype.TextOID},
		},
		end: wire.Statement{
			SQL: "WITH recorded AS (UPDATE " + keys + " SET status = $5, headers = $6, body = $7, trace_id = COALESCE($8, trace_id), expires_at = " + now + " OPERATOR(pg_catalog.+) ($9 OPERATOR(pg_catalog.*) interval '1 microsecond')" +
				" WHERE scope OPERATOR(pg_catalog.=) $2 AND key OPERATOR(pg_catalog.=) $3 AND status OPERATOR(pg_catalog.=) 0 AND attempt_id OPERATOR(pg_catalog.=) $10 AND " + durable +
				" RETURNING 1), closed AS (DELETE FROM " + open + ours + " RETURNING 1)" +
				" SELECT 1 OPERATOR(pg_catalog./) ((SELECT pg_catalog.count(*) FROM recorded) OPERATOR(pg_catalog.*) (SELECT pg_catalog.count(*) FROM closed))",
			OIDs: []uint32{pgtype.TextOID, pgtype.TextOID, pgtype.TextOID, pgtype.Int8OID, pgtype.Int2OID, pgtype.ByteaOID, pgtype.ByteaOID, pgtype.TextOID, pgtype.Int8OID, pgtype.UUIDOID},
		},
		state: "SELECT 0::bigint, " + columns,
		// All parts of a statement see the rows as they were before it. SKIP LOCKED: an owner in its last
		// transaction keeps the row, even if its lease has run out. The step to the next epoch is random,
		// so that the new epoch differs from that of an owner whose take-over was lost in a fail-over.
		take: "WITH taken AS (UPDATE " + open + " SET epoch = epoch + 1 + pg_catalog.floor(pg_catalog.random() * 1000000)::bigint, runs = runs + 1, owned = true," +
			" next_at = " + now + " + lease_ms * interval '1 millisecond'" +
			" WHERE (scope, key) IN (SELECT scope, key FROM " + open + " WHERE scope = $1 AND key = $2 AND route = $3 AND parked IS NULL AND next_at <= " + now + " FOR UPDATE SKIP LOCKED)" +
			" AND pg_catalog.set_config('synchronous_commit', $4, true) IS NOT NULL RETURNING epoch)," +
			// A call with an output that a person stated is not sent by this owner.
			" doubted AS (UPDATE " + effects + " SET doubt_at = CASE WHEN output IS NULL THEN " + now + " ELSE doubt_at END," +
			" tries = tries + CASE WHEN output IS NULL THEN 1 ELSE 0 END, epoch = (SELECT epoch FROM taken)" +
			" WHERE scope = $1 AND key = $2 AND state = 1 AND EXISTS (SELECT FROM taken))" +
			" SELECT COALESCE((SELECT epoch FROM taken), 0), " + columns,
		due: "SELECT scope, key FROM " + open + " WHERE parked IS NULL AND next_at <= " + now + " AND route = ANY ($1) ORDER BY next_at LIMIT $2",
		leave: "UPDATE " + open + " SET next_at = " + now + " + CASE WHEN $5 = '' THEN $4 ELSE 0 END * interval '1 millisecond', owned = false, parked = NULLIF($5, ''), last_reason = $6" +
			" WHERE scope = $1 AND key = $2 AND epoch = $3",
		doubt:   "UPDATE " + effects + " SET doubt_at = $5, tries = CASE WHEN $6 THEN tries ELSE GREATEST(tries - 1, 0) END WHERE scope = $1 AND key = $2 AND epoch = $3 AND name = $4 AND state = 1",
		panic:   "UPDATE " + effects + " SET panics = panics + 1 WHERE scope = $1 AND key = $2 AND epoch = $3 AND name = $4 AND state = 1",
		byKey:   records + "e.derived_key = ANY ($1)",
		between: records + "e.name = ANY ($1) AND e.sent_first_at >= $2 AND e.sent_first_at < $3 AND ($4::uuid IS NULL OR e.derived_key > $4) ORDER BY e.derived_key LIMIT $5",
		find: "SELECT e.scope, e.key, e.name, e.state, e.kind, k.attempt_id, " + fmt.Sprintf(`substr(e.input, 1, %d) = '\x%x'::bytea`, len(envelope.Mark), envelope.Mark) + " FROM " + effects + " AS e JOIN " + keys +
			" AS k USING (scope, key) WHERE e.derived_key = $1 AND e.kind <> 4",
		hold:          "SELECT FROM " + open + " WHERE scope = $1 AND key = $2 FOR UPDATE",
		settleOutside: "UPDATE " + effects + " SET state = $4, output = $5, settled_at = " + now + " WHERE scope = $1 AND key = $2 AND name = $3 AND state = 1",
		audit: "INSERT INTO " + pgx.Identifier{o.Schema, "idempotency_audit"}.Sanitize() +
			" (action, actor, reason, scope, key, attempt_id, status, record_created_at, record_expires_at, effect)" +
			" SELECT $4, 'the other service', 'settled from outside', scope, key, attempt_id, status, created_at, expires_at, $3 FROM " + keys + " WHERE scope = $1 AND key = $2",
		hasten: "UPDATE " + open + " SET next_at = CASE WHEN owned AND next_at > " + now + " THEN next_at ELSE " + now + " END, parked = NULL, last_reason = $3," +
			" resumed_at = CASE WHEN parked IS NULL THEN resumed_at ELSE " + now + " END WHERE scope = $1 AND key = $2",
		note: "UPDATE " + open + " SET last_reason = $3 WHERE scope = $1 AND key = $2",
	}
}

// openAttempt is the attempt of a request that may become open. It has a transaction, and a
// connection for it, only from the handler's first use of it to the next effect, and during a
// phase.
type openAttempt struct {
	store *Store
	claim *idempotency.Claim
	outer context.Context // the handler's, without this attempt
	epoch int64           // of this owner only; 0 until the request is open

	mu     sync.Mutex    // the handler may call Tx in several goroutines
	phase  *keyedAttempt // with the open transaction; nil if there is none
	asked  bool          // a claim was sent
	used   bool          // the handler has its handle
	inner  bool          // the open transaction belongs to a [Phase]
	over   bool          // the handler has returned
	shut   bool          // no transaction may begin, because an effect is under way or the handler has returned
	failed error         // why there is no transaction
}

// BeginOpen implements [idempotency.Keeper].
func (s *Store) BeginOpen(ctx context.Context, claim *idempotency.Claim, lazy bool) (idempotency.OpenAttempt, *idempotency.Record, error) {
	a := &openAttempt{store: s, claim: claim}
	if lazy && !s.recent.has(claim.Key.LockNumber(s.table)) {
		return a, nil, nil
	}
	record, err := a.claimNow(ctx)
	if record != nil || err != nil {
		return nil, record, err
	}
	return a, nil, nil
}

// claimNow claims the key and opens the first transaction.
func (a *openAttempt) claimNow(ctx context.Context) (*idempotency.Record, error) {
	a.asked = true
	begun, record, err := a.store.Begin(ctx, a.claim)
	if begun != nil {
		a.phase = begun.(*keyedAttempt)
	}
	return record, err
}

// Context implements [idempotency.Attempt].
func (a *openAttempt) Context(ctx context.Context) context.Context {
	a.outer, a.shut, a.over, a.failed, a.used, a.inner = ctx, false, false, nil, false, false
	return context.WithValue(context.WithValue(ctx, txKey{}, a), message.OutboxKey{}, a)
}

// Add implements [message.Outbox].
func (a *openAttempt) Add(m *message.Message) error { return a.Handle().Add(m) }

// Refuse implements [message.Outbox].
func (a *openAttempt) Refuse(err error) { a.Handle().Refuse(err) }

// Handle returns the handler's transaction, and opens it if there is none.
func (a *openAttempt) Handle() *sealed.Tx {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.phase == nil && !a.shut && a.failed == nil {
		a.failed = a.beginPhase(a.outer)
	}
	if a.phase == nil {
		dead := new(sealed.Transaction) // all its methods fail
		dead.End()
		handle := dead.Handle()
		return &handle
	}
	a.used = a.used || !a.inner
	return &a.phase.handle
}

// beginPhase opens the handler's next transaction: the claim, unless the request is open.
func (a *openAttempt) beginPhase(ctx context.Context) error {
	if a.epoch == 0 {
		record, err := a.claimNow(ctx)
		if record != nil {
			return fail("claim", idempotency.ErrKeyRecorded, errors.New("there is a record"))
		}
		return err
	}
	phase, err := a.vehicle(ctx)
	if err != nil {
		return err
	}
	if _, err := a.store.statements.Flush(ctx, phase.conn, a.phaseCalls(phase)...); err != nil {
		phase.release(ctx)
		return fail("begin", openMeaning(err), err)
	}
	a.phase = phase
	return nil
}

// phaseCalls returns the calls that open the transaction of an open request. It waits for the key's
// lock, but never for a running handler: only claims and look-ups hold that lock, for a moment.
func (a *openAttempt) phaseCalls(phase *keyedAttempt) []wire.Call {
	s := &a.store.open
	lock := phase.attempt.lockCall()
	lock.Statement = &s.lock
	return []wire.Call{{Statement: &a.store.statements.begin}, lock, a.fenceCall(&s.fence, phase)}
}

// vehicle returns a keyed attempt on a connection without a transaction.
func (a *openAttempt) vehicle(ctx context.Context) (*keyedAttempt, error) {
	conn, err := a.acquire(ctx)
	if err != nil {
		return nil, fail("acquire a connection", idempotency.ErrUnavailable, err)
	}
	phase := new(keyedAttempt)
	phase.init(a.store, conn, a.claim, a.claim.Key.LockNumber(a.store.table))
	return phase, nil
}

// acquire takes a connection from the pool, and tries until ctx ends, because a result must not be
// lost. The pool has checked that a connection that was idle for longer still works.
func (a *openAttempt) acquire(ctx context.Context) (*pgxpool.Conn, error) {
	for {
		conn, err := a.store.acquire(ctx)
		if err == nil && wire.PlainText(conn.Conn().PgConn()) {
			return conn, nil
		}
		if err == nil {
			_ = conn.Conn().Close(ctx)
			conn.Release()
			err = errEncoding
		}
		if ctx.Err() != nil {
			return nil, err
		}
	}
}

// fenceCall returns a call that fails unless this owner has the request. Its row may tell whether
// COMMIT waits for standbys.
func (a *openAttempt) fenceCall(statement *wire.Statement, phase *keyedAttempt, more ...[]byte) wire.Call {
	epoch := wire.EncodeInt8(a.epoch)
	return wire.Call{
		Statement: statement,
		Params:    append([][]byte{a.store.synchronousCommit, phase.scope, phase.key, epoch[:]}, more...),
		Meaning:   fenced,
		Row: wire.RowFunc(func(values [][]byte) error {
			d := wire.Decoder{Values: values}
			d.Next(-1)
			phase.synchronous = d.Bool()
			return d.Err
		}),
	}
}

// fenced is the Meaning of a call that fails if another owner has the request.
func fenced(err *pgconn.PgError) (sentinel, explained error) {
	if err.Code == "22012" && err.Where == "" {
		return idempotency.ErrFenced, err
	}
	return classify(err), err
}

func openMeaning(err error) error {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		sentinel, _ := fenced(pgErr)
		return sentinel
	}
	return idempotency.ErrUnavailable
}

// errUsed refuses an effect or a phase.
var errUsed = idempotency.UsageError("idempotency/postgres: a call or a phase after the handler has used its transaction (Tx or DeferExec): those writes would be lost or made twice; make the call first, or write in a Phase")

// Intend implements [idempotency.OpenAttempt]. The first intent makes the claim too, unless the
// handler's transaction has made it.
func (a *openAttempt) Intend(ctx context.Context, effect *idempotency.Effect, lease time.Duration) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.used:
		return errUsed
	case a.failed != nil:
		return a.failed
	}
	ofPhase, first := effect.Kind == idempotency.EffectPhase, a.epoch == 0
	a.shut, a.asked, a.inner = !ofPhase, true, false
	phase, s := a.phase, &a.store.open
	a.phase = nil
	claimed := phase != nil
	var calls []wire.Call
	var err error
	together := 0 // bytes that travel in one piece, behind the transaction's begin; see wire.Call.Apart
	switch {
	case phase == nil:
		if phase, err = a.vehicle(ctx); err != nil {
			return err
		}
		calls = append(calls, wire.Call{Statement: &s.begin})
	case ofPhase && effect.State == idempotency.EffectDeclined:
		calls, claimed = append(phase.guarded(), wire.Call{Statement: &a.store.statements.rollback}, wire.Call{Statement: &s.begin}), false
	case ofPhase:
		var deferred []wire.Call
		if deferred, together, err = phase.deferred(); err != nil {
			err = fail("commit a phase", refusal(err), err)
		} else if !phase.tx.Abandoned() && !wire.PlainText(phase.conn) {
			err = fail("commit a phase", idempotency.ErrAborted, errEncoding)
		}
		calls = append(append([]wire.Call{phase.guardCall()}, deferred...), wire.Call{Statement: &a.store.statements.constraints})
	}
	defer phase.release(ctx)
	apart := func(bytes int) bool {
		together += bytes
		return ofPhase && claimed && together > wire.TogetherBytesMax
	}
	derived, wrong := parseUUID(effect.DerivedKey)
	if wrong != nil {
		err = fail("intend", idempotency.ErrAborted, wrong)
	}
	if err != nil {
		a.failed = err
		return err
	}
	// The epoch is random, so that the owner of an earlier request with this key, which an operator
	// has abandoned, does not own this one.
	leaseMS, epoch := wire.EncodeInt8(lease.Milliseconds()), rand.Int64N(1<<40)+1
	epochBytes := wire.EncodeInt8(epoch)
	if a.epoch == 0 {
		if !claimed {
			claim := phase.lockCall()
			if claim.Statement == &a.store.statements.lockAt {
				claim.Statement = &s.claimAt
			} else {
				claim.Statement = &s.claim
			}
			claim.Meaning = func(err *pgconn.PgError) (sentinel, explained error) {
				if err.Code == "22012" {
					// A replay may hold the lock, so this is not in-progress yet. The engine claims again, and
					// that claim looks for the record first.
					return idempotency.ErrKeyRecorded, err
				}
				return classify(err), err
			}
			calls = append(calls, claim)
		}
		ttl := wire.EncodeInt8(a.claim.TTL.Milliseconds())
		version := wire.EncodeInt2(a.claim.Fingerprint.Version)
		stored := notNull(a.claim.Stored())
		var trace []byte
		if a.claim.TraceID != "" {
			trace = []byte(a.claim.TraceID)
		}
		calls = append(calls,
			wire.Call{
				Statement: &s.key,
				Params:    [][]byte{a.store.synchronousCommit, version[:], a.claim.Attempt[:], phase.scope, phase.key, a.claim.Fingerprint.Sum[:], trace},
				Meaning: func(err *pgconn.PgError) (sentinel, explained error) {
					return a.store.statements.meaning(&wire.Call{Statement: &a.store.statements.insert}, err)
				},
			},
			wire.Call{Statement: &s.open, Params: [][]byte{leaseMS[:], ttl[:], phase.scope, phase.key, []byte(a.claim.Resumable), stored, epochBytes[:]}, Apart: apart(len(stored))},
		)
	} else {
		epoch, epochBytes = a.epoch, wire.EncodeInt8(a.epoch)
		calls = append(calls, a.fenceCall(&s.renew, phase, leaseMS[:]))
	}
	kind, state := wire.EncodeInt2(int16(effect.Kind)), wire.EncodeInt2(int16(effect.State))
	calls = append(calls,
		wire.Call{
			Statement: &s.effect,
			Params:    [][]byte{epochBytes[:], kind[:], derived[:], phase.scope, phase.key, []byte(effect.Name), notNull(effect.Input), state[:], effect.Output},
			Apart:     apart(len(effect.Output)),
			Row: wire.RowFunc(func(values [][]byte) error {
				wire.ForgetWarning(phase.conn) // of the handler's triggers: see wire.WarningForgotten
				d := wire.Decoder{Values: values}
				d.Next(-1)
				effect.SentFirst = d.Timestamp()
				return d.Err
			}),
		},
		wire.Call{Statement: &a.store.statements.commit},
	)
	err = phase.end(ctx, "intend", calls)
	if err != nil && ofPhase && first {
		err = phase.recorded(ctx, "intend", err)
	}
	if err == nil || errors.Is(err, idempotency.ErrUnknown) {
		a.epoch = epoch
	} else {
		a.failed = err
	}
	return err
}

// notNull returns the bytes as a parameter: nil would be NULL.
func notNull(b []byte) []byte {
	if b == nil {
		return []byte{}
	}
	return b
}

// parseUUID returns the bytes of a UUID in its usual form.
func parseUUID(text string) (id [16]byte, err error) {
	n, err := hex.Decode(id[:], []byte(strings.ReplaceAll(text, "-", "")))
	if err == nil && n != len(id) {
		err = errors.New("derived key is no UUID")
	}
	return id, err
}

// Settle implements [idempotency.OpenAttempt]: two transactions in one round trip. The first
// commits the result, so that a failure of the second can't make another send necessary.
func (a *openAttempt) Settle(ctx context.Context, effect *idempotency.Effect) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.shut = a.over
	phase, err := a.vehicle(ctx)
	if err != nil {
		return err
	}
	state := wire.EncodeInt2(int16(effect.State))
	calls := append([]wire.Call{
		{Statement: &a.store.open.begin},
		a.fenceCall(&a.store.open.settle, phase, state[:], notNull(effect.Output), []byte(effect.Name)),
		{Statement: &a.store.statements.commit},
	}, a.phaseCalls(phase)...)
	const settled = 3 // calls
	if a.over {
		// Only the result matters now, and nobody would end another transaction.
		calls = calls[:settled]
	}
	wire.ForgetWarning(phase.conn)
	reply, err := a.store.statements.Flush(ctx, phase.conn, calls...)
	var pgErr *pgconn.PgError
	switch {
	case wire.WaitedInVain(phase.conn, phase.synchronous):
		phase.release(ctx)
		return fail("settle", idempotency.ErrUnknown, errNotReplicated)
	case err == nil && a.over:
		phase.release(ctx)
		return nil
	case err == nil:
		a.phase = phase
		return nil
	case reply.Failed >= settled: // the result is committed, and only the second transaction failed
		phase.release(ctx)
		a.failed = fail("begin", openMeaning(err), err)
		return nil
	case errors.As(err, &pgErr):
		phase.release(ctx)
		return fail("settle", openMeaning(err), err)
	}
	_ = phase.pooled.Conn().Close(ctx)
	phase.release(ctx)
	return fail("settle", idempotency.ErrUnknown, err)
}

// Recorded implements [idempotency.OpenAttempt].
func (a *openAttempt) Recorded(ctx context.Context, name string) (*idempotency.Effect, error) {
	open, err := a.store.ReadOpen(ctx, a.claim.Key)
	switch {
	case err != nil:
		return nil, err
	case open == nil || open.Epoch != a.epoch:
		return nil, fail("read the effect", idempotency.ErrFenced, errors.New("another owner has the request"))
	}
	at := slices.IndexFunc(open.Effects, func(e idempotency.Effect) bool { return e.Name == name })
	if at < 0 {
		return nil, fail("read the effect", idempotency.ErrFenced, errors.New("it is gone"))
	}
	return &open.Effects[at], nil
}

// Seal implements [idempotency.Attempt].
func (a *openAttempt) Seal() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.shut, a.over = true, true
	if a.phase != nil {
		return a.phase.Seal()
	}
	return a.failed
}

// Lost implements [idempotency.Attempt]. An open request outlives its connections.
func (a *openAttempt) Lost() bool { return false }

// Commit implements [idempotency.Attempt].
func (a *openAttempt) Commit(ctx context.Context, answer *idempotency.Answer) error {
	phase, begun, err := a.last(ctx)
	if err != nil {
		return err
	}
	if a.epoch == 0 {
		return phase.Commit(ctx, answer)
	}
	defer phase.release(ctx)
	if begun {
		deferred, _, refused := phase.deferred()
		err = phase.commit(ctx, deferred, refused, a.endCall(phase, answer))
	} else {
		err = phase.end(ctx, "commit", append(a.phaseCalls(phase), a.endCall(phase, answer), wire.Call{Statement: &a.store.statements.commit}))
	}
	if err == nil && !phase.synchronous {
		a.store.recent.set(phase.number)
	}
	return err
}

// last returns the attempt with the last transaction. If the handler has begun none, last begins
// it; if the request is open, the flush that records the answer begins it instead (begun is false).
func (a *openAttempt) last(ctx context.Context) (phase *keyedAttempt, begun bool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.phase == nil && a.epoch == 0 {
		if err := a.beginPhase(ctx); err != nil {
			return nil, false, err
		}
	}
	phase = a.phase
	a.phase = nil
	if phase == nil {
		phase, err = a.vehicle(ctx)
		return phase, false, err
	}
	return phase, true, nil
}

// endCall returns the call that records the answer and closes the request.
func (a *openAttempt) endCall(phase *keyedAttempt, answer *idempotency.Answer) wire.Call {
	status, ttl := wire.EncodeInt2(int16(answer.Status)), wire.EncodeInt8(a.claim.TTL.Microseconds())
	var trace []byte
	if a.claim.TraceID != "" {
		trace = []byte(a.claim.TraceID)
	}
	call := a.fenceCall(&a.store.open.end, phase, status[:], encodeHeaders(nil, answer.Header), notNull(answer.Body), trace, ttl[:], a.claim.Attempt[:])
	call.Row = nil
	return call
}

// Decline implements [idempotency.Attempt].
func (a *openAttempt) Decline(ctx context.Context, answer *idempotency.Answer) error {
	phase, begun, err := a.last(ctx)
	if err != nil {
		return err
	}
	if a.epoch == 0 {
		return phase.Decline(ctx, answer)
	}
	defer phase.release(ctx)
	calls := a.phaseCalls(phase)
	if begun {
		calls = append(phase.guarded(), wire.Call{Statement: &a.store.statements.rollback}, wire.Call{Statement: &a.store.open.begin})
	}
	return phase.end(ctx, "decline", append(calls, a.endCall(phase, answer), wire.Call{Statement: &a.store.statements.commit}))
}

// Rollback implements [idempotency.Attempt]. An attempt that has not claimed its key claims it
// here, because its failure must not hide the record or the running attempt of another.
func (a *openAttempt) Rollback(ctx context.Context) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.epoch == 0 && !a.asked {
		record, err := a.claimNow(ctx)
		switch {
		case record != nil, errors.Is(err, idempotency.ErrInProgress):
			return fail("roll back", idempotency.ErrKeyRecorded, errors.New("another attempt has the key"))
		case errors.Is(err, idempotency.ErrUnknown), errors.Is(err, idempotency.ErrRecordCorrupt):
			// There may be a record. The engine claims again, and answers what that claim finds.
			return fail("roll back", idempotency.ErrKeyRecorded, err)
		}
	}
	phase := a.phase
	a.phase = nil
	if phase == nil {
		return nil
	}
	return a.rollback(ctx, phase)
}

// rollback undoes a transaction. Once the request is open it does not look for a record, because it
// would find the request's own row.
func (a *openAttempt) rollback(ctx context.Context, phase *keyedAttempt) error {
	if a.epoch != 0 {
		return phase.rollback(ctx)
	}
	return phase.Rollback(ctx)
}

// Leave implements [idempotency.OpenAttempt].
func (a *openAttempt) Leave(ctx context.Context, lapse idempotency.Lapse) error {
	lost := a.Rollback(ctx)
	key := a.claim.Key
	for name, doubt := range lapse.Doubts {
		var at *time.Time
		if !doubt.At.IsZero() {
			at = &doubt.At
		}
		// This comes first, because the next owner may come as soon as the request is left. If a later
		// step fails, a doubt that was not set back is safe.
		if _, err := a.store.pool.Exec(ctx, a.store.open.doubt, pgx.QueryExecModeExec, key.Scope, key.Value, a.epoch, name, at, doubt.Sent); err != nil {
			return errors.Join(lost, fail("leave", idempotency.ErrUnavailable, err))
		}
	}
	if lapse.Panicked != "" {
		if _, err := a.store.pool.Exec(ctx, a.store.open.panic, pgx.QueryExecModeExec, key.Scope, key.Value, a.epoch, lapse.Panicked); err != nil {
			return errors.Join(lost, fail("leave", idempotency.ErrUnavailable, err))
		}
	}
	tag, err := a.store.pool.Exec(ctx, a.store.open.leave, pgx.QueryExecModeExec, key.Scope, key.Value, a.epoch, lapse.Pause.Milliseconds(), lapse.Parked, lapse.Reason)
	switch {
	case err != nil:
		return errors.Join(lost, fail("leave", idempotency.ErrUnavailable, err))
	case tag.RowsAffected() != 1:
		return errors.Join(lost, fail("leave", idempotency.ErrFenced, errors.New("no such row")))
	}
	return lost
}

// TakeOver implements [idempotency.Keeper].
func (s *Store) TakeOver(ctx context.Context, claim *idempotency.Claim) (idempotency.OpenAttempt, *idempotency.Open, error) {
	open, epoch, err := s.readOpen(ctx, s.open.take, claim.Key, claim.Resumable, string(s.synchronousCommit))
	if err != nil {
		return nil, nil, fail("take over", idempotency.ErrUnknown, err)
	}
	if epoch == 0 {
		return nil, open, nil
	}
	open.Epoch, open.Runs = epoch, open.Runs+1
	claim.Attempt, claim.TTL, claim.At = open.Attempt, open.TTL, open.Now
	return &openAttempt{store: s, claim: claim, asked: true, epoch: open.Epoch}, open, nil
}

// LookUp implements [idempotency.Keeper]. It takes no lock. If COMMIT waits for standbys, it waits
// until they have the record.
func (s *Store) LookUp(ctx context.Context, key idempotency.Key) (*idempotency.Record, error) {
	record, err := s.lookUpOn(ctx, key, s.acquire)
	if errors.Is(err, errStale) && ctx.Err() == nil {
		acquire := s.acquireFresh
		if wire.Unprepared(err) {
			acquire = s.acquireUnprepared
		}
		return s.lookUpOn(ctx, key, acquire)
	}
	return record, err
}

func (s *Store) lookUpOn(ctx context.Context, key idempotency.Key, acquire acquireFunc) (record *idempotency.Record, err error) {
	const step = "look the key up"
	pooled, err := acquire(ctx)
	if err != nil {
		return nil, fail("acquire a connection", idempotency.ErrUnavailable, err)
	}
	defer pooled.Release() // which closes one in an open transaction
	conn := pooled.Conn().PgConn()
	if !wire.PlainText(conn) {
		_ = pooled.Conn().Close(ctx)
		return nil, fail(step, idempotency.ErrUnavailable, errors.Join(errStale, errEncoding))
	}
	var hidden, standby, synchronous bool
	_, err = s.statements.Flush(ctx, conn, wire.Call{
		Statement: &s.statements.peek, Params: [][]byte{[]byte(key.Scope), []byte(key.Value)},
		Row: wire.RowFunc(func(values [][]byte) (err error) {
			d := wire.Decoder{Values: values[min(1+recordColumnsCount, len(values)):]}
			if standby, synchronous = d.Bool(), d.Bool(); d.Err != nil {
				return d.Err
			}
			record, hidden, err = decodeLookUp(values)
			return err
		}),
	})
	if hidden {
		s.statements.Distrust(conn) // a plan with policies would outlive them
	}
	switch {
	case errors.Is(err, errRecord):
		return nil, fail("read the record", idempotency.ErrUnknown, err)
	case err != nil && (conn.IsClosed() || wire.Unprepared(err)):
		return nil, fail(step, idempotency.ErrUnavailable, errors.Join(errStale, wire.SQLError(err)))
	case err != nil:
		return nil, fail(step, classify(err), err)
	case standby:
		return nil, fail(step, idempotency.ErrUnknown, errStandby)
	case record == nil && hidden:
		return nil, fail(step, idempotency.ErrUnknown, rowSecurity(s.table, ""))
	case record != nil && synchronous:
		if _, err := s.statements.Flush(ctx, conn, wire.Call{Statement: &s.statements.begin}); err != nil {
			return nil, fail(step, classify(err), err)
		}
		if err := s.barrier(ctx, conn); err != nil {
			return nil, fail("make the record safe", idempotency.ErrUnknown, err)
		}
	}
	return record, nil
}

// ReadOpen implements [idempotency.Keeper].
func (s *Store) ReadOpen(ctx context.Context, key idempotency.Key) (*idempotency.Open, error) {
	open, _, err := s.readOpen(ctx, s.open.state, key)
	if err != nil {
		return nil, fail("read the open request", idempotency.ErrUnavailable, err)
	}
	return open, nil
}

// readOpen returns the state of an open request, and the new epoch if the statement has taken it
// over, else 0.
func (s *Store) readOpen(ctx context.Context, sql string, key idempotency.Key, more ...any) (open *idempotency.Open, epoch int64, err error) {
	var (
		o               idempotency.Open
		sum             []byte
		ttl, lease      int64
		names, keys     []string
		kinds, states   []int16
		tries, panics   []int32
		inputs, outputs [][]byte
		sent            []time.Time
		doubts          []*time.Time
		attemptID       pgtype.UUID
	)
	err = s.pool.QueryRow(ctx, sql, append([]any{pgx.QueryExecModeExec, key.Scope, key.Value}, more...)...).Scan(
		&epoch, &o.Route, &o.Request, &o.Fingerprint.Version, &sum, &attemptID, &ttl, &o.Epoch, &o.Runs, &o.Started, &o.Resumed, &o.Now,
		&o.Due, &lease, &o.Owned, &o.Parked, &o.LastFail, &names, &kinds, &states, &keys, &inputs, &outputs, &tries, &panics, &sent, &doubts)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil, 0, nil
	case err != nil:
		return nil, 0, wire.SQLError(err)
	case len(sum) != len(o.Fingerprint.Sum):
		return nil, 0, errRecord
	}
	copy(o.Fingerprint.Sum[:], sum)
	o.Attempt = attemptID.Bytes
	o.TTL, o.Lease = time.Duration(ttl)*time.Millisecond, time.Duration(lease)*time.Millisecond
	o.Owned = o.Owned && o.Now.Before(o.Due)
	for i, name := range names {
		effect := idempotency.Effect{
			Name: name, Kind: idempotency.EffectKind(kinds[i]), State: idempotency.EffectState(states[i]), DerivedKey: keys[i],
			Input: inputs[i], Output: outputs[i], Tries: int(tries[i]), Panics: int(panics[i]), SentFirst: sent[i],
		}
		if doubts[i] != nil {
			effect.Doubt = *doubts[i]
		}
		o.Effects = append(o.Effects, effect)
	}
	return &o, epoch, nil
}

// FindDue implements [idempotency.Keeper].
func (s *Store) FindDue(ctx context.Context, routes []string, max int) ([]idempotency.Key, error) {
	rows, err := s.pool.Query(ctx, s.open.due, pgx.QueryExecModeExec, routes, max)
	if err != nil {
		return nil, fmt.Errorf("find due: %w", wire.SQLError(err))
	}
	keys, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (key idempotency.Key, err error) {
		return key, row.Scan(&key.Scope, &key.Value)
	})
	if err != nil {
		return nil, fmt.Errorf("find due: %w", wire.SQLError(err))
	}
	return keys, nil
}
