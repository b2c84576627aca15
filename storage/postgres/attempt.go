package postgres

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres/internal/sealed"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// attempt is one run of a handler in an open transaction, on a connection of its own. It is one
// piece of memory with the parameters of its statements, because a request should cost few
// allocations. keyedAttempt and keylessAttempt embed it.
type attempt struct {
	store  *Store
	claim  *idempotency.Claim
	pooled *pgxpool.Conn
	conn   *pgconn.PgConn // of pooled
	tx     sealed.Transaction
	handle sealed.Tx // the handler's
	ctx    txContext

	// Results of the lock's statement.
	locked      bool
	claimedAt   [8]byte // transaction_timestamp() of the claim, as it came
	synchronous bool    // COMMIT waits for standbys

	// Parameters of the statements, in binary format.
	lockNumber  [8]byte
	lockParams  [1][]byte
	guardParams [2][]byte
	calls       [6]wire.Call // of the flush under way
}

// keyedAttempt is the attempt of a request with a key: it looks the record up, and writes it.
type keyedAttempt struct {
	attempt
	number int64 // of the lock

	// Results of the look-up.
	record *idempotency.Record
	hidden bool // row-level security applies: a record that is not seen may still be there

	// Parameters of the statements, in binary format.
	ttl        [8]byte
	status     [2]byte
	version    [2]byte
	scope, key []byte
	text       [96]byte  // of scope and key, if they are short
	headers    [160]byte // recorded, if they are few
	params     [insertParams][]byte
}

// claim claims the key on a connection. For a record that this store has seen before, a look-up is
// enough.
func (s *Store) claim(ctx context.Context, claim *idempotency.Claim, conn *pgxpool.Conn) (idempotency.Attempt, *idempotency.Record, error) {
	number := claim.Key.LockNumber(s.table)
	if s.recent.has(number) {
		if record, err := s.peek(ctx, conn.Conn().PgConn(), claim, number); record != nil || err != nil {
			conn.Release()
			return nil, record, err
		}
	}
	a := new(keyedAttempt)
	a.init(s, conn, claim, number)
	calls := append(a.calls[:0], wire.Call{Statement: &s.statements.begin}, a.lockCall(), a.lookUpCall())
	reply, err := s.statements.Flush(ctx, a.conn, calls...)
	switch {
	case errors.Is(err, errRecord):
		err = fail("read the record", idempotency.ErrUnknown, err)
	case err != nil:
		return nil, nil, a.claimFailed(ctx, calls[min(reply.Failed, len(calls)-1)].Statement, err)
	case a.record != nil: // even if the lock is taken: replays may hold it
		return a.replay(ctx)
	case a.hidden: // even if the lock is taken: perhaps by the replay of a hidden record
		err = fail("look the record up", idempotency.ErrUnknown, rowSecurity(s.table, ""))
	case !a.locked:
		err = idempotency.ErrInProgress
	default:
		return a, nil, nil
	}
	a.release(ctx)
	return nil, nil, err
}

// init makes a the attempt of this claim. Its transaction is not open yet.
func (a *attempt) init(store *Store, conn *pgxpool.Conn, claim *idempotency.Claim, number int64) {
	a.store, a.pooled, a.conn, a.claim, a.lockNumber = store, conn, conn.Conn().PgConn(), claim, wire.EncodeInt8(number)
	a.tx.Init(&store.transactions, conn.Conn())
	a.handle = a.tx.Handle()
}

func (a *keyedAttempt) init(store *Store, conn *pgxpool.Conn, claim *idempotency.Claim, number int64) {
	a.attempt.init(store, conn, claim, number)
	a.number = number
	text := append(append(a.text[:0], claim.Key.Scope...), claim.Key.Value...)
	a.scope, a.key = text[:len(claim.Key.Scope)], text[len(claim.Key.Scope):]
}

// lockCall tries to take the lock. The statement also returns the transaction's timestamp, and
// applies the settings that a pooler does not keep.
func (a *attempt) lockCall() wire.Call {
	a.lockParams[0] = a.lockNumber[:]
	return wire.Call{Statement: &a.store.statements.lock, Params: a.lockParams[:], Row: lockRow{a}}
}

// lockCall tries to lock the key. If the server can tell, it also reads the position of its log.
func (a *keyedAttempt) lockCall() wire.Call {
	call := a.attempt.lockCall()
	if !a.store.withoutPosition.Load() {
		call.Statement, call.Row = &a.store.statements.lockAt, lockAtRow{a}
	}
	return call
}

// lookUpCall looks the record up.
func (a *keyedAttempt) lookUpCall() wire.Call {
	a.params[0], a.params[1] = a.scope, a.key
	return wire.Call{Statement: &a.store.statements.lookUp, Params: a.params[:2:2], Row: recordRow{a}}
}

// lockRow reads the result of the claim's lock.
type lockRow struct{ *attempt }

func (a lockRow) ReadRow(values [][]byte) error {
	d := wire.Decoder{Values: values}
	a.readLock(&d)
	return d.Err
}

// lockAtRow reads the result of the claim's lock, and the position of the server's log.
type lockAtRow struct{ *keyedAttempt }

func (a lockAtRow) ReadRow(values [][]byte) error {
	d := wire.Decoder{Values: values}
	a.readLock(&d)
	a.claim.Timeline, a.claim.Position = d.Position()
	return d.Err
}

func (a *attempt) readLock(d *wire.Decoder) {
	a.locked = d.Bool()
	copy(a.claimedAt[:], d.Next(len(a.claimedAt)))
	a.claim.At, a.claim.Timeline, a.claim.Position = (&wire.Decoder{Values: [][]byte{a.claimedAt[:]}}).Timestamp(), 0, 0
	a.synchronous = d.Bool()
}

// claimFailed gives the connection back after this statement of the claim has failed, and returns
// Begin's error.
func (a *attempt) claimFailed(ctx context.Context, failed *wire.Statement, err error) error {
	conn, s := a.pooled.Conn(), a.store
	stale := conn.IsClosed() || wire.Unprepared(err) || wire.IsStandby(err)
	if failed == &s.statements.lockAt && withoutPosition(err) {
		s.withoutPosition.Store(true)
		stale = true
	}
	if classify(err) == idempotency.ErrAborted { // for a role, say, that a handler set for the session
		_ = conn.Close(ctx)
	}
	a.release(ctx)
	if stale {
		return fail("claim", idempotency.ErrUnavailable, errors.Join(errStale, wire.SQLError(err)))
	}
	sentinel := classify(err)
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && (pgErr.Code == "42P01" || pgErr.Code == "42703" || pgErr.Code == "3F000") {
		err = explain(err, "the records' table is missing or older than this version: run the migrations (migrations.Up, idemctl migrate up), or name its schema")
	}
	return fail("claim", sentinel, err)
}

// Context implements [idempotency.Attempt].
func (a *attempt) Context(ctx context.Context) context.Context {
	a.ctx = txContext{Context: ctx, tx: &a.handle}
	return &a.ctx
}

// Seal implements [idempotency.Attempt].
func (a *attempt) Seal() error { return stateError(a.tx.Seal()) }

// stateError returns the error of a transaction's state after a handler.
func stateError(state sealed.State, err error) error {
	const step = "after the handler"
	switch state {
	case sealed.StateReady:
		return nil
	case sealed.StateLost:
		return fail(step, idempotency.ErrTransactionLost, err)
	case sealed.StateClosed:
		return fail(step, idempotency.ErrUnavailable, err)
	case sealed.StateFailed:
		sentinel := classify(err)
		var pgErr *pgconn.PgError
		if errors.As(err, &pgErr) && pgErr.Code == "25006" {
			err = explain(err, remedyReadOnly)
		}
		return fail(step, sentinel, err)
	default:
		return fail(step, idempotency.ErrAborted, err)
	}
}

// Lost implements [idempotency.Attempt]. While the handler waits for the reply to a statement, it may
// report true although all is well.
func (a *attempt) Lost() bool { return wire.Unread(a.conn.Conn()) }

// Commit implements [idempotency.Attempt]: the statements that the handler deferred, the deferred
// constraints, the record and COMMIT in one round trip.
func (a *keyedAttempt) Commit(ctx context.Context, answer *idempotency.Answer) error {
	defer a.release(ctx)
	record := a.insertCall(a.claimedAt[:], answer)
	deferred, together, refused := a.deferred()
	record.Apart = together+len(record.Params[headersParam])+len(record.Params[headersParam+1]) > wire.TogetherBytesMax
	return a.recorded(ctx, "commit", a.commit(ctx, deferred, refused, record))
}

// commit sends the last flush: the handler's deferred statements, unless one was refused, and as
// the last statement before COMMIT the record or, without a key, a guard. The guard comes first: if
// the transaction is not the claim's, an error of a deferred statement or constraint proves
// nothing.
func (a *attempt) commit(ctx context.Context, deferred []wire.Call, refused error, last wire.Call) error {
	if !a.tx.Abandoned() && !wire.PlainText(a.conn) {
		return fail("commit", idempotency.ErrAborted, errEncoding)
	}
	if refused != nil {
		return fail("commit", refusal(refused), refused)
	}
	last.Row = wire.WarningForgotten{Conn: a.conn}
	s := &a.store.statements
	calls := append(append(a.calls[:0], a.guardCall()), deferred...)
	return a.end(ctx, "commit", append(calls, wire.Call{Statement: &s.constraints}, last, wire.Call{Statement: &s.commit}))
}

// guardCall fails if the transaction is not the one of the claim.
func (a *attempt) guardCall() wire.Call {
	a.guardParams = [...][]byte{a.claimedAt[:], a.store.synchronousCommit}
	return wire.Call{Statement: &a.store.statements.guard, Params: a.guardParams[:]}
}

// end sends the last flush, which ends with COMMIT, and returns an error for the outcome of the
// transaction.
func (a *attempt) end(ctx context.Context, step string, calls []wire.Call) error {
	switch {
	case a.tx.Abandoned():
		return fail(step, idempotency.ErrUnavailable, errors.New("a goroutine of the handler's still uses the connection"))
	case a.conn.IsClosed() || a.conn.IsBusy():
		return fail(step, idempotency.ErrUnavailable, errors.New("connection was closed or busy before COMMIT was sent"))
	case ctx.Err() != nil:
		return fail(step, idempotency.ErrUnavailable, fmt.Errorf("time was over before COMMIT was sent: %w", ctx.Err()))
	}
	wire.ForgetWarning(a.conn)
	reply, err := a.store.statements.Flush(ctx, a.conn, calls...)
	switch {
	case err == nil && !reply.Committed:
		return fail(step, idempotency.ErrAborted, errors.New("COMMIT was answered with ROLLBACK"))
	case err == nil && wire.WaitedInVain(a.conn, a.synchronous):
		// Standbys may have been named since the claim.
		return fail(step, idempotency.ErrUnknown, errNotReplicated)
	case err == nil:
		a.nudge()
		return nil
	}
	pgErr, ok := wire.Definite(err)
	if !ok {
		// Only a fresh connection can find the outcome, so this one is of no more use.
		_ = a.pooled.Conn().Close(ctx)
		return fail(step, idempotency.ErrUnknown, err)
	}
	sentinel, explained := a.store.statements.meaning(&calls[min(reply.Failed, len(calls)-1)], pgErr)
	return fail(step, sentinel, explained)
}

// recorded takes the error of Commit's or Decline's flush. If err is nil, it remembers the key.
// Otherwise it returns err, unless the key has another attempt's record or the look-up fails.
func (a *keyedAttempt) recorded(ctx context.Context, step string, err error) error {
	if err == nil && !a.synchronous { // with standbys a look-up is not enough for a replay
		a.store.recent.set(a.number)
	}
	if err == nil || !a.looks() || errors.Is(err, idempotency.ErrUnknown) || errors.Is(err, idempotency.ErrTransactionLost) || errors.Is(err, idempotency.ErrKeyRecorded) {
		return err
	}
	if looked := a.lookAgain(ctx, step, a.calls[:0]); looked != nil {
		return fmt.Errorf("%w (before that: %w)", looked, err)
	}
	return err
}

// looks reports whether the claim's snapshot may be older than its lock. Then the claim missed any
// record that was committed in between, so no end of this attempt may report not-executed until the
// key is looked up once more.
func (a *keyedAttempt) looks() bool { return a.store.options.Isolation != pgx.ReadCommitted }

// Decline implements [idempotency.Attempt]: it undoes the handler's writes and records the answer,
// in one round trip. Between the ROLLBACK and the INSERT another attempt may claim the key. So it
// tries the lock and ignores the result: waiting would hold this connection for the other handler's
// whole run, and the primary key decides anyway.
func (a *keyedAttempt) Decline(ctx context.Context, answer *idempotency.Answer) error {
	defer a.release(ctx)
	s := &a.store.statements
	calls := append(a.guarded(),
		wire.Call{Statement: &s.rollback},
		wire.Call{Statement: &s.begin},
		wire.Call{Statement: &s.lock, Params: [][]byte{a.lockNumber[:]}},
		a.insertCall(nil, answer),
		wire.Call{Statement: &s.commit},
	)
	return a.recorded(ctx, "decline", a.end(ctx, "decline", calls))
}

// guarded begins a flush that undoes the transaction. The guard comes first, unless the connection
// is abandoned and must not be used, or the transaction is aborted and accepts only ROLLBACK.
func (a *attempt) guarded() []wire.Call {
	if a.tx.Abandoned() || a.conn.TxStatus() != 'T' {
		return a.calls[:0]
	}
	return append(a.calls[:0], a.guardCall())
}

// Rollback implements [idempotency.Attempt].
func (a *keyedAttempt) Rollback(ctx context.Context) error {
	if !a.looks() {
		return a.rollback(ctx)
	}
	defer a.release(ctx)
	return a.lookAgain(ctx, "rollback", a.guarded())
}

// lookAgain sends the calls and ROLLBACK, and looks the key up in the same flush. It returns nil if
// there is no record.
func (a *keyedAttempt) lookAgain(ctx context.Context, step string, calls []wire.Call) error {
	a.record = nil
	err := a.undo(ctx, step, calls, a.lookUpCall())
	switch {
	case errors.Is(err, idempotency.ErrTransactionLost):
		return err
	case err != nil:
		return fail(step, idempotency.ErrUnknown, err)
	case a.record != nil:
		return fail(step, idempotency.ErrKeyRecorded, errors.New("the claim's snapshot was older than the record"))
	case a.hidden:
		return fail(step, idempotency.ErrUnknown, rowSecurity(a.store.table, ""))
	}
	return nil
}

// rollback undoes the transaction. A connection that can't be rolled back is closed, which has the
// same effect on the server.
func (a *attempt) rollback(ctx context.Context) error {
	defer a.release(ctx)
	if err := a.undo(ctx, "rollback", a.guarded()); errors.Is(err, idempotency.ErrTransactionLost) {
		return err
	}
	return nil
}

// undo sends the calls, then ROLLBACK if a transaction is open, then the last calls. It returns
// ErrTransactionLost if the guard failed.
func (a *attempt) undo(ctx context.Context, step string, calls []wire.Call, last ...wire.Call) error {
	s := &a.store.statements
	if a.tx.Abandoned() || a.conn.IsClosed() || a.conn.IsBusy() {
		return errors.New("the connection was lost before the handler's writes were undone")
	}
	if status := a.conn.TxStatus(); status == 'T' || status == 'E' {
		calls = append(calls, wire.Call{Statement: &s.rollback})
	}
	calls = append(calls, last...)
	if len(calls) == 0 {
		return nil
	}
	reply, err := s.Flush(ctx, a.conn, calls...)
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) && pgErr.Code == "22012" && calls[min(reply.Failed, len(calls)-1)].Statement == &s.guard {
		return fail(step, idempotency.ErrTransactionLost, err)
	}
	return err
}

// release ends an open transaction and gives the connection back. The pool destroys it unless it is
// idle.
func (a *attempt) release(ctx context.Context) {
	if a.tx.Abandoned() { // a goroutine of the handler's still uses it; its socket is closed
		a.pooled.Hijack()
		return
	}
	a.tx.End()
	if a.tx.StalePlans() {
		_ = a.pooled.Conn().Close(ctx) // there may be more of them
	}
	if status := a.conn.TxStatus(); (status == 'T' || status == 'E') && !a.conn.IsClosed() && !a.conn.IsBusy() {
		// ROLLBACK has a flush of its own: in an aborted transaction any statement in front of it
		// would fail the flush. If it fails, Release destroys the connection.
		_, _ = a.store.statements.Flush(ctx, a.conn, wire.Call{Statement: &a.store.statements.rollback})
	}
	a.pooled.Release()
}
