// Package restoretest destroys the database of a service that sends messages through a broker, and
// restores an earlier base backup. The broker's log does not go back with it.
package restoretest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/internal/pgserver"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/relay"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Broker is a broker with an empty topic. It must keep copies of a message: if it has a window for
// duplicates, that must be short.
type Broker struct {
	Topic     string
	Publisher relay.Publisher
	// Source returns a source of the topic for the consumer "books", with connections of its own.
	Source func() consumer.Source
	// Log returns all messages that the broker has. It does not use the code under test.
	Log func() []consumer.Delivery
}

const (
	accounts = 12
	patience = time.Minute
	refused  = "refused.0" // by the broker, until an operator retries it
	blocked  = "blocked.0" // by its consumer, since before the backup
	behind   = "blocked.1" // waits behind it
	later    = "later.0"   // blocked as well, but paid after the backup
)

// Run pays before and after a base backup, restores the backup, and requires that:
//
//   - the log's messages of the lost time have one effect again, in the order of their keys, and call
//     other services with the keys that they had,
//   - messages that come back into the outbox, refused ones included, are published again with
//     their ids and have no second effect,
//   - parked messages come back, and have one effect once they are redriven again,
//   - a payment that is lost and retried is made again, and its message has no second effect.
//
// A lost payment that nobody retries is in the projection, because the log has its message, but not
// in the books. Run requires that nothing else differs.
func Run(t *testing.T, b Broker) {
	if runtime.GOOS == "windows" {
		t.Skip("NOT RUN: a base backup is made as a standby, which Windows can't have")
	}
	pgtest.Slow(t, "starts PostgreSQL three times")
	fast := map[string]string{"fsync": "off"}
	folder := filepath.Join(pgtest.Folder(t), "backup")
	primary, err := pgserver.Start(t.Context(), &pgserver.Options{Settings: fast})
	own(t, primary, err)
	if err := testservice.Prepare(t.Context(), primary.URL(), ""); err != nil {
		t.Fatal(err)
	}
	s := open(t, b, primary)
	s.Exec(t, "CREATE TABLE payments (name text PRIMARY KEY)")
	w := &world{heals: map[string]bool{}, mails: map[string][]string{}}

	// Before the backup.
	stopRelay, stopConsumer := s.relay(t, w), s.consume(t, w)
	for round := range 3 {
		s.payRound(t, round)
	}
	for _, name := range []string{refused, blocked, behind} {
		s.pay(t, name)
	}
	s.published(t, 1) // the refused one stays
	s.projected(t, 3*accounts)
	s.parkedAre(t, blocked, behind)
	stopRelay()
	s.payRound(t, 3) // waits in the outbox
	var online sync.WaitGroup
	online.Go(func() { s.payRound(t, 4) })
	backup, err := pgserver.Standby(t.Context(), primary, &pgserver.Options{Settings: fast, DataDir: folder})
	own(t, backup, err)
	backup.Kill()
	if err := backup.Stop(); err != nil {
		t.Fatal(err)
	}
	online.Wait()

	// After the backup.
	stopRelay = s.relay(t, w)
	w.heal(refused, blocked)
	s.Exec(t, "UPDATE message_outbox SET refused = NULL")
	s.redrive(t, blocked)
	s.payRound(t, 5)
	s.payRound(t, 6)
	s.pay(t, later)
	s.published(t, 0)
	s.projected(t, 7*accounts+len([]string{refused, blocked, behind}))
	s.parkedAre(t, later)
	before := s.projection(t)
	position := s.Count(t, "SELECT sum(next_offset) FROM message_offsets")
	ids := idsOf(t, b)
	primary.Kill() // while the consumer runs
	stopRelay()
	stopConsumer()

	// The restored history begins.
	restored, err := pgserver.Start(t.Context(), &pgserver.Options{Settings: fast, DataDir: folder})
	own(t, restored, err)
	if err := restored.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	s = open(t, b, restored)
	if now := s.Count(t, "SELECT sum(next_offset) FROM message_offsets"); now >= position {
		t.Errorf("the positions did not go back: their sum was %d and is %d", position, now)
	}
	books := s.Strings(t, "SELECT name FROM payments")
	waiting := s.Strings(t, "SELECT convert_from(body, 'UTF8') FROM message_outbox")
	if len(waiting) < accounts+1 || !slices.Contains(waiting, refused) {
		t.Fatalf("the outbox has %q", waiting)
	}
	s.parkedAre(t, blocked, behind)
	w.forget(refused)
	s.relay(t, w)
	s.consume(t, w)
	s.published(t, 1)
	w.heal(refused)
	s.Exec(t, "UPDATE message_outbox SET refused = NULL")
	s.redrive(t, blocked)
	retried := 0
	for account := range accounts { // clients retry payments of which they are not sure
		if name := nameOf(account, 5); !slices.Contains(books, name) {
			s.pay(t, name)
			retried++
		}
	}
	if retried != accounts {
		t.Errorf("%d payments of the lost time are lost", retried)
	}
	s.payRound(t, 7) // behind all others
	s.published(t, 0)
	eventually(t, "the last messages have an effect", func() bool {
		return s.Count(t, "SELECT count(*) FROM effects WHERE name LIKE '%.7'") == accounts && s.Count(t, "SELECT count(*) FROM message_parked WHERE state <> 3") == 0
	})
	want := before
	for account := range accounts {
		want = append(want, nameOf(account, 7))
	}
	slices.Sort(want)
	if got := s.projection(t); !slices.Equal(got, want) {
		t.Fatalf("the projection has\n%q\nand should have\n%q", got, want)
	}
	if n := s.Count(t, `SELECT count(*) FROM (SELECT split_part(name, '.', 2)::int AS n, lag(split_part(name, '.', 2)::int) OVER (PARTITION BY split_part(name, '.', 1) ORDER BY id) AS before
		FROM effects) AS e WHERE before > n`); n != 0 {
		t.Errorf("%d effects are out of the order of their key", n)
	}
	s.parkedAre(t, later) // it was parked after the backup: the log has brought it back
	w.heal(later)
	s.redrive(t, later)
	s.projected(t, len(want)+1)

	// Copies are the messages that came back into the outbox, and those of retried payments.
	if copies := s.sum(func(e consumer.BatchEnd) int { return e.Duplicates }); copies < len(waiting)+retried {
		t.Errorf("%d copies were dropped, and %d are in the log", copies, len(waiting)+retried)
	}
	for name, id := range idsOf(t, b) {
		if former := ids[name]; former != "" && id != former {
			t.Errorf("%s was published as %s, and then as %s", name, former, id)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, keys := range w.mails {
		if len(slices.Compact(slices.Clone(keys))) != 1 {
			t.Errorf("%s called another service with the keys %q", name, keys)
		}
	}
	if sent := len(w.mails[nameOf(0, 6)]); sent != 2 {
		t.Errorf("a message of the lost time called another service %d times", sent)
	}

	// A restore can't mend that the log has messages of payments that the books have lost.
	var lost []string
	for account := range accounts {
		for _, round := range []int{4, 6} {
			if name := nameOf(account, round); !slices.Contains(books, name) {
				lost = append(lost, name)
			}
		}
	}
	lost = append(lost, later)
	got := s.Strings(t, "SELECT name FROM effects EXCEPT SELECT name FROM payments")
	slices.Sort(lost)
	slices.Sort(got)
	if !slices.Equal(got, lost) {
		t.Errorf("without a payment are\n%q\nand should be\n%q", got, lost)
	}
	if got := s.Strings(t, "SELECT name FROM payments EXCEPT SELECT name FROM effects"); len(got) != 0 {
		t.Errorf("without an effect are %q", got)
	}
}

// own ends a server with the test.
func own(t *testing.T, server *pgserver.Server, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		server.Kill()
		_ = server.Stop()
	})
}

func nameOf(account, round int) string { return fmt.Sprintf("account%d.%d", account, round) }

// world is the state that does not go back with the database.
type world struct {
	mu    sync.Mutex
	heals map[string]bool
	mails map[string][]string // keys of calls to another service, by message
}

// heal lets messages through from now on.
func (w *world) heal(names ...string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, name := range names {
		w.heals[name] = true
	}
}

func (w *world) forget(name string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.heals, name)
}

func (w *world) healed(name string) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.heals[name]
}

// service is the service on one of the two databases: the lost one, and the restored one.
type service struct {
	*testservice.Service
	broker Broker
	mu     sync.Mutex
	ends   []consumer.BatchEnd
}

func open(t *testing.T, b Broker, server *pgserver.Server) *service {
	t.Helper()
	return &service{broker: b, Service: testservice.On(t, server.URL(), &postgres.Options{PoolConfig: func(c *pgxpool.Config) { c.MaxConns = 24 }})}
}

// pay runs the request of a payment, which publishes a message.
func (s *service) pay(t *testing.T, name string) {
	account, _, _ := strings.Cut(name, ".")
	result := s.Engine.Do(t.Context(), testservice.Request(idempotency.Key{Scope: "acme", Value: name}), func(ctx context.Context) (*idempotency.Answer, error) {
		if _, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO payments (name) VALUES ($1)", name); err != nil {
			return nil, err
		}
		return &idempotency.Answer{Status: 201}, message.Publish(ctx, "paid", message.Message{Topic: s.broker.Topic, Key: []byte(account), Body: []byte(name)})
	})
	if result.Outcome != idempotency.OutcomeExecuted {
		t.Errorf("%s: %s, %v", name, result.Outcome, result.Err)
	}
}

func (s *service) payRound(t *testing.T, round int) {
	for account := range accounts {
		s.pay(t, nameOf(account, round))
	}
}

// refusing is a broker that refuses one message until [world.heal] is called for it.
type refusing struct {
	relay.Publisher
	w *world
}

func (r refusing) Publish(ctx context.Context, messages []message.Message) []error {
	if at := slices.IndexFunc(messages, func(m message.Message) bool { return string(m.Body) == refused && !r.w.healed(refused) }); at >= 0 {
		rest := r.Publisher.Publish(ctx, slices.Delete(slices.Clone(messages), at, at+1))
		return slices.Insert(rest, at, fmt.Errorf("%w: by the test", relay.ErrRefused))
	}
	return r.Publisher.Publish(ctx, messages)
}

func background(t *testing.T, run func(ctx context.Context)) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { run(ctx) })
	stop = func() {
		cancel()
		running.Wait()
	}
	t.Cleanup(stop)
	return stop
}

// relay runs a relay until the test ends or stop is called.
func (s *service) relay(t *testing.T, w *world) (stop func()) {
	r := relay.New(s.Store.Outbox(), refusing{s.broker.Publisher, w}, &relay.Options{Interval: 20 * time.Millisecond, Logger: slog.New(slog.DiscardHandler)})
	return background(t, r.Run)
}

// consume runs a consumer until the test ends or stop is called.
func (s *service) consume(t *testing.T, w *world) (stop func()) {
	handle := func(ctx context.Context, d *consumer.Delivery) error {
		name := string(d.Body)
		if (name == blocked || name == later) && !w.healed(name) {
			return consumer.Reject(errors.New("by the test"))
		}
		w.mu.Lock()
		w.mails[name] = append(w.mails[name], idempotency.DerivedKey(ctx, "mail"))
		w.mu.Unlock()
		_, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects (name) VALUES ($1)", name)
		return err
	}
	c := consumer.New("books", s.Store.Inbox(), s.broker.Source(), handle, &consumer.Options{
		BatchTimeout: 4 * time.Second, ParkedInterval: 20 * time.Millisecond, Logger: slog.New(slog.DiscardHandler),
		OnBatch: func(end consumer.BatchEnd) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.ends = append(s.ends, end)
		},
	})
	return background(t, func(ctx context.Context) {
		if err := c.Run(ctx); err != nil {
			t.Errorf("the consumer ended: %v", err)
		}
	})
}

func (s *service) sum(of func(consumer.BatchEnd) int) (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, end := range s.ends {
		n += of(end)
	}
	return n
}

// published waits until this number of messages is left in the outbox.
func (s *service) published(t *testing.T, left int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d messages are left in the outbox", left), func() bool { return s.Count(t, "SELECT count(*) FROM message_outbox") == left })
}

// projected waits until there are n effects.
func (s *service) projected(t *testing.T, n int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d effects are there", n), func() bool { return s.Count(t, "SELECT count(*) FROM effects") >= n })
	if got := s.Count(t, "SELECT count(*) FROM effects"); got != n {
		t.Fatalf("%d effects, want %d", got, n)
	}
}

func (s *service) projection(t *testing.T) []string {
	t.Helper()
	return s.Strings(t, `SELECT name FROM effects ORDER BY name COLLATE "C"`)
}

// parkedAre waits until exactly these messages are parked.
func (s *service) parkedAre(t *testing.T, names ...string) {
	t.Helper()
	eventually(t, fmt.Sprintf("parked are %q", names), func() bool {
		return slices.Equal(s.Strings(t, "SELECT convert_from(body, 'UTF8') FROM message_parked ORDER BY id"), names)
	})
}

func (s *service) redrive(t *testing.T, name string) {
	t.Helper()
	s.Exec(t, "UPDATE message_parked SET state = 1, not_before = now() WHERE convert_from(body, 'UTF8') = $1", name)
}

// idsOf returns the id of each message in the log. All copies must have one.
func idsOf(t *testing.T, b Broker) map[string]string {
	t.Helper()
	ids := map[string]string{}
	for _, d := range b.Log() {
		name := string(d.Body)
		if ids[name] != "" && ids[name] != d.ID {
			t.Errorf("copies of %s have the ids %s and %s", name, ids[name], d.ID)
		}
		ids[name] = d.ID
	}
	if len(slices.Compact(slices.Sorted(maps.Values(ids)))) != len(ids) {
		t.Error("two messages have one id")
	}
	return ids
}

func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !is(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}
