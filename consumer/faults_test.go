package consumer_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"reflect"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/storage/postgres"
)

// dying is the store of a process that is about to die: it takes nothing back.
type dying struct{ *postgres.Inbox }

func (dying) ForgiveDeath(context.Context, string, consumer.Partition) error {
	return errors.New("the process is dead")
}

func (dying) Repark(context.Context, string, int, *consumer.Park, ...message.Message) error {
	return errors.New("the process is dead")
}

var partition0 = consumer.Partition{Source: "t"}

func (b *bed) receiver(store consumer.Store, handler consumer.Handler, o consumer.Options) *consumer.Consumer {
	o.Logger = slog.New(slog.DiscardHandler)
	o.OnBatch = func(end consumer.BatchEnd) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.ends = append(b.ends, end)
	}
	return consumer.New("ledger", store, newTopic(), handler, &o)
}

func deliveries(from int64, bodies ...string) (all []consumer.Delivery) {
	for i, body := range bodies {
		all = append(all, consumer.Delivery{Offset: from + int64(i), Message: message.Message{ID: "id-" + body, Topic: "t", Key: []byte("k"), Body: []byte(body)}})
	}
	return all
}

// The order of a consumer decides what happens to the messages behind a dead one.
func TestOrderBehindADeadMessage(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		order   consumer.Order
		effects string // sorted
		parked  string
		next    int64
	}{
		"by key":       {consumer.ByKey, "first other", "dead:3 flaky:2 fine:2", 5},
		"by partition": {consumer.ByPartition, "first", "", 1},
		"unordered":    {consumer.Unordered, "fine first flaky other", "dead:3", 5},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, source := newBed(t), newTopic()
			for _, m := range []string{"first", "dead", "flaky", "fine", "other"} {
				key := "k"
				if m == "other" {
					key = m
				}
				source.publish(0, m, key, m)
			}
			var flaky, dead atomic.Int32
			b.start(t, source, func(ctx context.Context, m *consumer.Delivery) error {
				switch string(m.Body) {
				case "dead":
					dead.Add(1)
					return consumer.Reject(errors.New("no"))
				case "flaky":
					if flaky.Add(1) == 1 {
						return errors.New("not now")
					}
				}
				return insert(ctx, m)
			}, &consumer.Options{Order: c.order, AttemptsInPlace: 1, BackoffMax: time.Millisecond})
			b.at(t, 0, c.next)
			eventually(t, "the effects are there", func() bool { return b.Effects(t) == len(strings.Fields(c.effects)) })
			eventually(t, "the dead one was tried again, if it blocks", func() bool { return c.order != consumer.ByPartition || dead.Load() > 1 })
			eventually(t, "the others are where they belong", func() bool {
				return strings.Join(b.Strings(t, "SELECT message_id || ':' || state FROM message_parked ORDER BY id"), " ") == c.parked
			})
			if got := strings.Join(b.Strings(t, `SELECT name FROM effects ORDER BY name COLLATE "C"`), " "); got != c.effects {
				t.Errorf("effects %q, want %q", got, c.effects)
			}
			if got := b.Count(t, "SELECT next_offset FROM message_offsets"); got != int(c.next) {
				t.Errorf("the position is %d", got)
			}
		})
	}
}

// With ByKey a message waits behind a dead one even if its time has come: it was parked while the
// order was another.
func TestByKeyWaitsBehindWhatAnotherOrderLeft(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	fails := errors.New("no")
	receiver := b.receiver(b.Store.Inbox(), func(_ context.Context, m *consumer.Delivery) error {
		if string(m.Body) == "dead" {
			return consumer.Reject(fails)
		}
		return fails
	}, consumer.Options{Order: consumer.Unordered, AttemptsInPlace: 1, BackoffMax: time.Nanosecond})
	for settled := 0; settled < 2; {
		n, _ := receiver.Receive(t.Context(), partition0, deliveries(0, "dead", "waiting")[settled:])
		settled += n
	}
	b.Exec(t, "UPDATE message_parked SET not_before = now() WHERE state = 1")
	for ordered, want := range map[bool]string{true: "[]", false: "[id-waiting]"} {
		ids, err := b.Store.Inbox().Due(t.Context(), "ledger", ordered, 10)
		if fmt.Sprint(ids) != want || err != nil {
			t.Errorf("ordered %v: due %v, %v", ordered, ids, err)
		}
		if ordered {
			batch, park, err := b.Store.Inbox().BeginParked(t.Context(), &consumer.ParkedClaim{Consumer: "ledger", ID: "id-waiting", Ordered: true})
			if err == nil && park.Delivery != nil {
				_ = batch.Rollback(t.Context())
			}
			if park.Delivery != nil || err != nil {
				t.Errorf("it is tried in front of the dead one: %v", err)
			}
		}
	}
}

// If the id of a message was recorded with other content, it does not hold those of its key in an
// unordered batch, and a copy of it blocks nothing.
func TestMismatchBlocksNothing(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		order  consumer.Order
		parked int // behind it
	}{"by key": {consumer.ByKey, 1}, "by partition": {consumer.ByPartition, 0}, "unordered": {consumer.Unordered, 0}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, source := newBed(t), newTopic()
			source.publish(0, "id", "a", "first")
			source.publish(0, "id", "b", "other")
			source.publish(0, "id-2", "b", "behind")
			b.start(t, source, insert, &consumer.Options{Order: c.order, BatchMax: 10})
			b.at(t, 0, 3)
			source.publish(1, "id", "b", "other") // a relay that died published it again
			source.publish(1, "id", "b", "other")
			b.at(t, 1, 2)
			if dead, behind := b.Count(t, "SELECT count(*) FROM message_parked WHERE state = 3"), b.Count(t, "SELECT count(*) FROM message_parked WHERE state = 2"); dead != 1 || behind != c.parked {
				t.Errorf("%d dead, %d behind", dead, behind)
			}
			if n := b.Effects(t); n != 2-c.parked {
				t.Errorf("effects %q", b.names(t))
			}
		})
	}
}

// A process that waits for a partition of another one, and dies, did not die of a message.
func TestWaitingForAPartitionIsNoDeath(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	running, release := make(chan struct{}), make(chan struct{})
	holder := b.receiver(b.Store.Inbox(), func(ctx context.Context, m *consumer.Delivery) error {
		close(running)
		<-release
		return insert(ctx, m)
	}, consumer.Options{})
	var handling sync.WaitGroup
	handling.Go(func() { holder.Receive(t.Context(), partition0, deliveries(0, "one")) })
	<-running
	for range 10 {
		receiver := b.receiver(dying{b.Store.Inbox()}, insert, consumer.Options{})
		if settled, pause := receiver.Receive(t.Context(), partition0, deliveries(0, "one")); settled != 0 || pause == 0 {
			t.Errorf("%d settled, pause %v", settled, pause)
		}
	}
	if n := b.Count(t, "SELECT deaths FROM message_offsets"); n != 1 {
		t.Errorf("%d deaths while one process handles a message, and ten wait", n)
	}
	if n := b.sum(func(e consumer.BatchEnd) int {
		if errors.Is(e.Err, consumer.ErrHeld) {
			return 1
		}
		return 0
	}); n != 10 {
		t.Errorf("%d batches were held", n)
	}
	close(release)
	handling.Wait()
	if n := b.Count(t, "SELECT deaths FROM message_offsets"); n != 0 || b.names(t) != "one" {
		t.Errorf("%d deaths, effects %q", n, b.names(t))
	}
}

// A batch that fails is no death, whatever the failure is, even if the process has committed
// nothing yet.
func TestFailuresAreNoDeaths(t *testing.T) {
	t.Parallel()
	for name, handler := range map[string]func(*bed, context.CancelFunc) consumer.Handler{
		"outage": func(*bed, context.CancelFunc) consumer.Handler {
			return func(ctx context.Context, _ *consumer.Delivery) error {
				_, err := postgres.Tx(ctx).Exec(ctx, "DO 'BEGIN RAISE SQLSTATE ''57014''; END'")
				return err
			}
		},
		"connection lost": func(*bed, context.CancelFunc) consumer.Handler {
			return func(ctx context.Context, _ *consumer.Delivery) error {
				_, err := postgres.Tx(ctx).Exec(ctx, "SELECT pg_terminate_backend(pg_backend_pid())")
				return err
			}
		},
		"stopped": func(_ *bed, stop context.CancelFunc) consumer.Handler {
			return func(ctx context.Context, _ *consumer.Delivery) error {
				stop()
				<-ctx.Done()
				return ctx.Err()
			}
		},
		"fenced": func(b *bed, _ context.CancelFunc) consumer.Handler {
			return func(ctx context.Context, m *consumer.Delivery) error {
				_, _ = b.Pool.Exec(context.WithoutCancel(context.Background()), "UPDATE message_offsets SET next_offset = 0")
				return insert(ctx, m)
			}
		},
		"handler's error": func(*bed, context.CancelFunc) consumer.Handler {
			return func(context.Context, *consumer.Delivery) error { return errors.New("no") }
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := newBed(t)
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			receiver := b.receiver(b.Store.Inbox(), handler(b, stop), consumer.Options{})
			if settled, _ := receiver.Receive(ctx, partition0, deliveries(0, "one")); settled != 0 && name != "fenced" {
				t.Errorf("%d settled", settled)
			}
			if n := b.Count(t, "SELECT deaths FROM message_offsets"); n != 0 {
				t.Errorf("%d deaths", n)
			}
		})
	}
}

// A parked message that ends its process is dead after AttemptsMax tries, and does not run after
// them. That holds after each redrive.
func TestParkedMessageThatKillsItsProcessIsFound(t *testing.T) {
	t.Parallel()
	const attemptsMax = 3
	b := newBed(t)
	receiver := b.receiver(b.Store.Inbox(), func(context.Context, *consumer.Delivery) error {
		return consumer.Reject(errors.New("dead"))
	}, consumer.Options{})
	for settled := 0; settled == 0; {
		settled, _ = receiver.Receive(t.Context(), partition0, deliveries(0, "killer"))
	}
	b.Exec(t, "UPDATE message_parked SET state = 1, attempts = 0, not_before = now()") // redrive
	runs := 0
	for range attemptsMax + 2 {
		ctx, cancel := context.WithCancel(t.Context())
		ran := make(chan struct{})
		var once sync.Once
		process := consumer.New("ledger", dying{b.Store.Inbox()}, newTopic(), func(ctx context.Context, _ *consumer.Delivery) error {
			once.Do(func() { runs++; close(ran) })
			<-ctx.Done() // as far as the database can tell, the process is gone
			return ctx.Err()
		}, &consumer.Options{AttemptsMax: attemptsMax, BatchTimeout: time.Hour, ParkedInterval: time.Millisecond, Logger: slog.New(slog.DiscardHandler)})
		last := runs == attemptsMax
		if last { // this one lives
			process = consumer.New("ledger", b.Store.Inbox(), newTopic(), func(context.Context, *consumer.Delivery) error {
				t.Error("it runs once more")
				return nil
			}, &consumer.Options{AttemptsMax: attemptsMax, ParkedInterval: time.Millisecond, Logger: slog.New(slog.DiscardHandler)})
		}
		var running sync.WaitGroup
		running.Go(func() { _ = process.Run(ctx) })
		if !last {
			<-ran
		} else {
			eventually(t, "it is dead", func() bool { return b.Count(t, "SELECT count(*) FROM message_parked WHERE state = 3") == 1 })
		}
		cancel()
		running.Wait()
		b.Exec(t, "UPDATE message_parked SET not_before = now() WHERE state = 1") // the time has passed
	}
	if got := b.Text(t, "SELECT state || ':' || attempts || ':' || error FROM message_parked"); got != "3:3:message is rejected: its process ended in the last of 3 tries" {
		t.Errorf("parked %q", got)
	}
}

// A parked message that takes longer than BatchTimeout is not due again at once, so others have
// their turn. The try does not count, because it may be the database that is slow.
func TestParkedMessageThatIsTooSlowIsNotDueAtOnce(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	receiver := b.receiver(b.Store.Inbox(), func(context.Context, *consumer.Delivery) error { return consumer.Later(0) }, consumer.Options{})
	for settled := 0; settled == 0; {
		settled, _ = receiver.Receive(t.Context(), partition0, deliveries(0, "slow"))
	}
	b.Exec(t, "UPDATE message_parked SET attempts = 6")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	process := consumer.New("ledger", b.Store.Inbox(), newTopic(), func(ctx context.Context, _ *consumer.Delivery) error {
		<-ctx.Done()
		return ctx.Err()
	}, &consumer.Options{BatchTimeout: 50 * time.Millisecond, ParkedInterval: time.Millisecond, Logger: slog.New(slog.DiscardHandler), OnBatch: func(consumer.BatchEnd) { cancel() }})
	_ = process.Run(ctx)
	if n := b.Count(t, "SELECT count(*) FROM message_parked WHERE state = 1 AND attempts = 6 AND not_before > clock_timestamp() + interval '10 seconds'"); n != 1 {
		t.Errorf("it is due again at once: %s", b.Text(t, "SELECT state || ' ' || attempts || ' ' || not_before - clock_timestamp() FROM message_parked"))
	}
}

// With ByPartition a message that asks for later holds its partition for that time.
func TestLaterHoldsThePartitionSoLong(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	receiver := b.receiver(b.Store.Inbox(), func(context.Context, *consumer.Delivery) error { return consumer.Later(time.Hour) }, consumer.Options{Order: consumer.ByPartition})
	if settled, pause := receiver.Receive(t.Context(), partition0, deliveries(0, "a")); settled != 0 || pause < 59*time.Minute {
		t.Errorf("%d settled, pause %v", settled, pause)
	}
}

// A parked message that fails at COMMIT has failed.
func TestParkedMessageThatFailsAtCommitIsDead(t *testing.T) {
	t.Parallel()
	b, source := newBed(t), newTopic()
	b.Exec(t, "CREATE TABLE once (id int UNIQUE DEFERRABLE INITIALLY DEFERRED)")
	source.publish(0, "id", "k", "m")
	b.start(t, source, func(ctx context.Context, _ *consumer.Delivery) error {
		_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO once VALUES (1), (1)")
		return err
	}, &consumer.Options{AttemptsInPlace: 1, AttemptsMax: 2, BackoffMax: time.Millisecond})
	eventually(t, "it is dead", func() bool {
		return b.Count(t, "SELECT count(*) FROM message_parked WHERE state = 3 AND attempts = 2") == 1
	})
}

// If an outage ends the try of a parked message, the try does not count either, even if the count
// can't be taken back at once.
func TestOutageCountsForNoParkedMessage(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	receiver := b.receiver(b.Store.Inbox(), func(context.Context, *consumer.Delivery) error {
		return consumer.Reject(errors.New("dead"))
	}, consumer.Options{})
	for settled := 0; settled == 0; {
		settled, _ = receiver.Receive(t.Context(), partition0, deliveries(0, "one"))
	}
	b.Exec(t, "UPDATE message_parked SET state = 1, attempts = 0, not_before = now()")
	store := &away{Inbox: b.Store.Inbox()}
	runs := 0
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		_ = consumer.New("ledger", store, newTopic(), func(ctx context.Context, m *consumer.Delivery) error {
			if runs++; runs <= 10 {
				store.times.Store(2)
				_, err := postgres.Tx(ctx).Exec(ctx, "SELECT pg_terminate_backend(pg_backend_pid())")
				return err
			}
			return insert(ctx, m)
		}, &consumer.Options{AttemptsMax: 3, ParkedInterval: time.Millisecond, Logger: slog.New(slog.DiscardHandler)}).Run(ctx)
	})
	eventually(t, "it has run", func() bool { return b.Count(t, "SELECT count(*) FROM message_parked") == 0 })
	cancel()
	running.Wait()
	if got := b.names(t); got != "one" {
		t.Errorf("effects %q", got)
	}
}

// away is a store that is away for some calls of Repark.
type away struct {
	*postgres.Inbox
	times atomic.Int32
}

func (s *away) Repark(ctx context.Context, name string, tried int, park *consumer.Park, publish ...message.Message) error {
	if s.times.Add(-1) >= 0 {
		return errors.New("away")
	}
	return s.Inbox.Repark(ctx, name, tried, park, publish...)
}

// OnBatch gets the counts of a batch after its COMMIT. It gets none that were undone, and none
// twice.
func TestBatchThatIsUndoneTellsNothing(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	fails := true
	receiver := b.receiver(b.Store.Inbox(), func(ctx context.Context, m *consumer.Delivery) error {
		if string(m.Body) == "last" && fails {
			fails = false
			_, err := postgres.Tx(ctx).Exec(ctx, "DO 'BEGIN RAISE SQLSTATE ''57014''; END'")
			return err
		}
		return insert(ctx, m)
	}, consumer.Options{BatchMax: 10})
	all := deliveries(0, "a", "b", "a", "b", "last")
	all[3].Body, all[4].Key = []byte("mismatch"), []byte("other")
	for settled := 0; settled < 2; {
		n, _ := receiver.Receive(t.Context(), partition0, all[settled:2])
		settled += n
	}
	for settled := 0; settled < len(all); {
		n, _ := receiver.Receive(t.Context(), partition0, all[settled:])
		settled += n
	}
	var sum consumer.BatchEnd
	for _, end := range b.ends {
		sum.Executed += end.Executed
		sum.Duplicates += end.Duplicates
		sum.Redelivered += end.Redelivered
		sum.Mismatches += end.Mismatches
		sum.Dead += end.Dead
		sum.Parked += end.Parked
	}
	if want := (consumer.BatchEnd{Executed: 3, Duplicates: 1, Redelivered: 2, Mismatches: 1, Dead: 1}); sum != want {
		t.Errorf("told %+v, want %+v", sum, want)
	}
}

// The database goes back while the consumer runs: it was restored, or a standby without the last
// commits was promoted. The messages of the lost effects are consumed again, although the source is
// past them.
func TestPositionThatGoesBackMeanwhile(t *testing.T) {
	t.Parallel()
	b, source := newBed(t), newTopic()
	for i := range 10 {
		source.publish(0, fmt.Sprint(i), "k", fmt.Sprint(i))
	}
	b.start(t, source, insert, &consumer.Options{BatchMax: 3})
	b.at(t, 0, 10)
	tx, err := b.Pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, sql := range []string{"DELETE FROM effects WHERE name::int >= 6", "DELETE FROM idempotency_keys WHERE key >= '6'", "UPDATE message_offsets SET next_offset = 6"} {
		if _, err := tx.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	source.publish(0, "10", "k", "10") // the consumer notices with the next message
	b.at(t, 0, 11)
	if got := b.names(t); got != "0 1 2 3 4 5 6 7 8 9 10" {
		t.Errorf("effects %q", got)
	}
}

// A process that still reads the former topic neither handles its messages nor moves the
// position of the one that was recreated.
func TestFormerTopicMovesNoPosition(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	former, present := partition0, partition0
	former.Incarnation, present.Incarnation = [16]byte{1}, [16]byte{2}
	receiver := b.receiver(b.Store.Inbox(), insert, consumer.Options{})
	if n, _ := receiver.Receive(t.Context(), former, deliveries(0, "a")); n != 1 {
		t.Fatal("not settled")
	}
	b.Exec(t, "DELETE FROM message_offsets")
	other := b.receiver(b.Store.Inbox(), insert, consumer.Options{})
	if n, _ := other.Receive(t.Context(), present, deliveries(0, "x")); n != 1 {
		t.Fatal("not settled")
	}
	if n, pause := receiver.Receive(t.Context(), former, deliveries(1, "b")); n != 0 || pause == 0 {
		t.Errorf("%d messages of the former topic are settled", n)
	}
	if n, _ := other.Receive(t.Context(), present, deliveries(1, "y")); n != 1 {
		t.Error("not settled")
	}
	if got := b.names(t); got != "a x y" {
		t.Errorf("effects %q", got)
	}
}

// An id is recorded with the effects, never before: after runs that failed a message is no
// duplicate.
func TestMessageThatFailedIsNoDuplicate(t *testing.T) {
	t.Parallel()
	b, source := newBed(t), newTopic()
	source.publish(0, "id", "k", "m")
	runs := 0
	b.start(t, source, func(ctx context.Context, m *consumer.Delivery) error {
		if err := insert(ctx, m); err != nil {
			return err
		}
		switch runs++; runs {
		case 1:
			return errors.New("no")
		case 2:
			panic("no")
		case 3:
			_, err := postgres.Tx(ctx).Exec(ctx, "SELECT pg_terminate_backend(pg_backend_pid())")
			return err
		}
		return nil
	}, &consumer.Options{AttemptsInPlace: 2, BackoffMax: time.Millisecond})
	eventually(t, "it is handled", func() bool { return b.Effects(t) == 1 && b.Count(t, "SELECT count(*) FROM message_parked") == 0 })
	if n := b.sum(func(e consumer.BatchEnd) int { return e.Duplicates }); n != 0 || runs != 4 {
		t.Errorf("%d runs, %d duplicates", runs, n)
	}
}

// Two copies are handled at once, by two workers. One has an effect.
func TestCopiesAtOnceHaveOneEffect(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	var both sync.WaitGroup
	both.Add(2)
	var runs atomic.Int32
	handler := func(ctx context.Context, m *consumer.Delivery) error {
		if runs.Add(1) <= 2 {
			both.Done()
			both.Wait()
		}
		return insert(ctx, m)
	}
	var workers sync.WaitGroup
	for number := range int32(2) {
		workers.Go(func() {
			receiver := b.receiver(b.Store.Inbox(), handler, consumer.Options{})
			for settled := 0; settled == 0 && t.Context().Err() == nil; {
				settled, _ = receiver.Receive(t.Context(), consumer.Partition{Source: "t", Number: number}, deliveries(0, "one"))
			}
		})
	}
	workers.Wait()
	if n := b.Effects(t); n != 1 || runs.Load() != 2 {
		t.Errorf("%d effects of %d runs", n, runs.Load())
	}
	if executed, copies := b.sum(func(e consumer.BatchEnd) int { return e.Executed }), b.sum(func(e consumer.BatchEnd) int { return e.Duplicates }); executed != 1 || copies != 1 {
		t.Errorf("told %d executed, %d duplicates", executed, copies)
	}
}

// A handler that takes longer than BatchTimeout is undone and runs again. Between two tries neither
// a connection nor a lock is held.
func TestHandlerThatOutlivesItsTime(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	slow := true
	handler := func(ctx context.Context, m *consumer.Delivery) error {
		if err := insert(ctx, m); err != nil {
			return err
		}
		if slow {
			slow = false
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	}
	receiver := b.receiver(b.Store.Inbox(), handler, consumer.Options{BatchTimeout: time.Second})
	if settled, _ := receiver.Receive(t.Context(), partition0, deliveries(0, "one")); settled != 0 {
		t.Errorf("%d settled", settled)
	}
	eventually(t, "no transaction is open", func() bool {
		return b.Count(t, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND database = (SELECT oid FROM pg_database WHERE datname = current_database())") == 0 &&
			b.Store.Pool().Stat().AcquiredConns() == 0
	})
	for settled := 0; settled == 0 && t.Context().Err() == nil; {
		settled, _ = receiver.Receive(t.Context(), partition0, deliveries(0, "one"))
	}
	if got := b.names(t); got != "one" || b.Count(t, "SELECT count(*) FROM message_parked") != 0 {
		t.Errorf("effects %q", got)
	}
}

// A source may read its messages while they are handled, and delivers them again as they were.
func TestDeliveriesStayAsTheyWere(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	all := deliveries(0, "one")
	all[0].ID = "no key: " + strings.Repeat("x", idempotency.KeyBytesMax)
	before := all[0]
	runs := 0
	receiver := b.receiver(b.Store.Inbox(), func(ctx context.Context, m *consumer.Delivery) error {
		if runs++; runs == 1 {
			m.ID, m.Topic, m.Body = "", "", nil
			return errors.New("once more")
		}
		return insert(ctx, m)
	}, consumer.Options{})
	for settled := 0; settled == 0; {
		pause := time.Duration(0)
		settled, pause = receiver.Receive(t.Context(), partition0, all)
		time.Sleep(pause)
	}
	if !reflect.DeepEqual(all[0], before) {
		t.Error("the source's message was changed")
	}
	if got := b.names(t); got != "one" {
		t.Errorf("effects %q", got)
	}
}

// No key is too long to be parked, and to be waited for: brokers take longer ones than this package
// publishes.
func TestMessageWithALongKeyIsParked(t *testing.T) {
	t.Parallel()
	b := newBed(t)
	long := deliveries(0, "dead", "behind", "other")
	key := make([]byte, 64<<10) // which does not shrink
	_, _ = rand.NewChaCha8([32]byte{}).Read(key)
	long[0].Key, long[1].Key, long[2].Key = key, key, key[1:]
	receiver := b.receiver(b.Store.Inbox(), func(ctx context.Context, m *consumer.Delivery) error {
		if string(m.Body) == "dead" {
			return consumer.Reject(errors.New("dead"))
		}
		return insert(ctx, m)
	}, consumer.Options{})
	for left, try := long, 0; len(left) > 0; try++ {
		if try == 10 {
			t.Fatalf("%d messages are left", len(left))
		}
		settled, _ := receiver.Receive(t.Context(), partition0, left)
		left = left[settled:]
	}
	if got := strings.Join(b.Strings(t, "SELECT convert_from(body, 'UTF8') || ':' || state FROM message_parked ORDER BY id"), " "); got != "dead:3 behind:2" {
		t.Errorf("parked %q", got)
	}
	if got := b.names(t); got != "other" {
		t.Errorf("effects %q", got)
	}
}

// A handler that ends its goroutine has failed, and takes neither a connection nor its partition's
// or the parked messages' goroutine with it.
func TestHandlerThatEndsItsGoroutineHasFailed(t *testing.T) {
	t.Parallel()
	b, source := newBed(t), newTopic()
	for i := range 20 {
		source.publish(0, fmt.Sprint("bad", i), fmt.Sprint("bad", i), "bad")
	}
	source.publish(0, "good", "good", "good")
	b.start(t, source, func(ctx context.Context, m *consumer.Delivery) error {
		if string(m.Body) == "bad" {
			runtime.Goexit()
		}
		return insert(ctx, m)
	}, &consumer.Options{AttemptsInPlace: 1, AttemptsMax: 2, BackoffMax: time.Millisecond})
	b.at(t, 0, 21)
	eventually(t, "all of them are dead", func() bool {
		return b.Count(t, "SELECT count(*) FROM message_parked WHERE state = 3 AND error = 'handler did not return'") == 20
	})
	if got := b.names(t); got != "good" {
		t.Errorf("effects %q", got)
	}
}
