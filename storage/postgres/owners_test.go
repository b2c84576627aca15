package postgres_test

import (
	"context"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Every commit of an owner is as durable as the option says, whatever the session's own setting is:
// the claim, the result, the end, and a take-over, which notes that something may be sent.
func TestCommitsOfAnOpenRequestAreDurable(t *testing.T) {
	t.Parallel()
	var r *resumable
	settle := false
	r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
		if err := r.charge(ctx, settle); err != nil {
			return nil, err
		}
		return &idempotency.Answer{Status: 201}, nil
	})
	r.Exec(t, `CREATE TABLE seen (what text);
		CREATE FUNCTION see() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN INSERT INTO public.seen VALUES (TG_ARGV[0] || ' ' || current_setting('synchronous_commit')); RETURN NULL; END $$;
		CREATE TRIGGER intent AFTER INSERT ON idempotency_effects FOR EACH ROW EXECUTE FUNCTION see('intent');
		CREATE TRIGGER take AFTER UPDATE OF epoch ON idempotency_open FOR EACH ROW EXECUTE FUNCTION see('take-over');
		CREATE TRIGGER settle AFTER UPDATE OF state ON idempotency_effects FOR EACH ROW EXECUTE FUNCTION see('result');
		CREATE TRIGGER close AFTER DELETE ON idempotency_open FOR EACH ROW EXECUTE FUNCTION see('end')`)
	config, err := pgxpool.ParseConfig(r.URL)
	if err != nil {
		t.Fatal(err)
	}
	postgres.Configure(config, nil)
	connected := config.AfterConnect
	config.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
		if connected != nil {
			if err := connected(ctx, conn); err != nil {
				return err
			}
		}
		_, err := conn.Exec(ctx, "SET synchronous_commit = off") // as a pooler's server connection may have
		return err
	}
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	r.Engine = idempotency.NewEngine(postgres.New(pool, nil), nil)
	if result := r.do(t); !result.Accepted {
		t.Fatalf("%+v", result)
	}
	settle = true
	r.due(t)
	if result := r.do(t); result.Outcome != idempotency.OutcomeExecuted {
		t.Fatalf("%+v", result)
	}
	if got := r.Text(t, "SELECT string_agg(what, ', ') FROM seen"); got != "intent on, take-over on, result on, end on" {
		t.Errorf("seen: %s", got)
	}
}

// unsettledOnce returns a service. Its first call stays unsettled, and the later ones are made.
func unsettledOnce(t *testing.T) *resumable {
	var r *resumable
	runs := 0
	r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
		runs++
		if err := r.charge(ctx, runs > 1); err != nil {
			return nil, err
		}
		return &idempotency.Answer{Status: 201}, post(ctx)
	})
	if result := r.do(t); !result.Accepted {
		t.Fatalf("%+v", result)
	}
	return r
}

// later moves the time at which the records expire, as if that time had passed.
func (r *resumable) later(t *testing.T, by string) {
	t.Helper()
	r.Exec(t, "SET LOCAL session_replication_role = replica; UPDATE idempotency_keys SET expires_at = expires_at - interval '"+by+"'")
}

// A request that is open for longer than the TTL is not deleted, and still runs to its end.
func TestOpenRequestOutlivesItsTTL(t *testing.T) {
	t.Parallel()
	r := unsettledOnce(t)
	r.later(t, "10 years")
	if n, err := r.Store.DeleteExpired(t.Context()); n != 0 || err != nil {
		t.Errorf("the reaper: %d, %v", n, err)
	}
	r.due(t)
	if result := r.do(t); result.Outcome != idempotency.OutcomeExecuted {
		t.Errorf("%+v", result)
	}
	if n := r.Count(t, "SELECT tries FROM idempotency_effects"); n != 2 || r.Service.Effects(t) != 1 {
		t.Errorf("%d tries of one call, %d postings", n, r.Service.Effects(t))
	}
}

// The effects of a request answer for it only as long as its record: a new request of the key makes
// its own.
func TestEffectsGoWithTheirRecord(t *testing.T) {
	t.Parallel()
	r := unsettledOnce(t)
	r.due(t)
	if result := r.do(t); result.Outcome != idempotency.OutcomeExecuted {
		t.Fatalf("%+v", result)
	}
	r.later(t, "25 hours")
	if n, err := r.Store.DeleteExpired(t.Context()); n != 1 || err != nil {
		t.Fatalf("the reaper: %d, %v", n, err)
	}
	if n := r.Count(t, "SELECT count(*) FROM idempotency_effects"); n != 0 {
		t.Errorf("%d effects are left", n)
	}
	if result := r.do(t); result.Outcome != idempotency.OutcomeExecuted || r.sent != 3 {
		t.Errorf("a new request: %+v, sent %d", result, r.sent)
	}
}

// The TTL runs from the end of a request, however long it was open.
func TestTTLOfAnOpenRequestRunsFromItsEnd(t *testing.T) {
	t.Parallel()
	r := unsettledOnce(t)
	r.Exec(t, "UPDATE idempotency_keys SET created_at = created_at - interval '20 hours'")
	r.due(t)
	if result := r.do(t); result.Outcome != idempotency.OutcomeExecuted {
		t.Fatalf("%+v", result)
	}
	if n := r.Count(t, "SELECT count(*) FROM idempotency_keys WHERE expires_at - now() BETWEEN interval '23 hours' AND interval '24 hours'"); n != 1 {
		t.Error("the record does not count for 24 hours from its end")
	}
}

// The handler ends its last transaction behind our back: what it wrote may stand, so another run
// could write it twice.
func TestTransactionThatIsLostAfterTheCallIsParked(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		sql    string
		status int
	}{"seen after the handler": {"COMMIT", 201}, "seen at COMMIT": {"COMMIT; BEGIN", 201}, "seen at a decline": {"COMMIT; BEGIN", 402}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var r *resumable
			runs := 0
			r = newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
				runs++
				if err := r.charge(ctx, true); err != nil {
					return nil, err
				}
				if err := post(ctx); err != nil {
					return nil, err
				}
				_, err := postgres.RawConn(postgres.Tx(ctx)).Exec(ctx, c.sql)
				return &idempotency.Answer{Status: c.status}, err
			})
			if result := r.do(t); result.Reason != idempotency.ReasonNeedsAttention || !result.Accepted {
				t.Errorf("%+v", result)
			}
			r.due(t)
			if _, err := idempotency.NewCompleter(r.Engine, nil).Once(t.Context()); err != nil {
				t.Error(err)
			}
			if n := r.Service.Effects(t); n != 1 || runs != 1 {
				t.Errorf("%d postings, %d runs", n, runs)
			}
		})
	}
}
