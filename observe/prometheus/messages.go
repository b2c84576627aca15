package promobserve

import (
	"context"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/observe"
	"github.com/paidonce/idempotency/relay"
)

// ConsumersMax is the maximum number of consumers with series of their own. Further ones share the
// label "other".
const ConsumersMax = 100

// Messages makes metrics from the batches of consumers and relays. It is safe for concurrent use.
type Messages struct {
	consumed  *prometheus.CounterVec
	batches   *prometheus.CounterVec
	durations *prometheus.HistogramVec
	published *prometheus.CounterVec
	publishes prometheus.Observer

	mu    sync.Mutex
	named map[string]string // the labels of consumers
}

// NewMessages returns metrics that count from zero, and registers them. It panics if there is no
// registerer, or if the metrics are registered already. The consumers and the relay of a process
// share them:
//
//	messages := promobserve.NewMessages(prometheus.DefaultRegisterer)
//	relay.New(store.Outbox(), publisher, &relay.Options{OnDrain: messages.OnDrain})
//	consumer.New("ledger", store.Inbox(), source, project, &consumer.Options{OnBatch: messages.OnBatch})
func NewMessages(registerer prometheus.Registerer) *Messages {
	if registerer == nil {
		panic("idempotency/prometheus: NewMessages needs a Registerer")
	}
	publishes := histograms("message_publish_duration_seconds", "Time of a batch of the relay that had messages, with the broker's confirmation.")
	m := &Messages{
		consumed:  counters("messages_consumed_total", "Messages that a consumer is done with for now, by outcome.", "consumer", "outcome"),
		batches:   counters("message_batches_total", "Batches of consumers, by result.", "consumer", "result"),
		durations: histograms("message_batch_duration_seconds", "Time of a batch of a consumer.", "consumer"),
		published: counters("messages_published_total", "Messages that a relay gave to the broker, by result.", "result"),
		publishes: publishes.WithLabelValues(),
		named:     map[string]string{},
	}
	for _, result := range []string{"published", "failed", "refused"} {
		m.published.WithLabelValues(result)
	}
	registerer.MustRegister(m.consumed, m.batches, m.durations, m.published, publishes)
	return m
}

// label returns the label of a consumer, and makes its series if there is room.
func (m *Messages) label(name string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	label, ok := m.named[name]
	if ok {
		return label
	}
	if label = strings.ToValidUTF8(name, "\uFFFD"); len(m.named) >= ConsumersMax {
		return labelOther
	}
	m.named[strings.Clone(name)] = label
	for _, outcome := range []string{"executed", "duplicate", "redelivered", "parked", "dead", "mismatch"} {
		m.consumed.WithLabelValues(label, outcome)
	}
	for _, result := range []string{"done", "failed", "fenced", "held"} {
		m.batches.WithLabelValues(label, result)
	}
	return label
}

// OnBatch counts a batch: pass it as consumer.Options.OnBatch.
func (m *Messages) OnBatch(end consumer.BatchEnd) {
	label := m.label(end.Consumer)
	m.batches.WithLabelValues(label, observe.BatchResult(&end)).Inc()
	m.durations.WithLabelValues(label).Observe(end.Duration.Seconds())
	for outcome, n := range observe.BatchOutcomes(&end) {
		if n > 0 {
			m.consumed.WithLabelValues(label, outcome).Add(float64(n))
		}
	}
}

// OnDrain counts a batch of a relay: pass it as relay.Options.OnDrain.
func (m *Messages) OnDrain(_ int, drained relay.Drained, duration time.Duration, _ error) {
	m.published.WithLabelValues("published").Add(float64(drained.Published))
	m.published.WithLabelValues("failed").Add(float64(drained.Failed))
	m.published.WithLabelValues("refused").Add(float64(drained.Refused))
	if drained.Published+drained.Failed+drained.Refused > 0 {
		m.publishes.Observe(duration.Seconds())
	}
}

// MessageFigures are figures of the messages in the database: those of postgres.MessageStatistics.
type MessageFigures struct {
	Outbox        int64
	OutboxRefused int64
	OldestOutbox  time.Duration
	Waiting       int64
	Behind        int64
	Dead          int64
	OldestDead    time.Duration
	OldestDue     time.Duration
	Partitions    int64
	SinceMoved    time.Duration
	OldestBegun   time.Duration
}

// NewMessagesCollector returns a collector of figures of the messages in the database. Pass the
// method MessageStatistics of a *postgres.Store. The collector reads and keeps the figures as that
// of [NewRecordsCollector] does.
func NewMessagesCollector[S interface {
	~struct {
		Outbox        int64
		OutboxRefused int64
		OldestOutbox  time.Duration
		Waiting       int64
		Behind        int64
		Dead          int64
		OldestDead    time.Duration
		OldestDue     time.Duration
		Partitions    int64
		SinceMoved    time.Duration
		OldestBegun   time.Duration
	}
}](read func(ctx context.Context) (S, error), opts *RecordsOptions) prometheus.Collector {
	if read == nil {
		panic("idempotency/prometheus: NewMessagesCollector needs a function")
	}
	return newFigures(opts, "messages", messagesMetrics, func(ctx context.Context) (MessageFigures, error) {
		stats, err := read(ctx)
		return MessageFigures(stats), err
	})
}

// messagesMetrics are the metrics of the messages in the database.
var messagesMetrics = []figure[MessageFigures]{
	{messagesDesc("outbox", "Messages in the outbox that no broker has refused."), func(f MessageFigures) float64 { return float64(f.Outbox) }},
	{messagesDesc("outbox_refused", "Messages in the outbox that the broker refused, and that wait for a person."), func(f MessageFigures) float64 { return float64(f.OutboxRefused) }},
	{messagesDesc("outbox_oldest_seconds", "Age of the oldest message in the outbox that a relay can publish."), func(f MessageFigures) float64 { return f.OldestOutbox.Seconds() }},
	{messagesDesc("waiting", "Parked messages that wait for another try."), func(f MessageFigures) float64 { return float64(f.Waiting) }},
	{messagesDesc("behind", "Parked messages that wait behind another one of their key."), func(f MessageFigures) float64 { return float64(f.Behind) }},
	{messagesDesc("dead", "Parked messages that wait for a person."), func(f MessageFigures) float64 { return float64(f.Dead) }},
	{messagesDesc("oldest_dead_seconds", "For how long the oldest of those has been parked."), func(f MessageFigures) float64 { return f.OldestDead.Seconds() }},
	{messagesDesc("oldest_due_seconds", "The longest time that a parked message has been due."), func(f MessageFigures) float64 { return f.OldestDue.Seconds() }},
	{messagesDesc("partitions", "Partitions in which consumers have a position."), func(f MessageFigures) float64 { return float64(f.Partitions) }},
	{messagesDesc("moved_age_seconds", "Time since any position was moved."), func(f MessageFigures) float64 { return f.SinceMoved.Seconds() }},
	{messagesDesc("oldest_begun_seconds", "The longest time for which a position has not moved although a process began a batch there."), func(f MessageFigures) float64 { return f.OldestBegun.Seconds() }},
}

func messagesDesc(name, help string) *prometheus.Desc {
	return prometheus.NewDesc("idempotency_messages_"+name, help, nil, nil)
}
