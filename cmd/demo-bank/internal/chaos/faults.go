package chaos

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/process"
	"github.com/paidonce/idempotency/internal/deadline"
)

const (
	crashWaitMax    = 60 * time.Second // for a cluster to restart itself
	crashNoticeMax  = 10 * time.Second // for a cluster to notice that a backend died
	killNextWaitMax = 3 * time.Second  // for a COMMIT to pass
	lullMax         = 18 * time.Second
	lullCommits     = 3 // half-open ones for each bank
	insistMax       = 5 * time.Second
	insistCrashMax  = 30 * time.Second // a try that hits nothing takes crashNoticeMax
	deadlockPause   = 300 * time.Millisecond
	lockWaitMax     = 3 * time.Second // of our own sessions, for others' locks
)

// tracks splits the events, in order, into the tracks that may run at once. Faults of the cluster
// or the network follow one another, and so do those of the banks and of the processor.
func (r *run) tracks() [][]event {
	tracks := make([][]event, 3)
	for _, e := range r.schedule.events {
		switch {
		case e.kind.ofProcessor():
			tracks[2] = append(tracks[2], e)
		case e.kind == killBank, e.kind == terminateBackends, e.kind == cutAll:
			tracks[1] = append(tracks[1], e)
		default:
			tracks[0] = append(tracks[0], e)
		}
	}
	return tracks
}

// breakThings makes a track's events when they are due. If another fault prevents an event, it is
// made as well as possible. An error means that the run can't continue.
func (r *run) breakThings(ctx context.Context, track []event) error {
	for _, e := range track {
		for r.tally.finished.Load() < e.due {
			if err := deadline.Sleep(ctx, idlePause); err != nil {
				return err
			}
		}
		if e.kind == lull {
			r.calm.Lock()
		} else {
			r.calm.RLock()
		}
		r.note("%s begins", e.kind)
		done, err := r.do(ctx, e)
		if e.kind == lull {
			r.calm.Unlock()
		} else {
			r.calm.RUnlock()
		}
		r.note("%s is over: %t", e.kind, done)
		r.noteFault()
		if err != nil {
			return fmt.Errorf("%s: %w", e.kind, err)
		}
		if done {
			r.tally.faults.add(string(e.kind))
		}
		r.eventsLeft.Add(-1)
	}
	return nil
}

// do makes an event, and reports whether it had its effect.
func (r *run) do(ctx context.Context, e event) (bool, error) {
	if e.kind.ofProcessor() {
		return r.misbehave(ctx, e)
	}
	proxy := r.cluster.proxies[e.bank]
	switch e.kind {
	case killBank:
		return r.banks.kill(e.bank, arm{e.point, e.nth}), nil
	case cutAll:
		return r.insist(ctx, insistMax, func() (bool, error) { // the bank may be down
			n := proxy.CutAll()
			r.allow(n)
			return n > 0, nil
		})
	case refuse:
		proxy.SetRefuse(true)
		defer proxy.SetRefuse(false)
		r.allow(proxy.CutAll())
		return true, deadline.Sleep(ctx, e.length)
	case pause:
		r.allow(proxy.Connections())
		proxy.SetPaused(true)
		defer proxy.SetPaused(false)
		return true, deadline.Sleep(ctx, e.length)
	case latency:
		proxy.SetLatency(time.Duration(e.amount) * time.Millisecond)
		defer proxy.SetLatency(0)
		return true, deadline.Sleep(ctx, e.length)
	case slowLink:
		proxy.SetRate(e.amount)
		defer proxy.SetRate(0)
		return true, deadline.Sleep(ctx, e.length)
	case crashPostmaster:
		r.allowAll()
		r.tally.crashes.Add(1)
		return true, r.cluster.crash(ctx)
	case crashBackend:
		return r.insist(ctx, insistCrashMax, func() (bool, error) { return r.crashBackend(ctx) })
	case crashCommitting:
		return r.insist(ctx, insistCrashMax, func() (bool, error) { return r.crashCommitting(ctx) })
	case terminateBackends:
		return r.insist(ctx, insistMax, func() (bool, error) {
			n, err := r.terminateSome(ctx, e.amount)
			r.allow(n)
			return n > 0, err
		})
	case rowLocks:
		return r.insist(ctx, insistMax, func() (bool, error) {
			return r.holdLocks(ctx, e.length, lockFree, r.keys.names[e.amount], r.keys.names[e.amount+lockedRows-1])
		})
	case squeeze:
		return r.insist(ctx, insistMax, func() (bool, error) {
			held, err := r.holdLocks(ctx, e.length, `LOCK TABLE accounts IN EXCLUSIVE MODE`)
			var pgErr *pgconn.PgError
			// Everybody behind it waited too, which is as good.
			waited := errors.As(err, &pgErr) && pgErr.Code == "55P03"
			return held || waited, err
		})
	case lull:
		return r.lull(ctx)
	case deadlock:
		return r.insist(ctx, insistMax, func() (bool, error) { return r.deadlock(ctx) })
	}
	return false, errors.New("nobody knows how")
}

// allow counts the COMMITs that an event may have broken: at most one for each conn.
func (r *run) allow(n int) { r.tally.allowed.Add(int64(n)) }

func (r *run) allowAll() {
	for _, proxy := range r.cluster.proxies {
		r.allow(proxy.Connections())
	}
}

// insist calls do until it has its effect, or the limit has elapsed: another fault may hold the
// database down at the same time, and the banks may be idle.
func (r *run) insist(ctx context.Context, limit time.Duration, do func() (bool, error)) (bool, error) {
	for until := time.Now().Add(limit); ; {
		done, err := do()
		if err != nil {
			r.note("could not: %v", err)
		}
		switch {
		case ctx.Err() != nil:
			return false, ctx.Err()
		case errors.Is(err, errNoRestart):
			return false, err
		case done || time.Now().After(until):
			return done, nil
		}
		if err := deadline.Sleep(ctx, idlePause); err != nil {
			return false, err
		}
	}
}

// lockFree locks only rows that no session holds: waiting for the rows of a half-open transaction
// would take long.
const lockFree = `SELECT 1 FROM accounts WHERE id >= $1 AND id <= $2 ORDER BY id FOR UPDATE SKIP LOCKED`

// terminateSome ends at most the given number of the banks' working backends.
func (r *run) terminateSome(ctx context.Context, most int) (n int, err error) {
	err = r.cluster.admin.use(ctx, r.cluster, func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, `
			SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM (
				SELECT pid FROM pg_stat_activity
				WHERE application_name = $1 AND state <> 'idle' AND xact_start > clock_timestamp() - interval '1 second'
				ORDER BY random() LIMIT $2) AS working`,
			applicationBank, most).Scan(&n)
	})
	return n, err
}

// crashBackend kills a backend with -9; PostgreSQL then restarts the cluster.
func (r *run) crashBackend(ctx context.Context) (bool, error) {
	var pid int32
	before, err := r.postmasterStart(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, `SELECT pid FROM pg_stat_activity WHERE application_name = $1 ORDER BY state <> 'idle' DESC, random() LIMIT 1`,
			applicationBank).Scan(&pid)
	})
	if err != nil {
		return false, err
	}
	r.allowAll()
	if process.Kill(int(pid)) != nil {
		return false, nil // it has just ended
	}
	return r.awaitRestart(ctx, before, crashNoticeMax)
}

// crashCommitting does the same to the backend of the next COMMIT, while the COMMIT is on the wire.
func (r *run) crashCommitting(ctx context.Context) (bool, error) {
	before, err := r.postmasterStart(ctx, nil)
	if err != nil {
		return false, err
	}
	r.allowAll()
	told := make(chan struct{})
	r.commits.killNext.Store(&told)
	select {
	case <-told:
	case <-ctx.Done():
		return false, ctx.Err()
	case <-time.After(killNextWaitMax):
		if r.commits.killNext.CompareAndSwap(&told, nil) {
			return false, nil
		}
		<-told
	}
	return r.awaitRestart(ctx, before, crashNoticeMax)
}

// postmasterStart returns the time at which the cluster last started or restarted itself. If also
// is set, it is called on the same connection.
func (r *run) postmasterStart(ctx context.Context, also func(context.Context, *pgx.Conn) error) (started time.Time, err error) {
	err = r.cluster.admin.use(ctx, r.cluster, func(ctx context.Context, conn *pgx.Conn) error {
		if err := conn.QueryRow(ctx, checkpointerStart).Scan(&started); err != nil || also == nil {
			return err
		}
		return also(ctx, conn)
	})
	return started, err
}

// checkpointerStart changes with each restart of the cluster; pg_postmaster_start_time() does not.
const checkpointerStart = `SELECT backend_start FROM pg_stat_activity WHERE backend_type = 'checkpointer'`

// awaitRestart blocks until the cluster has restarted itself, and reports whether it did. A backend
// that is about to exit does not die of its SIGKILL: then the cluster keeps answering, and nothing
// was broken.
func (r *run) awaitRestart(ctx context.Context, before time.Time, notice time.Duration) (bool, error) {
	began := time.Now()
	for time.Since(began) < crashWaitMax {
		now, err := r.postmasterStart(ctx, nil)
		switch {
		case err == nil && !now.Equal(before):
			r.tally.crashes.Add(1)
			return true, nil
		case err == nil && time.Since(began) > notice:
			return false, nil
		}
		if err := deadline.Sleep(ctx, idlePause); err != nil {
			return false, err
		}
	}
	return false, fmt.Errorf("%w within %v of the SIGKILL of a backend", errNoRestart, crashWaitMax)
}

var errNoRestart = errors.New("PostgreSQL did not restart")

// holdLocks takes locks that the banks want, and holds them for length.
func (r *run) holdLocks(ctx context.Context, length time.Duration, lock string, args ...any) (bool, error) {
	held := false
	err := r.cluster.with(ctx, length+databaseTimeout, func(ctx context.Context, conn *pgx.Conn) error {
		return inTransaction(ctx, conn, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, lock, args...); err != nil {
				return err
			}
			held = true
			return deadline.Sleep(ctx, length)
		})
	})
	return held, err
}

// lull leaves some COMMITs half-open and makes no other fault until a client gets unknown. The
// banks look for such a COMMIT for eight seconds; any other fault that ended the transaction
// meanwhile would let them find its outcome.
func (r *run) lull(ctx context.Context) (bool, error) {
	before := r.tally.unknown.Load()
	r.commits.calm(lullCommits * r.config.Banks)
	defer r.commits.calm(0)
	for until := time.Now().Add(lullMax); r.tally.unknown.Load() == before; {
		if time.Now().After(until) {
			return false, nil
		}
		if err := deadline.Sleep(ctx, idlePause); err != nil {
			return false, err
		}
	}
	return true, nil
}

// deadlock locks high accounts, lets transfers that hold low accounts wait for them, and then wants
// the low ones.
func (r *run) deadlock(ctx context.Context) (bool, error) {
	wanted := false
	err := r.cluster.with(ctx, databaseTimeout, func(ctx context.Context, conn *pgx.Conn) error {
		return inTransaction(ctx, conn, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, lockFree, r.keys.names[accounts*3/4], r.keys.names[accounts-1]); err != nil {
				return err
			}
			if err := deadline.Sleep(ctx, deadlockPause); err != nil {
				return err
			}
			wanted = true
			_, err := tx.Exec(ctx, `SELECT 1 FROM accounts WHERE id >= $1 AND id <= $2 ORDER BY id FOR UPDATE`, r.keys.names[0], r.keys.names[accounts/2])
			return err
		})
	})
	if wanted {
		// PostgreSQL chose it as the victim, or it waited long enough.
		err = nil
	}
	return wanted, err
}

// inTransaction calls do in a transaction and rolls it back.
func inTransaction(ctx context.Context, conn *pgx.Conn, do func(pgx.Tx) error) error {
	tx, err := conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() {
		ending, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = tx.Rollback(ending) // otherwise the conn's end does it
	}()
	if _, err := tx.Exec(ctx, fmt.Sprintf(`SET LOCAL lock_timeout = %d`, lockWaitMax.Milliseconds())); err != nil {
		return err
	}
	return do(tx)
}
