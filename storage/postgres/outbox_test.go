package postgres_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/storage/postgres"
)

// walMessageBytesMax is the WAL of a message with a body of messageBytes: a row, its place in the
// primary key, and a share of new pages.
const walMessageBytesMax = 500

const messageBytes = 200

func event(key string) message.Message {
	return message.Message{
		Topic: "transfers", Key: []byte(key), Header: map[string][]string{"Content-Type": {"application/json"}},
		Body: bytes.Repeat([]byte("m"), messageBytes),
	}
}

// published returns the topics, keys and bodies of the outbox in its order.
func (b *testBundle) published(t *testing.T) string {
	t.Helper()
	rows, err := b.pool.Query(t.Context(), "SELECT topic || ':' || COALESCE(convert_from(key, 'UTF8'), '-') || ':' || left(convert_from(body, 'UTF8'), 20) FROM message_outbox ORDER BY id")
	if err != nil {
		t.Fatal(err)
	}
	all, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(all, " ")
}

func text(topic, key, body string) message.Message {
	m := message.Message{Topic: topic, Body: []byte(body)}
	if key != "" {
		m.Key = []byte(key)
	}
	return m
}

// The promise: a request that publishes costs no more round trips than one that does not.
func TestPublishCostsNoRoundTrip(t *testing.T) {
	t.Parallel()
	for name, mode := range map[string]pgx.QueryExecMode{"default mode": pgx.QueryExecModeCacheStatement, "exec mode": pgx.QueryExecModeExec, "simple protocol": pgx.QueryExecModeSimpleProtocol} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) {
				c.MaxConns, c.MinConns = 1, 1
				c.ConnConfig.DefaultQueryExecMode = mode
			}})
			engine := idempotency.NewEngine(b.store, nil)
			cost := func(key string, messages int) int {
				before := b.wire.Count()
				result := engine.Do(t.Context(), request(key, ""), func(ctx context.Context) (*idempotency.Answer, error) {
					statements(ctx, t, postgres.Tx(ctx))
					for i := range messages {
						if err := message.Publish(ctx, fmt.Sprint("made-", i), event("a")); err != nil {
							t.Error(err)
						}
					}
					return answer(201), nil
				})
				if result.Outcome != idempotency.OutcomeExecuted {
					t.Fatalf("%+v", result)
				}
				return b.wire.Count() - before
			}
			cost("warm", 1)
			none := cost("none", 0)
			if none != handlerStatements+2 {
				t.Fatalf("%d round trips without a message: the count is wrong", none)
			}
			for _, messages := range []int{1, 3, message.PublishedMax} {
				if got := cost(fmt.Sprint("of-", messages), messages); got != none {
					t.Errorf("%d messages: %d round trips, want %d", messages, got, none)
				}
			}
			if n := b.count(t, "SELECT count(*) FROM message_outbox"); n != 1+1+3+message.PublishedMax {
				t.Errorf("%d messages", n)
			}
		})
	}
}

func TestGateWALOfAMessage(t *testing.T) {
	t.Parallel()
	const requests = 500
	b := quiet(t)
	engine := idempotency.NewEngine(b.store, nil)
	round := func(publish bool) func() {
		return func() {
			for _, key := range timeOrdered(t, requests) {
				if result := engine.Do(t.Context(), request(key, ""), func(ctx context.Context) (*idempotency.Answer, error) {
					statements(ctx, t, postgres.Tx(ctx))
					if !publish {
						return answer(201), nil
					}
					return answer(201), message.Publish(ctx, "made", event(key))
				}); result.Outcome != idempotency.OutcomeExecuted {
					t.Fatal(result.Err)
				}
			}
		}
	}
	round(true)() // so that the pages exist
	without, with := b.wal(t, round(false)), b.wal(t, round(true))
	added := (with - without) / requests
	t.Logf("WAL of a message: %d B", added)
	if added > walMessageBytesMax || added < messageBytes {
		t.Errorf("a message adds %d B of WAL; the limit is %d", added, walMessageBytesMax)
	}
}

// A message is in the outbox exactly if the handler's writes are committed.
func TestMessageLeavesWithTheWrites(t *testing.T) {
	t.Parallel()
	publish := func(ctx context.Context, t *testing.T, name, body string) {
		if err := message.Publish(ctx, name, text("t", "k", body)); err != nil {
			t.Error(err)
		}
	}
	for name, c := range map[string]struct {
		run       func(ctx context.Context, t *testing.T) (*idempotency.Answer, error)
		published string
	}{
		"executed": {func(ctx context.Context, t *testing.T) (*idempotency.Answer, error) {
			publish(ctx, t, "a", "one")
			publish(ctx, t, "b", "two")
			return answer(201), nil
		}, "t:k:one t:k:two"},
		"beside deferred statements": {func(ctx context.Context, t *testing.T) (*idempotency.Answer, error) {
			publish(ctx, t, "a", "one")
			return answer(201), postgres.DeferExec(ctx, "INSERT INTO effects (name) VALUES ($1)", strings.Repeat("x", 600))
		}, "t:k:one"},
		"large": {func(ctx context.Context, t *testing.T) (*idempotency.Answer, error) {
			publish(ctx, t, "a", strings.Repeat("y", message.BodyBytesMax))
			return &idempotency.Answer{Status: 201, Body: bytes.Repeat([]byte("z"), 100_000)}, nil
		}, "t:k:" + strings.Repeat("y", 20)},
		"neither key nor body": {func(ctx context.Context, t *testing.T) (*idempotency.Answer, error) {
			return answer(201), message.Publish(ctx, "a", message.Message{Topic: "t"})
		}, "t:-:"},
		"declined": {func(ctx context.Context, t *testing.T) (*idempotency.Answer, error) {
			publish(ctx, t, "a", "one")
			return answer(402), nil
		}, ""},
		"forgotten": {func(ctx context.Context, t *testing.T) (*idempotency.Answer, error) {
			publish(ctx, t, "a", "one")
			return answer(500), nil
		}, ""},
		"panic": {func(ctx context.Context, t *testing.T) (*idempotency.Answer, error) {
			publish(ctx, t, "a", "one")
			panic("no")
		}, ""},
		"a constraint refuses the COMMIT": {func(ctx context.Context, t *testing.T) (*idempotency.Answer, error) {
			publish(ctx, t, "a", "one")
			_, err := postgres.Tx(ctx).Exec(ctx, "CREATE TABLE tree (id int PRIMARY KEY, parent int REFERENCES tree DEFERRABLE INITIALLY DEFERRED)")
			if err == nil {
				_, err = postgres.Tx(ctx).Exec(ctx, "INSERT INTO tree VALUES (1, 2)")
			}
			if err != nil {
				t.Error(err)
			}
			return answer(201), err
		}, ""},
		"in a nested transaction that is rolled back": {func(ctx context.Context, t *testing.T) (*idempotency.Answer, error) {
			publish(ctx, t, "a", "one")
			nested, err := postgres.Tx(ctx).Begin(ctx)
			if err != nil {
				return nil, err
			}
			publish(ctx, t, "b", "two")
			if err := nested.Rollback(ctx); err != nil {
				return nil, err
			}
			publish(ctx, t, "c", "three")
			return answer(201), nil
		}, "t:k:one t:k:three"},
	} {
		for _, key := range []string{"k", ""} { // with and without a key
			t.Run(name+" "+key, func(t *testing.T) {
				t.Parallel()
				b := setup(t, nil)
				engine := idempotency.NewEngine(b.store, nil)
				result := engine.Do(t.Context(), request(key, ""), func(ctx context.Context) (*idempotency.Answer, error) { return c.run(ctx, t) })
				if got := b.published(t); got != c.published {
					t.Errorf("published %q, want %q: %+v", got, c.published, result)
				}
				if replay := engine.Do(t.Context(), request("k", ""), func(context.Context) (*idempotency.Answer, error) {
					return answer(409), nil
				}); key != "" && c.published != "" && replay.Outcome != idempotency.OutcomeReplayed {
					t.Errorf("retry: %+v", replay)
				}
				if got := b.published(t); got != c.published {
					t.Errorf("after a retry: published %q, want %q", got, c.published)
				}
			})
		}
	}
}

// Every run of a request publishes under one id, other requests and names under others.
func TestMessageIDIsThatOfTheRequest(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	engine := idempotency.NewEngine(b.store, nil)
	ids := map[string]bool{}
	runs := 0
	for _, key := range []string{"a", "b"} {
		first := ""
		result := engine.Do(t.Context(), request(key, ""), func(ctx context.Context) (*idempotency.Answer, error) {
			runs++
			for _, name := range []string{"made", "seen"} {
				if err := message.Publish(ctx, name, text("t", "k", name)); err != nil {
					t.Error(err)
				}
			}
			if id := message.ID(ctx, "made"); first == "" {
				first = id
				_, err := postgres.Tx(ctx).Exec(ctx, "DO 'BEGIN RAISE SQLSTATE ''40001''; END'")
				return nil, err
			} else if id != first {
				t.Errorf("run 2 has id %s, run 1 had %s", id, first)
			}
			return answer(201), nil
		})
		if result.Outcome != idempotency.OutcomeExecuted {
			t.Fatalf("%+v", result)
		}
	}
	rows, err := b.pool.Query(t.Context(), "SELECT message_id::text FROM message_outbox")
	if err != nil {
		t.Fatal(err)
	}
	all, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range all {
		ids[id] = true
	}
	if len(all) != 4 || len(ids) != 4 || runs != 4 {
		t.Errorf("%d messages with %d ids in %d runs", len(all), len(ids), runs)
	}
}

// What can't be published fails the request, even if the handler ignores the error.
func TestMessageThatIsRefusedFailsTheRequest(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		publish func(ctx context.Context) error
		before  string // SQL
		says    string
	}{
		"no topic": {publish: func(ctx context.Context) error { return message.Publish(ctx, "m", message.Message{}) }, says: "topic"},
		"topic":    {publish: func(ctx context.Context) error { return message.Publish(ctx, "m", text("a/b", "", "")) }, says: "topic"},
		"long topic": {publish: func(ctx context.Context) error {
			return message.Publish(ctx, "m", text(strings.Repeat("t", message.TopicBytesMax+1), "", ""))
		}, says: "topic"},
		"long key": {publish: func(ctx context.Context) error {
			return message.Publish(ctx, "m", text("t", strings.Repeat("k", message.KeyBytesMax+1), ""))
		}, says: "key"},
		"long body": {publish: func(ctx context.Context) error {
			return message.Publish(ctx, "m", text("t", "", strings.Repeat("b", message.BodyBytesMax+1)))
		}, says: "body"},
		"header's value": {publish: func(ctx context.Context) error {
			return message.Publish(ctx, "m", message.Message{Topic: "t", Header: map[string][]string{"A": {"\n"}}})
		}, says: "header"},
		"long headers": {publish: func(ctx context.Context) error {
			return message.Publish(ctx, "m", message.Message{Topic: "t", Header: map[string][]string{"A": {strings.Repeat("v", message.HeaderBytesMax)}}})
		}, says: "header"},
		"no name": {publish: func(ctx context.Context) error { return message.Publish(ctx, "", text("t", "", "")) }, says: "name"},
		"long name": {publish: func(ctx context.Context) error {
			return message.Publish(ctx, strings.Repeat("n", message.NameBytesMax+1), text("t", "", ""))
		}, says: "name"},
		"name used twice": {publish: func(ctx context.Context) error {
			return errors.Join(message.Publish(ctx, "m", text("t", "", "1")), message.Publish(ctx, "m", text("t", "", "2")))
		}, says: "of this name"},
		"too many": {publish: func(ctx context.Context) (err error) {
			for i := range message.PublishedMax + 1 {
				err = errors.Join(err, message.Publish(ctx, fmt.Sprint(i), text("t", "", "")))
			}
			return err
		}, says: "1000 messages"},
		"no outbox":       {publish: func(ctx context.Context) error { return message.Publish(ctx, "m", text("t", "", "")) }, before: "DROP TABLE message_outbox", says: "migrate"},
		"a trigger drops": {publish: func(ctx context.Context) error { return message.Publish(ctx, "m", text("t", "", "")) }, before: "CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; CREATE TRIGGER nothing BEFORE INSERT ON message_outbox FOR EACH ROW EXECUTE FUNCTION nothing()", says: "trigger"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t, nil)
			if c.before != "" {
				b.exec(t, c.before)
			}
			engine := idempotency.NewEngine(b.store, nil)
			result := engine.Do(t.Context(), request("k", ""), func(ctx context.Context) (*idempotency.Answer, error) {
				statements(ctx, t, postgres.Tx(ctx))
				if err := c.publish(ctx); (err != nil) != (c.before == "") || err != nil && !errors.Is(err, message.ErrInvalid) {
					t.Errorf("Publish returned %v", err)
				}
				return answer(201), nil
			})
			if result.Outcome != idempotency.OutcomeNotExecuted || !strings.Contains(fmt.Sprint(result.Err), c.says) {
				t.Errorf("%+v", result)
			}
			if n := b.count(t, "SELECT count(*) FROM effects"); n != 0 {
				t.Errorf("%d writes of the handler stand", n)
			}
		})
	}
}

func TestPublishOutsideAHandlerPanics(t *testing.T) {
	t.Parallel()
	defer func() {
		if _, ok := recover().(idempotency.UsageError); !ok {
			t.Error("no UsageError")
		}
	}()
	_ = message.Publish(t.Context(), "m", text("t", "", ""))
}

// Messages of handlers that lock a common row have the order of their commits, however long the
// handlers take between their first statement and COMMIT.
func TestOutboxHasTheOrderOfCommits(t *testing.T) {
	t.Parallel()
	const writers, each, rows = 8, 40, 3
	b := setup(t, &setupOptions{configure: func(c *pgxpool.Config) { c.MaxConns = writers }})
	b.exec(t, "CREATE TABLE aggregates (id int PRIMARY KEY, version int NOT NULL)")
	b.exec(t, "INSERT INTO aggregates SELECT g, 0 FROM generate_series(0, $1::int - 1) AS g", rows)
	engine := idempotency.NewEngine(b.store, nil)
	var running sync.WaitGroup
	for w := range writers {
		running.Go(func() {
			for i := range each {
				result := engine.Do(t.Context(), request(fmt.Sprintf("%d-%d", w, i), ""), func(ctx context.Context) (*idempotency.Answer, error) {
					id, version := rand.IntN(rows), 0
					if err := message.Publish(ctx, "early", text("early", fmt.Sprint(id), "")); err != nil { // before the lock
						return nil, err
					}
					time.Sleep(time.Duration(rand.IntN(2000)) * time.Microsecond)
					if err := postgres.Tx(ctx).QueryRow(ctx, "UPDATE aggregates SET version = version + 1 WHERE id = $1 RETURNING version", id).Scan(&version); err != nil {
						return nil, err
					}
					return answer(201), message.Publish(ctx, "made", text("made", fmt.Sprint(id), fmt.Sprint(version)))
				})
				if result.Outcome != idempotency.OutcomeExecuted {
					t.Errorf("%+v", result)
				}
			}
		})
	}
	running.Wait()
	if n := b.count(t, `SELECT count(*) FROM (SELECT convert_from(body, 'UTF8')::int AS version, row_number() OVER (PARTITION BY key ORDER BY id) AS place
		FROM message_outbox WHERE topic = 'made') AS m WHERE version <> place`); n != 0 {
		t.Errorf("%d messages are out of order", n)
	}
	if n := b.count(t, "SELECT count(DISTINCT shard) FROM message_outbox WHERE topic = 'made'"); n != rows && n != rows-1 {
		t.Errorf("%d shards", n)
	}
	if n := b.count(t, "SELECT count(*) FROM (SELECT FROM message_outbox GROUP BY topic, key HAVING count(DISTINCT shard) > 1) AS split"); n != 0 {
		t.Errorf("%d keys are in several shards", n)
	}
}

// In a phase the message leaves with the phase's COMMIT, whatever becomes of the request; after the
// last call it leaves with the answer.
func TestMessageOfAPhaseLeavesWithIt(t *testing.T) {
	t.Parallel()
	fails := true
	r := newResumable(t, func(ctx context.Context) (*idempotency.Answer, error) {
		if _, err := postgres.Phase(ctx, "hold", func(pgx.Tx) (hold, error) {
			return hold{}, message.Publish(ctx, "held", text("t", "k", "held"))
		}); err != nil {
			return nil, err
		}
		_, err := postgres.Phase(ctx, "no", func(pgx.Tx) (hold, error) {
			return hold{}, errors.Join(message.Publish(ctx, "refused", text("t", "k", "refused")), idempotency.ErrDeclined)
		})
		if !errors.Is(err, idempotency.ErrDeclined) {
			return nil, err
		}
		if err := message.Publish(ctx, "ended", text("t", "k", "ended")); err != nil {
			return nil, err
		}
		if fails {
			return said(500), nil
		}
		return said(201), nil
	})
	outbox := func(want string) {
		t.Helper()
		if got := r.Text(t, "SELECT COALESCE(string_agg(convert_from(body, 'UTF8'), ' ' ORDER BY id), '') FROM message_outbox"); got != want {
			t.Errorf("published %q, want %q", got, want)
		}
	}
	r.want(t, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
	outbox("held")
	fails = false
	r.due(t)
	r.want(t, idempotency.OutcomeExecuted, "")
	outbox("held ended")
	r.want(t, idempotency.OutcomeReplayed, "")
	outbox("held ended")
}
