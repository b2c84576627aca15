package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/storage/postgres"
)

// The designs that consume messages. All have the same effect on tables of their own: an entry for
// each message, and the sum of an account's entries. No two partitions share an account. The source
// makes the messages itself, so the figures depend on no broker.

const (
	messagesBatch  = 100 // messages of a batch
	messagesFetch  = 10  // messages of a fetch, for a design without batches
	messagesTopic  = "bench"
	messagesMoment = 24 * time.Hour // time for which a record is kept

	// messagesQuickPartitions is the number of partitions of a quick run; partitionsOf has all.
	messagesQuickPartitions = 4
)

// partitionsOf returns the numbers of partitions that are measured. A partition has one worker.
func partitionsOf(quick bool) []int {
	if quick {
		return []int{messagesQuickPartitions}
	}
	return []int{1, messagesQuickPartitions}
}

// The statements of the effect. %[1]s is the schema of the design.
const (
	// One message in one statement.
	sqlEffect = `
		WITH entry AS (INSERT INTO %[1]s.entries (message, account, amount) VALUES ($1, $2, $3))
		UPDATE %[1]s.balances SET balance = balance + $3 WHERE account = $2`
	// The same in two, for DeferExec.
	sqlEffectEntry   = `INSERT INTO %[1]s.entries (message, account, amount) VALUES ($1, $2, $3)`
	sqlEffectBalance = `UPDATE %[1]s.balances SET balance = balance + $2 WHERE account = $1`
	// A whole batch in one statement.
	sqlEffects = `
		WITH entry AS (INSERT INTO %[1]s.entries (message, account, amount) SELECT * FROM unnest($1::text[], $2::text[], $3::bigint[]) RETURNING account, amount)
		UPDATE %[1]s.balances AS b SET balance = b.balance + e.amount
		FROM (SELECT account, sum(amount)::bigint AS amount FROM entry GROUP BY account) AS e WHERE b.account = e.account`
	// The move of the position, without the library.
	sqlMove = `UPDATE %[1]s.positions SET next_offset = $3 WHERE partition = $1 AND next_offset = $2`

	sqlMessageTables = `
		CREATE SCHEMA %[1]s
		CREATE TABLE entries (message text NOT NULL, account text NOT NULL, amount bigint NOT NULL)
		CREATE TABLE balances (balance bigint NOT NULL, account text PRIMARY KEY) WITH (fillfactor = 50)
		CREATE TABLE positions (next_offset bigint NOT NULL, partition integer PRIMARY KEY) WITH (fillfactor = 50)`
)

// messagesSchema returns the schema of a design's effects.
func messagesSchema(design string) string { return strings.ReplaceAll(design, "-", "_") }

// event is the body of a message.
type event struct {
	ID        string `json:"id"`
	Type      string `json:"type"`
	Account   string `json:"account"`
	Amount    int64  `json:"amount"`
	Currency  string `json:"currency"`
	Reference string `json:"reference"`
}

func amountOf(offset int64) int64 { return 1 + offset%9 }

// idSpace is the namespace of the ids, which are hashes, as those of package message are.
var idSpace = uuid.MustParse("5f0c1f0e-6f0b-4a3b-9d52-0d8c3a1f7e11")

// deliveriesOf returns the next messages of a partition from an offset on.
func deliveriesOf(partition, partitions int, from, messages int64) []consumer.Delivery {
	own := int64(accounts / partitions)
	all := make([]consumer.Delivery, messages)
	for i := range all {
		offset := from + int64(i)
		id := uuid.NewSHA1(idSpace, fmt.Appendf(nil, "%d/%d", partition, offset)).String()
		account := accountOf(partition + partitions*int(offset*7919%own))
		body := fmt.Appendf(nil, `{"id":%q,"type":"transfer-made","account":%q,"amount":%d,"currency":"EUR","reference":%q}`,
			id, account, amountOf(offset), referenceOf(int(offset%1_000_000)))
		all[i] = consumer.Delivery{Offset: offset, Message: message.Message{ID: id, Topic: messagesTopic, Key: []byte(account), Body: body}}
	}
	return all
}

func decodeEvent(body []byte) (*event, error) {
	e := new(event)
	if err := json.Unmarshal(body, e); err != nil || e.Account == "" || e.Amount <= 0 {
		return nil, consumer.Reject(errors.New("it is no event"))
	}
	return e, nil
}

// columns are the parameters of sqlEffects.
type columns struct {
	messages, accounts []string
	amounts            []int64
}

func (c *columns) add(e *event) {
	c.messages, c.accounts, c.amounts = append(c.messages, e.ID), append(c.accounts, e.Account), append(c.amounts, e.Amount)
}

// fetchOf returns the number of messages that the source hands to a design at once.
func fetchOf(design string) int64 {
	switch design {
	case "consume-single", "consume-engine", "consume-bare-single":
		return messagesFetch
	}
	return messagesBatch
}

// taker handles fetched messages of one partition. It returns an error unless it has handled all.
type taker func(ctx context.Context, partition int, deliveries []consumer.Delivery) error

// consumption is the consuming side of a stand.
type consumption struct {
	takers map[string]taker
	next   map[string][]int64 // offsets by design and partition

	stop    context.CancelFunc
	running sync.WaitGroup
}

// consume is an order to the serving process to consume messages.
type consume struct {
	Design   string        `json:"design"`
	Duration time.Duration `json:"duration_ns"`
}

// consumed is the result of such an order.
type consumed struct {
	Messages  int64   `json:"messages"`
	PerSecond float64 `json:"per_second"`
	Next      []int64 `json:"next"` // offset of each partition
}

func (c *consumption) close() {
	if c != nil {
		c.stop()
		c.running.Wait()
	}
}

// consume handles messages of all partitions at once for the ordered time, at least one fetch of
// each.
func (c *consumption) consume(ctx context.Context, o *consume) (done consumed, err error) {
	take, next, fetch := c.takers[o.Design], c.next[o.Design], fetchOf(o.Design)
	if take == nil {
		return done, errors.New("it consumes no messages")
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var mu sync.Mutex
	var group sync.WaitGroup
	started := time.Now()
	for partition := range next {
		group.Go(func() {
			handled, last := int64(0), started
			for ; (handled == 0 || last.Sub(started) < o.Duration) && ctx.Err() == nil; handled += fetch {
				if err := take(ctx, partition, deliveriesOf(partition, len(next), next[partition], fetch)); err != nil {
					cancel(err)
					return
				}
				next[partition] += fetch
				last = time.Now()
			}
			mu.Lock()
			defer mu.Unlock()
			done.Messages += handled
			if took := last.Sub(started); took > 0 {
				// Each partition's rate is over its own time, because some end earlier than others.
				done.PerSecond += float64(handled) / took.Seconds()
			}
		})
	}
	group.Wait()
	done.Next = next
	return done, context.Cause(ctx)
}

// consumption opens the consumers of the designs that the setting names.
func (d *stand) consumption(ctx context.Context, schema string, plain *pgxpool.Pool) (_ *consumption, err error) {
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	c := &consumption{takers: map[string]taker{}, next: map[string][]int64{}, stop: stop}
	defer func() {
		if err != nil {
			c.close()
		}
	}()
	opts := &postgres.Options{Schema: schema, AcquireTimeout: acquireTimeout}
	pool, err := d.open(ctx, opts)
	if err != nil {
		return nil, err
	}
	store := postgres.New(pool, opts)
	if err := store.CheckMessages(ctx, postgres.UseConsume); err != nil {
		return nil, err
	}
	for _, name := range consuming() {
		if !d.wants(name) {
			continue
		}
		at := messagesSchema(name)
		text := func(sql string) string { return fmt.Sprintf(sql, at) }
		c.next[name] = make([]int64, d.setting.Partitions)
		effect, effects, move := text(sqlEffect), text(sqlEffects), text(sqlMove)
		each := func(ctx context.Context, m *consumer.Delivery) error {
			e, err := decodeEvent(m.Body)
			if err != nil {
				return err
			}
			_, err = postgres.Tx(ctx).Exec(ctx, effect, e.ID, e.Account, e.Amount)
			return err
		}
		switch name {
		case "consume-bare-single":
			c.takers[name] = bareMessages(plain, move, 1, func(ctx context.Context, tx pgx.Tx, c *columns) error {
				_, err := tx.Exec(ctx, effect, c.messages[0], c.accounts[0], c.amounts[0])
				return err
			})
		case "consume-bare-slice":
			c.takers[name] = bareMessages(plain, move, messagesBatch, func(ctx context.Context, tx pgx.Tx, c *columns) error {
				_, err := tx.Exec(ctx, effects, c.messages, c.accounts, c.amounts)
				return err
			})
		case "consume-engine":
			c.takers[name] = engineMessages(idempotency.NewEngine(store, &idempotency.Options{TTL: messagesMoment}), name, each)
		case "consume-single":
			c.takers[name], err = c.receive(running, name, store, 1, each, nil)
		case "consume-batch":
			c.takers[name], err = c.receive(running, name, store, messagesBatch, each, nil)
		case "consume-deferred":
			entry, balance := text(sqlEffectEntry), text(sqlEffectBalance)
			c.takers[name], err = c.receive(running, name, store, messagesBatch, func(ctx context.Context, m *consumer.Delivery) error {
				e, err := decodeEvent(m.Body)
				if err != nil {
					return err
				}
				return errors.Join(postgres.DeferExec(ctx, entry, e.ID, e.Account, e.Amount), postgres.DeferExec(ctx, balance, e.Account, e.Amount))
			}, nil)
		case "consume-slice":
			c.takers[name], err = c.receive(running, name, store, messagesBatch, nil, func(ctx context.Context, messages []*consumer.Delivery) error {
				var all columns
				for _, m := range messages {
					e, err := decodeEvent(m.Body)
					if err != nil {
						return err
					}
					all.add(e)
				}
				_, err := postgres.Tx(ctx).Exec(ctx, effects, all.messages, all.accounts, all.amounts)
				return err
			})
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	return c, nil
}

// made is a source that delivers nothing by itself: consume passes messages to its receiver.
type made struct {
	receiver atomic.Pointer[consumer.Receiver]
	ready    chan struct{}
}

// Run implements [consumer.Source].
func (m *made) Run(ctx context.Context, receiver consumer.Receiver) error {
	m.receiver.Store(&receiver)
	close(m.ready)
	<-ctx.Done()
	return ctx.Err()
}

// receive starts a consumer of the library, and returns a taker that passes messages to it.
func (c *consumption) receive(ctx context.Context, name string, store *postgres.Store, batch int, handler consumer.Handler, together consumer.BatchHandler) (taker, error) {
	source := &made{ready: make(chan struct{})}
	var failure atomic.Pointer[error]
	opts := &consumer.Options{
		BatchMax: batch, InFlightMax: max(len(c.next[name]), 1), Retention: messagesMoment, ParkedInterval: time.Hour, Logger: slog.New(slog.DiscardHandler),
		OnBatch: func(end consumer.BatchEnd) {
			if end.Err != nil {
				failure.Store(&end.Err)
			}
		},
	}
	var one *consumer.Consumer
	if together != nil {
		one = consumer.NewBatch(name, store.Inbox(), source, together, opts)
	} else {
		one = consumer.New(name, store.Inbox(), source, handler, opts)
	}
	c.running.Go(func() { _ = one.Run(ctx) }) // it ends with ctx
	<-source.ready
	receiver := *source.receiver.Load()
	for number := range c.next[name] {
		if _, err := receiver.Assigned(ctx, consumer.Partition{Source: messagesTopic, Number: int32(number)}); err != nil {
			return nil, err
		}
	}
	return func(ctx context.Context, number int, deliveries []consumer.Delivery) error {
		settled, _ := receiver.Receive(ctx, consumer.Partition{Source: messagesTopic, Number: int32(number)}, deliveries)
		switch err := failure.Load(); {
		case settled == len(deliveries):
			return nil
		case err != nil:
			return *err
		}
		return fmt.Errorf("%d of %d messages were settled", settled, len(deliveries))
	}, nil
}

// engineMessages handles each message as a request: its id is the key.
func engineMessages(engine *idempotency.Engine, name string, handler consumer.Handler) taker {
	return func(ctx context.Context, _ int, deliveries []consumer.Delivery) error {
		for i := range deliveries {
			d := &deliveries[i]
			request := idempotency.Request{Key: idempotency.Key{Scope: idempotency.MessageScopePrefix + name, Value: d.ID}, Fingerprint: consumer.FingerprintOf(&d.Message)}
			result := engine.Do(ctx, request, func(ctx context.Context) (*idempotency.Answer, error) {
				return &idempotency.Answer{Status: 204}, handler(ctx, d)
			})
			if result.Outcome != idempotency.OutcomeExecuted {
				return fmt.Errorf("a message is %s: %w", result.Outcome, result.Err)
			}
		}
		return nil
	}
}

// bareMessages handles messages without the library: a transaction has the effects of a batch, and
// moves the position.
func bareMessages(pool *pgxpool.Pool, move string, batch int, effect func(context.Context, pgx.Tx, *columns) error) taker {
	return func(ctx context.Context, partition int, deliveries []consumer.Delivery) error {
		for ; len(deliveries) > 0; deliveries = deliveries[batch:] {
			if err := pgx.BeginFunc(ctx, pool, func(tx pgx.Tx) error {
				var all columns
				for i := range batch {
					e, err := decodeEvent(deliveries[i].Body)
					if err != nil {
						return err
					}
					all.add(e)
				}
				if err := effect(ctx, tx, &all); err != nil {
					return err
				}
				from := deliveries[0].Offset
				tag, err := tx.Exec(ctx, move, partition, from, from+int64(batch))
				if err == nil && tag.RowsAffected() != 1 {
					err = errors.New("the position was moved by somebody else")
				}
				return err
			}); err != nil {
				return err
			}
		}
		return nil
	}
}

// messageEntries returns one entry for each design that consumes messages.
func (r *run) messageEntries(ctx context.Context, b *Block, _ []*client) ([]*entry, error) {
	if err := r.cluster.resetMessages(ctx); err != nil {
		return nil, err
	}
	names := r.wanted(consuming())
	var entries []*entry
	for _, name := range names {
		entries = append(entries, &entry{design: designOf(name)})
	}
	b.PoolSize = b.Clients + 1 // one for a consumer's look for parked messages
	return entries, r.set(ctx, b, []string{schemaOf(0)}, names)
}

// consume makes the serving process consume messages.
func (r *run) consume(ctx context.Context, e *entry, duration time.Duration) (load, error) {
	answer, err := r.child.ask(ctx, order{Consume: &consume{Design: e.design.name, Duration: duration}})
	if err != nil {
		return load{}, err
	}
	e.next = answer.Consumed.Next
	return load{requests: answer.Consumed.Messages, perSec: answer.Consumed.PerSecond, latency: emptyLatency()}, nil
}

// makeMessages makes the tables of the designs that consume messages.
func (c *cluster) makeMessages(ctx context.Context) error {
	for _, name := range consuming() {
		if _, err := c.admin.Exec(ctx, fmt.Sprintf(sqlMessageTables, messagesSchema(name))); err != nil {
			return fmt.Errorf("make the tables: %w", err)
		}
	}
	return c.resetMessages(ctx)
}

// resetMessages deletes all effects of messages, their records, and all positions.
func (c *cluster) resetMessages(ctx context.Context) error {
	keys := pgx.Identifier{schemaOf(0)}.Sanitize()
	statements := []string{"TRUNCATE " + tableOf(schemaOf(0)) + ", " + keys + "." + postgres.OffsetsTable + ", " + keys + "." + postgres.ParkedTable}
	for _, name := range consuming() {
		at := messagesSchema(name)
		statements = append(statements,
			fmt.Sprintf("TRUNCATE %[1]s.entries, %[1]s.balances, %[1]s.positions", at),
			fmt.Sprintf("INSERT INTO %s.balances SELECT 0, 'acct-' || lpad(n::text, 4, '0') FROM generate_series(0, %d) AS n", at, accounts-1),
			fmt.Sprintf("INSERT INTO %s.positions SELECT 0, n FROM generate_series(0, %d) AS n", at, messagesQuickPartitions-1),
			fmt.Sprintf("VACUUM (ANALYZE) %[1]s.balances, %[1]s.positions", at),
		)
	}
	for _, sql := range append(statements, "CHECKPOINT") {
		if _, err := c.admin.Exec(ctx, sql); err != nil {
			return fmt.Errorf("empty the tables: %w", err)
		}
	}
	return nil
}

// checkMessages returns an error unless each message that a design has settled has one effect
// there, and the balances are the sums of the entries.
func (c *cluster) checkMessages(ctx context.Context, entries []*entry) error {
	for _, e := range entries {
		var settled, sum int64
		for _, next := range e.next {
			settled += next
			for offset := range next {
				sum += amountOf(offset)
			}
		}
		var all, once, amounts, mismatched int64
		err := c.admin.QueryRow(ctx, fmt.Sprintf(`
			SELECT (SELECT count(*) FROM %[1]s.entries), (SELECT count(*) FROM (SELECT DISTINCT message FROM %[1]s.entries) AS d),
			       (SELECT coalesce(sum(amount), 0)::bigint FROM %[1]s.entries),
			       (SELECT count(*) FROM %[1]s.balances AS b FULL JOIN (SELECT account, sum(amount) AS amount FROM %[1]s.entries GROUP BY account) AS e USING (account)
			        WHERE b.balance IS DISTINCT FROM coalesce(e.amount, 0))`, messagesSchema(e.design.name))).Scan(&all, &once, &amounts, &mismatched)
		switch {
		case err != nil:
			return fmt.Errorf("check the effects: %w", err)
		case all != settled || once != settled || amounts != sum || mismatched != 0:
			return fmt.Errorf("%s: %d messages were settled, and have %d effects, of %d messages; the amounts' sum is %d, want %d; %d balances are wrong",
				e.design.name, settled, all, once, amounts, sum, mismatched)
		}
	}
	return nil
}
