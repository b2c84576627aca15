package operator

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/internal/locks"
)

// PositionsMax is the maximum number of positions that [Operator.Consumers] returns.
const PositionsMax = 10_000

// Errors of messages.
var (
	// ErrNotParked: the message is not parked at this consumer, or in the outbox it is not refused. It
	// may have been handled or published since.
	ErrNotParked = errors.New("message is not parked: idemctl message get shows what became of it")
	// ErrBehind: the message waits behind another one of its key. Redrive or drop that one:
	// [ParkedMessage.Front]. Nothing was done.
	ErrBehind = errors.New("message waits behind another one of its key")
	// ErrNoMessage: the database knows no message with this id.
	ErrNoMessage = errors.New("nothing is known of the message")
)

// ParkedState is the state of a parked message.
type ParkedState string

// The states.
const (
	MessageWaiting ParkedState = "waiting" // it is tried again later
	MessageBehind  ParkedState = "behind"  // another message of its key is parked in front of it
	MessageDead    ParkedState = "dead"    // until a person redrives or drops it
)

var parkedStates = map[consumer.ParkState]ParkedState{consumer.Waiting: MessageWaiting, consumer.WaitingBehind: MessageBehind, consumer.Dead: MessageDead}

// number returns the state's number in the table; 0 stands for all states.
func (s ParkedState) number() (consumer.ParkState, error) {
	for number, state := range parkedStates {
		if s == state {
			return number, nil
		}
	}
	if s == "" {
		return 0, nil
	}
	return 0, fmt.Errorf("%w: a parked message is waiting, behind or dead", ErrInvalid)
}

// ParkedMessage is a message that a consumer could not handle, or a message that waits behind such
// a one. Its headers and body are not read: see [Operator.MessageContent].
type ParkedMessage struct {
	Consumer  string
	ID        string
	Source    string // the topic that it came from
	Topic     string
	Key       []byte // nil if it has none
	Partition int32
	Offset    int64
	State     ParkedState

	// Attempts is the number of tries that failed or run, since the message came or was redriven last;
	// or of the processes that died in it.
	Attempts int

	Error     string // the reason why the last try failed
	ParkedAt  time.Time
	Age       time.Duration // since ParkedAt
	NotBefore time.Time     // of the next try; zero unless it is waiting
	Front     string        // id of the first parked message of its key; empty if none is in front of it
	BodyBytes int64

	row int64 // the place in the list
}

// Seen returns the state that an act compares: see [MessageAct.Seen].
func (m *ParkedMessage) Seen() string { return string(m.State) + "-" + strconv.Itoa(m.Attempts) }

// ParkedFilter selects the parked messages that match every field that is set.
type ParkedFilter struct {
	Consumer string
	State    ParkedState
}

// ParkedList is one page.
type ParkedList struct {
	Messages []ParkedMessage
	Next     Cursor // the start of the next page; empty if the list ends here
	Now      time.Time
}

// parkedColumns are the columns that scanParked reads.
func (o *Operator) parkedColumns() string {
	return `m.id, m.consumer, m.message_id, m.source, m.topic, m.key, m.partition, m.position, m.state, m.attempts, m.error, m.parked_at, m.not_before,
	COALESCE((SELECT f.message_id FROM ` + o.parked + ` AS f WHERE f.consumer = m.consumer AND f.topic = m.topic AND sha256(f.key) = sha256(m.key) AND f.id < m.id ORDER BY f.id LIMIT 1), ''),
	octet_length(m.body)::bigint, statement_timestamp()`
}

func scanParked(row pgx.Row, now *time.Time) (m ParkedMessage, err error) {
	var state consumer.ParkState
	var notBefore *time.Time
	err = row.Scan(&m.row, &m.Consumer, &m.ID, &m.Source, &m.Topic, &m.Key, &m.Partition, &m.Offset, &state, &m.Attempts, &m.Error, &m.ParkedAt, &notBefore, &m.Front, &m.BodyBytes, now)
	m.State, m.ParkedAt, *now = parkedStates[state], m.ParkedAt.UTC(), now.UTC()
	m.Age = max(now.Sub(m.ParkedAt), 0)
	if notBefore != nil {
		m.NotBefore = notBefore.UTC()
	}
	return m, err
}

// ListParked returns a page of the parked messages, in the order in which they were parked.
// Page.Descending is refused. The error for an invalid filter or page wraps [ErrInvalid].
func (o *Operator) ListParked(ctx context.Context, filter ParkedFilter, page Page) (ParkedList, error) {
	var list ParkedList
	rows, after, err := page.byRow()
	state, wrong := filter.State.number()
	if err = errors.Join(err, wrong); err == nil {
		err = o.read(ctx, func(ctx context.Context, tx pgx.Tx) error {
			found, err := tx.Query(ctx, "SELECT "+o.parkedColumns()+" FROM "+o.parked+` AS m
				WHERE ($1::text = '' OR m.consumer = $1) AND ($2::smallint = 0 OR m.state = $2) AND m.id > $3::bigint ORDER BY m.id LIMIT $4::int`,
				filter.Consumer, state, after, rows+1)
			if err != nil {
				return err
			}
			list.Messages, err = pgx.CollectRows(found, func(row pgx.CollectableRow) (ParkedMessage, error) { return scanParked(row, &list.Now) })
			return err
		})
	}
	if err != nil {
		return ParkedList{}, fmt.Errorf("list parked messages: %w", err)
	}
	if len(list.Messages) > rows {
		list.Messages = list.Messages[:rows]
		list.Next = rowCursor(list.Messages[rows-1].row)
	}
	return list, nil
}

// byRow returns the page of a list that is ordered by a number.
func (p Page) byRow() (rows int, after int64, err error) {
	rows = cmp.Or(p.Rows, pageRows)
	switch {
	case rows < 0 || rows > PageRowsMax:
		return 0, 0, fmt.Errorf("%w: a page has 1 to %d rows", ErrInvalid, PageRowsMax)
	case p.Descending:
		return 0, 0, fmt.Errorf("%w: messages are listed from the oldest on", ErrInvalid)
	case p.After == "":
		return rows, math.MinInt64, nil
	}
	if after, err = strconv.ParseInt(string(p.After), 36, 64); err != nil {
		err = fmt.Errorf("%w: the cursor is not one of this list", ErrInvalid)
	}
	return rows, after, err
}

func rowCursor(row int64) Cursor { return Cursor(strconv.FormatInt(row, 36)) }

// Consumer is the state of a consumer in the database, which does not know the newest offsets of
// the broker: tools of the broker show the lag.
type Consumer struct {
	Name      string
	Positions []Position

	Waiting, Behind, Dead int64         // parked messages, by their state
	OldestDead            time.Duration // since the oldest dead one was parked; zero if there is none

	// OldestDue is the longest time that a waiting one has been due; zero if none is. If it grows, no
	// consumer of this name runs.
	OldestDue time.Duration
}

// Position is the position of a consumer in a partition.
type Position struct {
	Source      string
	Partition   int32
	Next        int64    // offset of the next message; negative if none was consumed yet, and in a queue
	Incarnation [16]byte // of the source
	Deaths      int      // processes that began a batch and did not end it, since the position was moved last
	MovedAt     time.Time
	Age         time.Duration         // since MovedAt
	Attempt     idempotency.AttemptID // batch that moved it last; the handler's own rows may have it

	// Holder is the session that has the partition's lock; nil if none has it. It is taken only while
	// a batch runs.
	Holder *Holder
}

// ConsumerList has all consumers.
type ConsumerList struct {
	Consumers []Consumer
	Truncated bool // there are more than [PositionsMax] positions
	Now       time.Time
}

// Consumers returns the consumers in the order of their names, each with its positions in the order
// of source and partition. If a name is given, it returns only this one. Holders need the rights of
// pg_monitor.
func (o *Operator) Consumers(ctx context.Context, name string) (ConsumerList, error) {
	var list ConsumerList
	err := o.read(ctx, func(ctx context.Context, tx pgx.Tx) error {
		list = ConsumerList{}
		at := map[string]int{} // index in the list
		consumerOf := func(name string) *Consumer {
			i, ok := at[name]
			if !ok {
				i = len(list.Consumers)
				at[name], list.Consumers = i, append(list.Consumers, Consumer{Name: name})
			}
			return &list.Consumers[i]
		}
		holders, err := o.lockHolders(ctx, tx)
		if err != nil {
			return err
		}
		if err := tx.QueryRow(ctx, "SELECT statement_timestamp()").Scan(&list.Now); err != nil {
			return err
		}
		list.Now = list.Now.UTC()
		rows, err := tx.Query(ctx, "SELECT consumer, source, partition, next_offset, incarnation, deaths, updated_at, attempt_id FROM "+o.offsets+
			" WHERE $1::text = '' OR consumer = $1 ORDER BY consumer, source, partition LIMIT $2::int", name, PositionsMax+1)
		if err != nil {
			return err
		}
		var of string
		var p Position
		n := 0
		_, err = pgx.ForEachRow(rows, []any{&of, &p.Source, &p.Partition, &p.Next, &p.Incarnation, &p.Deaths, &p.MovedAt, (*[16]byte)(&p.Attempt)}, func() error {
			if n++; n > PositionsMax {
				list.Truncated = true
				return nil
			}
			one := p
			one.MovedAt = p.MovedAt.UTC()
			one.Age = max(list.Now.Sub(one.MovedAt), 0)
			one.Holder = holders[locks.Partition(o.table, of, p.Source, p.Partition)]
			c := consumerOf(of)
			c.Positions = append(c.Positions, one)
			return nil
		})
		if err != nil {
			return err
		}
		rows, err = tx.Query(ctx, "SELECT consumer, count(*) FILTER (WHERE state = 1), count(*) FILTER (WHERE state = 2), count(*) FILTER (WHERE state = 3),"+
			" min(parked_at) FILTER (WHERE state = 3), min(not_before) FILTER (WHERE state = 1 AND not_before < statement_timestamp()) FROM "+o.parked+
			" WHERE $1::text = '' OR consumer = $1 GROUP BY consumer", name)
		if err != nil {
			return err
		}
		var waiting, behind, dead int64
		var oldest, due *time.Time
		_, err = pgx.ForEachRow(rows, []any{&of, &waiting, &behind, &dead, &oldest, &due}, func() error {
			c := consumerOf(of)
			c.Waiting, c.Behind, c.Dead = waiting, behind, dead
			if oldest != nil {
				c.OldestDead = max(list.Now.Sub(*oldest), 0)
			}
			if due != nil {
				c.OldestDue = max(list.Now.Sub(*due), 0)
			}
			return nil
		})
		slices.SortFunc(list.Consumers, func(a, b Consumer) int { return strings.Compare(a.Name, b.Name) })
		return err
	})
	if err != nil {
		return ConsumerList{}, fmt.Errorf("list consumers: %w", err)
	}
	return list, nil
}

// lockHolders returns the sessions that hold 64-bit advisory locks in this database, by the number.
func (o *Operator) lockHolders(ctx context.Context, tx pgx.Tx) (map[int64]*Holder, error) {
	rows, err := tx.Query(ctx, "SELECT "+holderColumns+`, l.classid::bigint, l.objid::bigint
		FROM pg_locks AS l LEFT JOIN pg_stat_activity AS a ON a.pid = l.pid
		WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())`)
	if err != nil {
		return nil, err
	}
	holders := map[int64]*Holder{}
	_, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (struct{}, error) {
		var high, low int64
		h, err := scanHolder(row, &high, &low)
		holders[int64(uint64(high)<<32|uint64(low))] = &h
		return struct{}{}, err
	})
	return holders, err
}

// Outbox is the state of the outbox.
type Outbox struct {
	Shards  []OutboxShard // those with messages or a relay
	Pending int64         // messages that a relay can publish, or the consumer of a queue can handle, of all shards
	Refused int64         // messages that the broker refused
	Behind  int64         // messages behind a refused one of their key
	Now     time.Time
}

// OutboxShard is a part of the outbox.
type OutboxShard struct {
	Number                   int
	Pending, Refused, Behind int64
	Oldest                   time.Duration // age of the oldest pending message
	Relay                    *Holder       // session that publishes from it now; nil if none does
}

// Outbox returns the state of the outbox. It counts its rows, and fails if that takes longer than
// Options.StatementTimeout.
func (o *Operator) Outbox(ctx context.Context) (Outbox, error) {
	var box Outbox
	err := o.read(ctx, func(ctx context.Context, tx pgx.Tx) error {
		holders, err := o.lockHolders(ctx, tx)
		if err != nil {
			return err
		}
		rows, err := tx.Query(ctx, `SELECT n, statement_timestamp(), c.* FROM generate_series(0, $1::int - 1) AS n, LATERAL (
				SELECT count(*) FILTER (WHERE refused IS NULL AND front IS NULL), count(refused), count(*) FILTER (WHERE refused IS NULL AND front IS NOT NULL),
				       COALESCE(extract(epoch FROM statement_timestamp() - min(created_at) FILTER (WHERE refused IS NULL AND front IS NULL)), 0)::float8
				FROM `+o.outbox+` AS m LEFT JOIN LATERAL (`+o.outboxFront()+`) AS f (front) ON true WHERE m.shard = n) AS c`, postgres.OutboxShards)
		if err != nil {
			return err
		}
		box = Outbox{}
		var s OutboxShard
		var seconds float64
		_, err = pgx.ForEachRow(rows, []any{&s.Number, &box.Now, &s.Pending, &s.Refused, &s.Behind, &seconds}, func() error {
			s.Oldest = time.Duration(max(seconds, 0) * float64(time.Second))
			s.Relay = holders[locks.Shard(o.table, s.Number)]
			box.Pending, box.Refused, box.Behind = box.Pending+s.Pending, box.Refused+s.Refused, box.Behind+s.Behind
			if s.Pending+s.Refused+s.Behind > 0 || s.Relay != nil {
				box.Shards = append(box.Shards, s)
			}
			return nil
		})
		box.Now = box.Now.UTC()
		return err
	})
	if err != nil {
		return Outbox{}, fmt.Errorf("look at the outbox: %w", err)
	}
	return box, nil
}

// outboxFront selects the id of the first refused message in front of m.
func (o *Operator) outboxFront() string {
	return "SELECT p.message_id::text FROM " + o.outbox + " AS p WHERE p.refused IS NOT NULL AND p.shard = m.shard AND p.topic = m.topic AND sha256(p.key) = sha256(m.key) AND p.id < m.id ORDER BY p.id LIMIT 1"
}

// OutboxMessage is a message in the outbox. Its headers and body are not read: see
// [Operator.MessageContent].
type OutboxMessage struct {
	ID          string
	Topic       string
	Key         []byte // nil if it has none
	Shard       int
	Refused     string // the broker's reason to refuse the message; empty if it did not
	Front       string // id of the refused message of its key that has to go first; empty if there is none
	PublishedAt time.Time
	Age         time.Duration // since PublishedAt
	BodyBytes   int64

	row int64 // the place in the list, and in its shard
}

// OutboxList is one page.
type OutboxList struct {
	Messages []OutboxMessage
	Next     Cursor // the start of the next page; empty if the list ends here
	Now      time.Time
}

func (o *Operator) outboxColumns() string {
	return `m.id, m.message_id::text, m.topic, m.key, m.shard, COALESCE(m.refused, ''), COALESCE((` + o.outboxFront() + `), ''), m.created_at, octet_length(m.body)::bigint, statement_timestamp()`
}

func scanOutbox(row pgx.Row, now *time.Time) (m OutboxMessage, err error) {
	err = row.Scan(&m.row, &m.ID, &m.Topic, &m.Key, &m.Shard, &m.Refused, &m.Front, &m.PublishedAt, &m.BodyBytes, now)
	m.PublishedAt, *now = m.PublishedAt.UTC(), now.UTC()
	m.Age = max(now.Sub(m.PublishedAt), 0)
	return m, err
}

// ListOutbox returns a page of the messages that the broker refused, in the order of their
// publication. Page.Descending is refused. The error for an invalid page wraps [ErrInvalid].
func (o *Operator) ListOutbox(ctx context.Context, page Page) (OutboxList, error) {
	var list OutboxList
	rows, after, err := page.byRow()
	if err == nil {
		err = o.read(ctx, func(ctx context.Context, tx pgx.Tx) error {
			found, err := tx.Query(ctx, "SELECT "+o.outboxColumns()+" FROM "+o.outbox+" AS m WHERE m.refused IS NOT NULL AND m.id > $1::bigint ORDER BY m.id LIMIT $2::int", after, rows+1)
			if err != nil {
				return err
			}
			list.Messages, err = pgx.CollectRows(found, func(row pgx.CollectableRow) (OutboxMessage, error) { return scanOutbox(row, &list.Now) })
			return err
		})
	}
	if err != nil {
		return OutboxList{}, fmt.Errorf("list the outbox: %w", err)
	}
	if len(list.Messages) > rows {
		list.Messages = list.Messages[:rows]
		list.Next = rowCursor(list.Messages[rows-1].row)
	}
	return list, nil
}

func validMessageID(id string) error {
	if err := idempotency.ValidateKeyValue(id); err != nil {
		return fmt.Errorf("%w: the id of a message: %w", ErrInvalid, err)
	}
	return nil
}

// MessageState is everything that the database knows of a message.
type MessageState struct {
	ID      string
	Outbox  []OutboxMessage // one as a rule, and at most [MessageRowsMax]
	Parked  []ParkedMessage // by its consumers
	Handled []HandledMessage
	// Events are all of this in the order of time, with the acts of operators.
	Events []Event
	Now    time.Time
}

// HandledMessage is the record of a consumer that has handled a message.
type HandledMessage struct {
	Consumer string
	Record   Record
}

// MessageRowsMax is the maximum number of rows in the outbox, and of consumers, of
// [Operator.Message].
const MessageRowsMax = 100

// Message returns the state of a message: its row in the outbox, and its record or its parked row
// at each consumer. The consumers are those that have a position or a parked message; if a name is
// given, Message looks only at that one. It reads the whole outbox, because no index there has the
// id. The error is [ErrNoMessage] if nothing is known.
//
// A message that a relay has published is not in the outbox any more. Then only its consumers show
// that it was there.
func (o *Operator) Message(ctx context.Context, id, consumerName string) (MessageState, error) {
	state := MessageState{ID: id}
	err := validMessageID(id)
	if err == nil {
		err = o.read(ctx, func(ctx context.Context, tx pgx.Tx) error {
			state = MessageState{ID: id}
			return o.messageIn(ctx, tx, &state, consumerName)
		})
	}
	if err == nil && len(state.Events) == 0 {
		err = ErrNoMessage
	}
	if err != nil {
		return MessageState{}, fmt.Errorf("get the message: %w", err)
	}
	return state, nil
}

func (o *Operator) messageIn(ctx context.Context, tx pgx.Tx, state *MessageState, consumerName string) error {
	if err := tx.QueryRow(ctx, "SELECT statement_timestamp()").Scan(&state.Now); err != nil {
		return err
	}
	names := []string{consumerName}
	if consumerName == "" {
		// Each name is the next one after another in the index.
		rows, err := tx.Query(ctx, `WITH RECURSIVE
			a AS ((SELECT consumer FROM `+o.offsets+` ORDER BY consumer LIMIT 1) UNION ALL SELECT (SELECT n.consumer FROM `+o.offsets+` AS n WHERE n.consumer > a.consumer ORDER BY n.consumer LIMIT 1) FROM a WHERE a.consumer IS NOT NULL),
			b AS ((SELECT consumer FROM `+o.parked+` ORDER BY consumer LIMIT 1) UNION ALL SELECT (SELECT n.consumer FROM `+o.parked+` AS n WHERE n.consumer > b.consumer ORDER BY n.consumer LIMIT 1) FROM b WHERE b.consumer IS NOT NULL)
			SELECT consumer FROM a WHERE consumer IS NOT NULL UNION SELECT consumer FROM b WHERE consumer IS NOT NULL ORDER BY 1 LIMIT $1::int`, MessageRowsMax)
		if err != nil {
			return err
		}
		if names, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
			return err
		}
	}
	for _, name := range names {
		key := idempotency.Key{Scope: idempotency.MessageScopePrefix + name, Value: state.ID}
		record, err := scanRecord(tx.QueryRow(ctx, "SELECT "+recordColumns+" FROM "+o.keys+" WHERE scope = $1 AND key = $2", key.Scope, key.Value))
		switch {
		case err == nil:
			state.Handled = append(state.Handled, HandledMessage{name, record})
		case !errors.Is(err, pgx.ErrNoRows):
			return err
		}
		parked, err := o.parkedIn(ctx, tx, name, state.ID, "")
		switch {
		case err == nil:
			state.Parked = append(state.Parked, parked)
		case !errors.Is(err, ErrNotParked):
			return err
		}
		events, err := o.timeline(ctx, tx, key)
		if err != nil {
			return err
		}
		for i := range events {
			events[i].Consumer = name
		}
		state.Events = append(state.Events, events...)
	}
	if parsed, err := ParseAttemptID(state.ID); err == nil { // the outbox has UUIDs
		rows, err := tx.Query(ctx, "SELECT "+o.outboxColumns()+" FROM "+o.outbox+" AS m WHERE m.message_id = $1::uuid ORDER BY m.id LIMIT $2::int", parsed.String(), MessageRowsMax)
		if err != nil {
			return err
		}
		if state.Outbox, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (OutboxMessage, error) { return scanOutbox(row, &state.Now) }); err != nil {
			return err
		}
		for i := range state.Outbox {
			m := &state.Outbox[i]
			state.Events = append(state.Events, Event{At: m.PublishedAt, Kind: EventPublished})
			if m.Refused != "" {
				state.Events = append(state.Events, Event{At: state.Now, Kind: EventRefused, Reason: m.Refused})
			}
		}
		acts, err := o.acts(ctx, tx, "key = $1 AND action IN ($2, $3)", state.ID, actOutboxRetry, actOutboxDrop)
		if err != nil {
			return err
		}
		state.Events = append(state.Events, acts...)
	}
	state.Now = state.Now.UTC()
	sortEvents(state.Events)
	return nil
}

// parkedIn reads a parked message; lock is FOR UPDATE OF m, or empty.
func (o *Operator) parkedIn(ctx context.Context, tx pgx.Tx, consumerName, id, lock string) (ParkedMessage, error) {
	m, err := scanParked(tx.QueryRow(ctx, "SELECT "+o.parkedColumns()+" FROM "+o.parked+" AS m WHERE m.consumer = $1 AND m.message_id = $2 "+lock, consumerName, id), new(time.Time))
	if errors.Is(err, pgx.ErrNoRows) {
		err = ErrNotParked
	}
	return m, err
}

// parkedEvents returns the events of a message that a consumer has parked.
func (o *Operator) parkedEvents(ctx context.Context, tx pgx.Tx, key idempotency.Key) ([]Event, error) {
	name, ok := strings.CutPrefix(key.Scope, idempotency.MessageScopePrefix)
	var readable bool
	if !ok {
		return nil, nil
	}
	if err := tx.QueryRow(ctx, "SELECT COALESCE(has_table_privilege(to_regclass($1)::oid, 'SELECT'), false)", o.parked).Scan(&readable); err != nil || !readable {
		return nil, err
	}
	m, err := o.parkedIn(ctx, tx, name, key.Value, "")
	switch {
	case errors.Is(err, ErrNotParked):
		return nil, nil
	case err != nil:
		return nil, err
	}
	events := []Event{{At: m.ParkedAt, Kind: EventParked, Reason: string(m.State) + ": " + m.Error, Attempts: m.Attempts}}
	if !m.NotBefore.IsZero() {
		events = append(events, Event{At: m.NotBefore, Kind: EventNext, Reason: m.Error, Attempts: m.Attempts})
	}
	return events, nil
}

// MessageContent returns a message with its headers and body: from the outbox, or from a consumer
// that has parked it. They may contain data that an operator need not see, so no other call returns
// them. The error is [ErrNoMessage] if the message is in neither.
func (o *Operator) MessageContent(ctx context.Context, id string) (message.Message, error) {
	m := message.Message{ID: id}
	var headers []byte
	err := o.read(ctx, func(ctx context.Context, tx pgx.Tx) error {
		err := tx.QueryRow(ctx, "SELECT topic, key, headers, body FROM "+o.outbox+" WHERE message_id::text = $1 ORDER BY id LIMIT 1", id).Scan(&m.Topic, &m.Key, &headers, &m.Body)
		if errors.Is(err, pgx.ErrNoRows) {
			err = tx.QueryRow(ctx, "SELECT topic, key, headers, body FROM "+o.parked+" WHERE message_id = $1 ORDER BY id LIMIT 1", id).Scan(&m.Topic, &m.Key, &headers, &m.Body)
		}
		if errors.Is(err, pgx.ErrNoRows) {
			err = fmt.Errorf("%w: it is neither in the outbox nor parked, and its content is with the broker", ErrNoMessage)
		}
		return err
	})
	if err == nil {
		m.Header, err = postgres.DecodeHeaders(headers)
	}
	if err != nil {
		return message.Message{}, fmt.Errorf("read the message: %w", err)
	}
	return m, nil
}

// MessageAct names the operator who acts on a message, and the reason. Act.Attempt must be zero.
type MessageAct struct {
	Act

	// Seen, if set, restricts the act to the message as the operator saw it: [ParkedMessage.Seen],
	// such as dead-8. If it was tried or acted on since, the act returns [ErrChanged]. Seen must be
	// empty for a message in the outbox.
	Seen string
}

// Actions of the audit table.
const (
	actRedrive     = "redrive"
	actDrop        = "drop"
	actOutboxRetry = "outbox-retry"
	actOutboxDrop  = "outbox-drop"
)

// Redrive makes a dead or waiting message due at once, with all of its attempts again, and returns
// it as it was. Its id stays, so if a copy was handled since, the message is a duplicate. That
// holds while the record of the copy is kept: redrive a dead message before its consumer's
// Options.Retention has passed.
//
// Like every act on a message it checks what the operator saw, changes the row and adds a row to
// the audit table, all in one transaction. Errors: [ErrNotParked]; [ErrBehind]; [ErrChanged];
// [ErrInvalid]; [ErrUnknown] if the reply to COMMIT was lost.
func (o *Operator) Redrive(ctx context.Context, consumerName, id string, act MessageAct) (ParkedMessage, error) {
	return o.parkedAct(ctx, actRedrive, consumerName, id, act, func(m *ParkedMessage) error {
		if m.State == MessageBehind {
			return fmt.Errorf("%w: redrive or drop the one in front of it, %s", ErrBehind, m.Front)
		}
		return nil
	}, "UPDATE "+o.parked+" SET state = 1, attempts = 0, not_before = clock_timestamp() WHERE consumer = $1 AND message_id = $2")
}

// Drop deletes a parked message, and returns it as it was. ITS CONSUMER NEVER HANDLES IT, and the
// messages behind it go on. Read its content first ([Operator.MessageContent]): nothing else has
// it, unless the broker still does. If it is handled at this moment, either that or the drop
// happens. A copy that the broker delivers later is handled, because nothing records that this one
// was dropped. It returns the errors of [Operator.Redrive] except ErrBehind.
func (o *Operator) Drop(ctx context.Context, consumerName, id string, act MessageAct) (ParkedMessage, error) {
	return o.parkedAct(ctx, actDrop, consumerName, id, act, nil, "DELETE FROM "+o.parked+" WHERE consumer = $1 AND message_id = $2")
}

func (o *Operator) parkedAct(ctx context.Context, action, consumerName, id string, act MessageAct, vet func(*ParkedMessage) error, sql string) (ParkedMessage, error) {
	var m ParkedMessage
	err := o.messageAct(ctx, action, id, act, func(ctx context.Context, tx pgx.Tx) (scope string, since time.Time, details any, err error) {
		if m, err = o.parkedIn(ctx, tx, consumerName, id, "FOR UPDATE OF m"); err == nil && act.Seen != "" && act.Seen != m.Seen() {
			err = fmt.Errorf("%w: it is %s now: look again with idemctl message get, and act on what it shows", ErrChanged, m.Seen())
		}
		if err == nil && vet != nil {
			err = vet(&m)
		}
		if err == nil {
			err = one(tx.Exec(ctx, sql, consumerName, id))
		}
		return idempotency.MessageScopePrefix + consumerName, m.ParkedAt, map[string]any{
			"state": m.State, "attempts": m.Attempts, "error": m.Error, "source": m.Source, "topic": m.Topic, "partition": m.Partition, "offset": m.Offset,
		}, err
	})
	if err != nil {
		return ParkedMessage{}, err
	}
	return m, nil
}

// RetryOutbox lets the relay publish a message again that the broker refused, and returns it as it
// was. The later messages of its key follow it. It returns the errors of [Operator.Redrive] except
// ErrBehind and ErrChanged.
func (o *Operator) RetryOutbox(ctx context.Context, id string, act MessageAct) (OutboxMessage, error) {
	return o.outboxAct(ctx, actOutboxRetry, id, act, "UPDATE "+o.outbox+" SET refused = NULL WHERE shard = $1 AND id = $2 AND refused IS NOT NULL")
}

// DropOutbox deletes a message that the broker refused from the outbox, and returns it as it was.
// NOBODY EVER GETS IT, and the later messages of its key go on. It returns the errors of
// [Operator.RetryOutbox].
func (o *Operator) DropOutbox(ctx context.Context, id string, act MessageAct) (OutboxMessage, error) {
	return o.outboxAct(ctx, actOutboxDrop, id, act, "DELETE FROM "+o.outbox+" WHERE shard = $1 AND id = $2 AND refused IS NOT NULL")
}

func (o *Operator) outboxAct(ctx context.Context, action, id string, act MessageAct, sql string) (OutboxMessage, error) {
	var m OutboxMessage
	err := o.messageAct(ctx, action, id, act, func(ctx context.Context, tx pgx.Tx) (scope string, since time.Time, details any, err error) {
		if act.Seen != "" {
			return "", since, nil, fmt.Errorf("%w: a message in the outbox has nothing to compare", ErrInvalid)
		}
		m, err = scanOutbox(tx.QueryRow(ctx, "SELECT "+o.outboxColumns()+" FROM "+o.outbox+" AS m WHERE m.refused IS NOT NULL AND m.message_id::text = $1 ORDER BY m.id LIMIT 1 FOR UPDATE OF m", id), new(time.Time))
		if errors.Is(err, pgx.ErrNoRows) {
			err = ErrNotParked
		}
		if err == nil {
			err = one(tx.Exec(ctx, sql, m.Shard, m.row))
		}
		return m.Topic, m.PublishedAt, map[string]any{"refused": m.Refused, "shard": m.Shard}, err
	})
	if err != nil {
		return OutboxMessage{}, err
	}
	return m, nil
}

// messageAct runs do in a transaction, and adds the row that it describes to the audit table.
func (o *Operator) messageAct(ctx context.Context, action, id string, act MessageAct, do func(context.Context, pgx.Tx) (scope string, since time.Time, details any, err error)) error {
	err := errors.Join(validMessageID(id), act.Validate())
	if err == nil && !act.Attempt.IsZero() {
		err = fmt.Errorf("%w: a message has no attempt", ErrInvalid)
	}
	if err == nil {
		err = o.in(ctx, pgx.TxOptions{IsoLevel: pgx.ReadCommitted, AccessMode: pgx.ReadWrite}, func(ctx context.Context, tx pgx.Tx) error {
			// COMMIT waits for the local disk, or for more if the role's setting demands it.
			if _, err := tx.Exec(ctx, `SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') IN ('off', 'local', 'remote_write')`); err != nil {
				return err
			}
			scope, since, details, err := do(ctx, tx)
			if err != nil {
				return err
			}
			text, err := json.Marshal(details)
			if err != nil {
				return err
			}
			return one(tx.Exec(ctx, "INSERT INTO "+o.audit+` (action, actor, reason, scope, key, attempt_id, status, record_created_at, record_expires_at, message)
				VALUES ($1, $2, $3, $4, $5, $6::uuid, 0, $7::timestamptz, $7::timestamptz, $8::jsonb)`,
				action, act.Actor, act.Reason, scope, id, idempotency.AttemptID{}.String(), since, string(text)))
		})
	}
	if err != nil {
		return fmt.Errorf("%s: %w", action, err)
	}
	return nil
}
