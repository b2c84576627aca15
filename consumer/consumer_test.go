package consumer_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/internal/pgfault"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/storage/postgres"
)

// topic is a Source in memory. It has a log for each partition, and delivers it batch by batch from
// the offset that the receiver returns. The brokers' own tests are in broker/.
type topic struct {
	mu    sync.Mutex
	logs  map[int32][]consumer.Delivery
	grown chan struct{}
	size  int // the number of messages that Receive gets; 0: all
	id    [16]byte
}

func newTopic() *topic {
	return &topic{logs: map[int32][]consumer.Delivery{}, grown: make(chan struct{}, 1)}
}

func (s *topic) publish(partition int32, id, key, body string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := consumer.Delivery{Message: message.Message{ID: id, Topic: "t", Body: []byte(body)}, Offset: int64(len(s.logs[partition]))}
	if key != "" {
		d.Key = []byte(key)
	}
	s.logs[partition] = append(s.logs[partition], d)
}

func (s *topic) Run(ctx context.Context, receiver consumer.Receiver) error {
	next := map[int32]int64{}
	for ctx.Err() == nil {
		wait := 2 * time.Millisecond
		s.mu.Lock()
		logs := map[int32][]consumer.Delivery{}
		for n, log := range s.logs {
			logs[n] = slices.Clone(log)
		}
		s.mu.Unlock()
		for n, log := range logs {
			p := consumer.Partition{Source: "t", Number: n, Incarnation: s.id}
			if _, ok := next[n]; !ok {
				offset, err := receiver.Assigned(ctx, p)
				if err != nil {
					return err
				}
				next[n] = max(offset, 0)
			}
			rest := log[min(next[n], int64(len(log))):]
			if s.size > 0 {
				rest = rest[:min(s.size, len(rest))]
			}
			if len(rest) == 0 {
				continue
			}
			settled, pause := receiver.Receive(ctx, p, rest)
			next[n] += int64(settled)
			if settled > 0 {
				wait = 0
			} else if wait > 0 {
				wait = max(min(pause, 20*time.Millisecond), wait)
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
	return nil
}

// bed is a consumer's database: its handlers insert bodies into effects.
type bed struct {
	*testservice.Service
	mu   sync.Mutex
	ends []consumer.BatchEnd
}

func newBed(t *testing.T) *bed {
	return &bed{Service: testservice.New(t, &postgres.Options{PoolConfig: func(c *pgxpool.Config) { c.MaxConns = 16 }})}
}

// insert writes the message's body.
func insert(ctx context.Context, m *consumer.Delivery) error {
	_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects (name) VALUES ($1)", string(m.Body))
	return err
}

// start runs a consumer until the test ends or stop is called.
func (b *bed) start(t *testing.T, source consumer.Source, handler consumer.Handler, opts *consumer.Options) (stop func()) {
	t.Helper()
	o := consumer.Options{}
	if opts != nil {
		o = *opts
	}
	o.Logger = slog.New(slog.DiscardHandler)
	if o.ParkedInterval == 0 {
		o.ParkedInterval = 5 * time.Millisecond
	}
	o.OnBatch = func(end consumer.BatchEnd) {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.ends = append(b.ends, end)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		if err := consumer.New("ledger", b.Store.Inbox(), source, handler, &o).Run(ctx); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	stop = func() {
		cancel()
		running.Wait()
	}
	t.Cleanup(stop)
	return stop
}

// names returns the effects of the handlers, in their order.
func (b *bed) names(t *testing.T) string {
	t.Helper()
	return strings.Join(b.Strings(t, "SELECT name FROM effects ORDER BY id"), " ")
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within 30 s: %s", what)
		}
	}
}

// at waits until a partition's position is this.
func (b *bed) at(t *testing.T, partition int32, next int64) {
	t.Helper()
	eventually(t, fmt.Sprintf("partition %d is at %d", partition, next), func() bool {
		return b.Count(t, "SELECT COALESCE(max(next_offset), -1) FROM message_offsets WHERE partition = $1", partition) == int(next)
	})
}

func (b *bed) sum(of func(consumer.BatchEnd) int) (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, end := range b.ends {
		n += of(end)
	}
	return n
}

// A message that was published twice has one effect, wherever its copies are.
func TestMessageThatWasPublishedTwiceIsHandledOnce(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1, 100} {
		t.Run(fmt.Sprint("batches of ", size), func(t *testing.T) {
			t.Parallel()
			b, source := newBed(t), newTopic()
			for i := range 20 {
				source.publish(int32(i%2), fmt.Sprint("id-", i), "k", fmt.Sprint(i))
			}
			for i := range 20 { // in the other partition, and again
				source.publish(int32(1-i%2), fmt.Sprint("id-", i), "k", fmt.Sprint(i))
				source.publish(int32(i%2), fmt.Sprint("id-", i), "k", fmt.Sprint(i))
			}
			b.start(t, source, insert, &consumer.Options{BatchMax: size})
			b.at(t, 0, 30)
			b.at(t, 1, 30)
			if n := b.Count(t, "SELECT count(*) FROM effects"); n != 20 {
				t.Errorf("%d effects, want 20", n)
			}
			if n := b.sum(func(e consumer.BatchEnd) int { return e.Duplicates }); n < 40 {
				t.Errorf("%d duplicates, want 40", n)
			}
		})
	}
}

// The position is in the database. A new process goes on behind the last effect, and after a
// restore to an earlier state the messages of the lost effects are consumed again.
func TestPositionIsThatOfTheEffects(t *testing.T) {
	t.Parallel()
	b, source := newBed(t), newTopic()
	for i := range 10 {
		source.publish(0, fmt.Sprint(i), "k", fmt.Sprint(i))
	}
	stop := b.start(t, source, insert, nil)
	b.at(t, 0, 10)
	stop()
	b.Exec(t, "DELETE FROM effects WHERE id > 6")
	b.Exec(t, "DELETE FROM idempotency_keys WHERE key >= '6'")
	b.Exec(t, "UPDATE message_offsets SET next_offset = 6")
	source.publish(0, "10", "k", "10")
	b.start(t, source, insert, nil)
	b.at(t, 0, 11)
	if got := b.names(t); got != "0 1 2 3 4 5 6 7 8 9 10" {
		t.Errorf("effects %q", got)
	}
}

// Two processes that both believe that a partition is theirs give one effect for each
// message.
func TestProcessesOfOnePartitionDoNotDouble(t *testing.T) {
	t.Parallel()
	const messages = 200
	b, source := newBed(t), newTopic()
	for i := range messages {
		source.publish(0, fmt.Sprint(i), fmt.Sprint("k", i%7), fmt.Sprint(i))
	}
	for range 4 {
		b.start(t, source, insert, &consumer.Options{BatchMax: 10})
	}
	b.at(t, 0, messages)
	want := make([]string, messages)
	for i := range want {
		want[i] = fmt.Sprint(i)
	}
	if got := b.names(t); got != strings.Join(want, " ") {
		t.Errorf("effects %q", got)
	}
}

// Each consumer gets every message.
func TestConsumersOfOneTopicAreApart(t *testing.T) {
	t.Parallel()
	b, source := newBed(t), newTopic()
	source.publish(0, "id", "k", "m")
	b.start(t, source, insert, nil)
	b.at(t, 0, 1)
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		_ = consumer.New("other", b.Store.Inbox(), source, insert, nil).Run(ctx)
	})
	eventually(t, "the other one has handled it", func() bool {
		return b.Count(t, "SELECT count(*) FROM message_offsets WHERE consumer = 'other' AND next_offset = 1") == 1
	})
	cancel()
	running.Wait()
	if n := b.Effects(t); n != 2 {
		t.Errorf("%d effects, want one of each consumer", n)
	}
}

// If a handler can't handle a message, the others of its batch are handled all the same, and only
// its key is blocked.
func TestPoisonIsParkedWithItsKey(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1, 50} {
		t.Run(fmt.Sprint("batches of ", size), func(t *testing.T) {
			t.Parallel()
			b, source := newBed(t), newTopic()
			for _, m := range []string{"a1", "b1", "poison", "c1", "b2", "a2"} {
				key := m[:1]
				if m == "poison" {
					key = "b"
				}
				source.publish(0, "id-"+m, key, m)
			}
			var mu sync.Mutex
			heals := false
			handler := func(ctx context.Context, m *consumer.Delivery) error {
				mu.Lock()
				defer mu.Unlock()
				if err := insert(ctx, m); err != nil {
					return err
				}
				if string(m.Body) == "poison" && !heals {
					return errors.New("can't")
				}
				return nil
			}
			b.start(t, source, handler, &consumer.Options{BatchMax: size, BackoffMax: time.Millisecond})
			b.at(t, 0, 6)
			if got := b.names(t); got != "a1 b1 c1 a2" {
				t.Errorf("effects %q", got)
			}
			eventually(t, "it is dead", func() bool { return b.Count(t, "SELECT count(*) FROM message_parked WHERE state = 3") == 1 })
			source.publish(0, "id-b3", "b", "b3") // behind a dead one too
			b.at(t, 0, 7)
			if got := strings.Join(b.Strings(t, "SELECT message_id || ':' || state || ':' || attempts || ':' || error FROM message_parked ORDER BY id"), " "); got !=
				"id-poison:3:8:can't id-b2:2:0:it waits behind another message of its key id-b3:2:0:it waits behind another message of its key" {
				t.Errorf("parked: %q", got)
			}
			mu.Lock()
			heals = true
			mu.Unlock()
			b.Exec(t, "UPDATE message_parked SET state = 1, attempts = 0, not_before = now() WHERE state = 3") // redrive
			eventually(t, "nothing is parked", func() bool { return b.Count(t, "SELECT count(*) FROM message_parked") == 0 })
			if got := b.names(t); got != "a1 b1 c1 a2 poison b2 b3" {
				t.Errorf("effects %q", got)
			}
			source.publish(1, "id-poison", "b", "poison") // once more, elsewhere
			b.at(t, 1, 1)
			if n := b.Count(t, "SELECT count(*) FROM effects WHERE name = 'poison'"); n != 1 {
				t.Errorf("%d effects of the redriven message", n)
			}
		})
	}
}

// The errors of a handler, and the reasons that the consumer keeps.
func TestMessagesThatAreNotHandled(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("é", consumer.ErrorBytesMax)
	for name, c := range map[string]struct {
		handler consumer.Handler
		opts    consumer.Options
		before  func(*topic)
		parked  string // state, attempts, error
		dead    bool   // published to the dead topic
	}{
		"rejected": {handler: func(context.Context, *consumer.Delivery) error { return consumer.Reject(errors.New("no such account")) }, parked: "3:1:message is rejected: no such account", dead: true},
		"panic":    {handler: func(context.Context, *consumer.Delivery) error { panic("secret") }, opts: consumer.Options{AttemptsMax: 3}, parked: "3:3:handler panicked with a string", dead: true},
		"words of PostgreSQL": {handler: func(ctx context.Context, _ *consumer.Delivery) error {
			_, err := postgres.Tx(ctx).Exec(ctx, "SELECT 'secret'::int")
			return errors.Join(fmt.Errorf("read the amount: %w", err), &pgconn.PgError{Severity: "ERROR", Code: "22007", Message: "secret"})
		}, opts: consumer.Options{AttemptsMax: 3}, parked: "3:3:read the amount: SQLSTATE 22P02 SQLSTATE 22007", dead: true},
		"long error": {handler: func(context.Context, *consumer.Delivery) error { return consumer.Reject(errors.New(long)) }, dead: true,
			parked: "3:1:" + ("message is rejected: " + long)[:consumer.ErrorBytesMax-1]},
		"later":        {handler: func(context.Context, *consumer.Delivery) error { return consumer.Later(time.Hour) }, parked: "1:0:its handler asked for 1h0m0s"},
		"another body": {handler: insert, before: func(s *topic) { s.publish(0, "id", "other", "first") }, parked: "3:0:its id was recorded with another topic or body", dead: true},
		"an open query": {handler: func(ctx context.Context, _ *consumer.Delivery) error {
			_, err := postgres.Tx(ctx).Query(ctx, "SELECT 1")
			return err
		}, opts: consumer.Options{AttemptsMax: 3}, parked: "3:3:", dead: true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, source := newBed(t), newTopic()
			next := int64(1)
			if c.before != nil {
				c.before(source)
				next++
			}
			source.publish(0, "id", "k", "body")
			o := c.opts
			o.DeadTopic = "dead"
			b.start(t, source, c.handler, &o)
			b.at(t, 0, next)
			got := b.Text(t, "SELECT state || ':' || attempts || ':' || error FROM message_parked WHERE message_id = 'id'")
			if got != c.parked && !(strings.HasSuffix(c.parked, ":") && strings.HasPrefix(got, c.parked)) {
				t.Errorf("parked %q, want %q", got, c.parked)
			}
			if n := b.Count(t, "SELECT count(*) FROM message_outbox WHERE topic = 'dead' AND body = 'body'"); n != map[bool]int{true: 1}[c.dead] {
				t.Errorf("%d dead letters", n)
			}
		})
	}
}

// A try that an outage of the database ends does not count, whichever statement meets the outage.
func TestOutageParksNothing(t *testing.T) {
	t.Parallel()
	for name, sql := range map[string]string{
		"timeout":       "DO 'BEGIN RAISE SQLSTATE ''57014''; END'",
		"deadlock":      "DO 'BEGIN RAISE SQLSTATE ''40P01''; END'",
		"serialization": "DO 'BEGIN RAISE SQLSTATE ''40001''; END'",
		"no memory":     "DO 'BEGIN RAISE SQLSTATE ''53200''; END'",
		"lock timeout":  "DO 'BEGIN RAISE SQLSTATE ''55P03''; END'",
		"killed":        "SELECT pg_terminate_backend(pg_backend_pid())",
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, source := newBed(t), newTopic()
			for i := range 3 {
				source.publish(0, fmt.Sprint(i), "k", fmt.Sprint(i))
			}
			var mu sync.Mutex
			runs := 0
			handler := func(ctx context.Context, m *consumer.Delivery) error {
				mu.Lock()
				runs++
				fails := runs <= 6
				mu.Unlock()
				if fails {
					_, err := postgres.Tx(ctx).Exec(ctx, sql)
					return err
				}
				return insert(ctx, m)
			}
			b.start(t, source, handler, &consumer.Options{BatchMax: 3, AttemptsMax: 3})
			b.at(t, 0, 3)
			if got := b.names(t); got != "0 1 2" || b.Count(t, "SELECT count(*) FROM message_parked") != 0 {
				t.Errorf("effects %q, parked %q", got, b.Strings(t, "SELECT error FROM message_parked"))
			}
		})
	}
}

// If a handler needs longer for a batch than BatchTimeout, it gets smaller batches, instead of the
// same one for ever.
func TestBatchThatTakesTooLongIsHalved(t *testing.T) {
	t.Parallel()
	b, source := newBed(t), newTopic()
	const messages, quick = 4, 2 // of a batch: the third one takes for ever
	for i := range messages {
		source.publish(0, fmt.Sprint(i), "k", fmt.Sprint(i))
	}
	batch, handled := -1, 0 // one goroutine handles the partition
	handler := func(ctx context.Context, m *consumer.Delivery) error {
		b.mu.Lock()
		ends := len(b.ends)
		b.mu.Unlock()
		if ends != batch {
			batch, handled = ends, 0
		}
		if handled++; handled > quick {
			<-ctx.Done()
			return ctx.Err()
		}
		return insert(ctx, m)
	}
	b.start(t, source, handler, &consumer.Options{BatchMax: 100, BatchTimeout: time.Second})
	b.at(t, 0, messages)
	if got := b.names(t); got != "0 1 2 3" {
		t.Errorf("effects %q", got)
	}
	if n := b.Count(t, "SELECT count(*) FROM message_parked"); n != 0 {
		t.Errorf("%d messages are parked", n)
	}
}

// A message that kills its process is found, although the process can't count the death any more,
// and no other message is dead because of it. Processes that end in order do not count as deaths.
func TestMessageThatKillsItsProcessIsFound(t *testing.T) {
	t.Parallel()
	b, source := newBed(t), newTopic()
	for _, m := range []string{"a", "killer", "b"} {
		source.publish(0, m, m, m)
	}
	die := func(ctx context.Context, m *consumer.Delivery) error {
		if string(m.Body) == "killer" {
			<-ctx.Done() // as far as the database can tell, the process is gone
			return ctx.Err()
		}
		return insert(ctx, m)
	}
	for range 12 { // a process that dies leaves its count behind
		receiver := consumer.New("ledger", dying{b.Store.Inbox()}, source, die, &consumer.Options{BatchMax: 10, Logger: slog.New(slog.DiscardHandler)})
		p := consumer.Partition{Source: "t"}
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		offset, err := receiver.Assigned(ctx, p)
		if err != nil {
			t.Fatal(err)
		}
		receiver.Receive(ctx, p, slices.Clone(source.logs[0][max(offset, 0):]))
		cancel()
	}
	if got := b.names(t); got != "a b" {
		t.Errorf("effects %q", got)
	}
	if got := b.Text(t, "SELECT message_id || ' ' || error FROM message_parked"); got != "killer 5 processes ended before it was handled" {
		t.Errorf("parked %q", got)
	}
	for range 10 {
		stop := b.start(t, source, insert, nil)
		source.publish(0, fmt.Sprint("n", len(source.logs[0])), "n", "n")
		b.at(t, 0, int64(len(source.logs[0])))
		stop()
	}
	if n := b.Count(t, "SELECT deaths FROM message_offsets"); n != 0 {
		t.Errorf("%d deaths", n)
	}
}

// A message that ends its process is found in few deaths, also at the end of a large batch: those
// in front of it are committed, and the next batches do not begin with all of the others.
func TestMessageThatKillsItsProcessIsFoundBehindMany(t *testing.T) {
	t.Parallel()
	const before, deathsMax = 30, 40
	b, source := newBed(t), newTopic()
	for i := range before {
		source.publish(0, fmt.Sprint(i), fmt.Sprint(i), "m")
	}
	source.publish(0, "killer", "killer", "killer")
	deaths := 0
	for ; b.Count(t, "SELECT count(*) FROM message_parked") == 0; deaths++ { // a process that dies leaves its count behind
		if deaths > deathsMax {
			t.Fatalf("not found after %d deaths, the position is %d", deathsMax, b.Count(t, "SELECT max(next_offset) FROM message_offsets"))
		}
		ctx, cancel := context.WithCancel(t.Context())
		receiver := consumer.New("ledger", dying{b.Store.Inbox()}, source, func(ctx context.Context, m *consumer.Delivery) error {
			if string(m.Body) == "killer" {
				cancel() // as far as the database can tell, the process is gone
				return ctx.Err()
			}
			return insert(ctx, m)
		}, &consumer.Options{BatchMax: 100, Logger: slog.New(slog.DiscardHandler)})
		p := consumer.Partition{Source: "t"}
		offset, err := receiver.Assigned(ctx, p)
		if err != nil {
			t.Fatal(err)
		}
		receiver.Receive(ctx, p, slices.Clone(source.logs[0][max(offset, 0):]))
		cancel()
	}
	if n := b.Count(t, "SELECT count(*) FROM effects"); n != before {
		t.Errorf("%d effects, want %d", n, before)
	}
}

// The derived keys of a message depend on its consumer and its id, and are the same in each run.
func TestDerivedKeyOfAMessage(t *testing.T) {
	t.Parallel()
	b, source := newBed(t), newTopic()
	source.publish(0, "id", "k", "m")
	var mu sync.Mutex
	keys := map[string]int{}
	b.start(t, source, func(ctx context.Context, m *consumer.Delivery) error {
		mu.Lock()
		defer mu.Unlock()
		keys[idempotency.DerivedKey(ctx, "mail")]++
		if key, _ := idempotency.KeyFrom(ctx); key.Scope != "message:ledger" || key.Value != "id" {
			t.Errorf("key %q %q", key.Scope, key.Value)
		}
		if len(keys) == 1 && keys[idempotency.DerivedKey(ctx, "mail")] < 3 {
			return errors.New("again")
		}
		return message.Publish(ctx, "seen", message.Message{Topic: "next", Body: m.Body})
	}, nil)
	b.at(t, 0, 1)
	if len(keys) != 1 {
		t.Errorf("derived keys: %v", keys)
	}
	if n := b.Count(t, "SELECT count(*) FROM message_outbox WHERE topic = 'next'"); n != 1 {
		t.Errorf("%d messages were published", n)
	}
}

// The offset of a topic that was recreated means nothing.
func TestRecreatedTopicStops(t *testing.T) {
	t.Parallel()
	b, source := newBed(t), newTopic()
	source.id = [16]byte{1}
	source.publish(0, "id", "k", "m")
	b.start(t, source, insert, nil)()
	b.start(t, source, insert, nil)
	b.at(t, 0, 1)
	again := newTopic()
	again.id = [16]byte{2}
	again.publish(0, "id2", "k", "m2")
	again.publish(0, "id3", "k", "m3") // at the offset that was due
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	err := consumer.New("ledger", b.Store.Inbox(), again, func(context.Context, *consumer.Delivery) error {
		t.Error("a message of the new topic was handled")
		cancel()
		return nil
	}, nil).Run(ctx)
	if !errors.Is(err, consumer.ErrRecreated) || !strings.Contains(err.Error(), "message_offsets") {
		t.Errorf("Run: %v", err)
	}
}

// A BatchHandler gets the messages of a batch together, and one that it can't handle is found.
func TestBatchHandler(t *testing.T) {
	t.Parallel()
	b, source := newBed(t), newTopic()
	const messages = 40
	for i := range messages {
		body := fmt.Sprint(i)
		if i == 17 {
			body = "poison"
		}
		source.publish(0, fmt.Sprint("id-", i), fmt.Sprint("k", i), body)
	}
	var mu sync.Mutex
	most := 0
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() {
		_ = consumer.NewBatch("ledger", b.Store.Inbox(), source, func(ctx context.Context, all []*consumer.Delivery) error {
			mu.Lock()
			most = max(most, len(all))
			mu.Unlock()
			var names []string
			for _, m := range all {
				if string(m.Body) == "poison" {
					return consumer.Reject(errors.New("poison"))
				}
				names = append(names, string(m.Body))
				if err := message.Publish(m.Context(ctx), "seen", message.Message{Topic: "next"}); err != nil {
					return err
				}
			}
			_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects (name) SELECT unnest($1::text[])", names)
			return err
		}, &consumer.Options{BatchMax: 100, Logger: slog.New(slog.DiscardHandler)}).Run(ctx)
	})
	b.at(t, 0, messages)
	cancel()
	running.Wait()
	if n, ids := b.Effects(t), b.Count(t, "SELECT count(DISTINCT message_id) FROM message_outbox"); n != messages-1 || ids != messages-1 || most != messages {
		t.Errorf("%d effects, %d messages, the largest batch had %d", n, ids, most)
	}
	if got := b.Text(t, "SELECT message_id FROM message_parked"); got != "id-17" {
		t.Errorf("parked %q", got)
	}
}

// The position is the last guard: if it was moved meanwhile, a batch commits nothing, even if the
// lock did not keep the other process away.
func TestBatchOfAMovedPartitionIsFenced(t *testing.T) {
	t.Parallel()
	b, source := newBed(t), newTopic()
	source.publish(0, "a", "k", "a")
	source.publish(0, "b", "k", "b")
	first := true
	b.start(t, source, func(ctx context.Context, m *consumer.Delivery) error {
		if first {
			first = false
			b.Exec(t, "UPDATE message_offsets SET next_offset = 1") // by somebody without the lock
		}
		return insert(ctx, m)
	}, nil)
	b.at(t, 0, 2)
	if got := b.names(t); got != "b" {
		t.Errorf("effects %q", got)
	}
	if n := b.sum(func(e consumer.BatchEnd) int {
		if errors.Is(e.Err, consumer.ErrFenced) {
			return 1
		}
		return 0
	}); n != 1 {
		t.Errorf("%d batches were fenced", n)
	}
}

// A connection that falls silent before COMMIT delays the stop of a consumer no longer than a
// COMMIT may take. The next consumer finds out whether it was committed.
func TestSilentConnectionHoldsNoStoppingConsumer(t *testing.T) {
	t.Parallel()
	database := testservice.Database(t, "")
	network, address, err := pgfault.Upstream(database)
	if err != nil {
		t.Fatal(err)
	}
	proxy, err := pgfault.Start(pgfault.Options{Network: network, Address: address})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		proxy.SetPaused(false)
		_ = proxy.Close() // it cuts connections that nobody uses
	})
	direct := &bed{Service: testservice.On(t, database, nil)}
	silent := &bed{Service: testservice.On(t, proxy.URL(database), nil)}
	source := newTopic()
	source.publish(0, "1", "k", "one")
	handled := make(chan struct{})
	stop := silent.start(t, source, func(ctx context.Context, m *consumer.Delivery) error {
		err := insert(ctx, m)
		proxy.SetPaused(true)
		close(handled)
		return err
	}, nil)
	<-handled
	stopped := make(chan struct{})
	go func() { stop(); close(stopped) }()
	select {
	case <-stopped:
	case <-time.After(time.Minute):
		t.Error("the consumer does not stop")
	}
	proxy.SetPaused(false)
	<-stopped
	direct.start(t, source, insert, nil)
	direct.at(t, 0, 1)
	if got := direct.names(t); got != "one" {
		t.Errorf("effects %q", got)
	}
}
