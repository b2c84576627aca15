package rulestest

import (
	"context"
	"errors"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/textparse"
	"github.com/prometheus/prometheus/promql"
	"github.com/prometheus/prometheus/promql/parser"
	"github.com/prometheus/prometheus/tsdb"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/observe/internal/fixture"
	promobserve "github.com/paidonce/idempotency/observe/prometheus"
	"github.com/paidonce/idempotency/relay"
	"github.com/paidonce/idempotency/storage/postgres"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// interval is the time between scrapes, and between evaluations of the rules: half a minute of a
// day that passes as fast as the service answers.
const interval = 30 * time.Second

// world is a service and the Prometheus that scrapes it. It controls the time.
type world struct {
	*fixture.Service
	t        *testing.T
	tracer   *promobserve.Tracer
	messages *promobserve.Messages
	scraped  http.Handler
	unread   error // the error of reading the figures about the table
	begin    time.Time
	now      time.Time
	db       *tsdb.DB
	engine   *promql.Engine
}

func newWorld(t *testing.T, handlerTimeout, recordsTimeout time.Duration) *world {
	t.Helper()
	w := &world{t: t, begin: time.Unix(1_700_000_000, 0)}
	w.now = w.begin
	registry := prometheus.NewRegistry()
	w.tracer = promobserve.New(registry, &promobserve.Options{Timeouts: idempotency.Timeouts{Handler: handlerTimeout}})
	w.Service = fixture.New(t, fixture.Options{Tracer: w.tracer})
	registry.MustRegister(promobserve.NewPoolCollector(w.Pool.Stat), promobserve.NewRecordsCollector(func(ctx context.Context) (postgres.Statistics, error) {
		if w.unread != nil {
			return postgres.Statistics{}, w.unread
		}
		return w.Store.Statistics(ctx)
	}, &promobserve.RecordsOptions{Timeout: recordsTimeout, Now: func() time.Time { return w.now }}), promobserve.NewOpenCollector(func(ctx context.Context) (postgres.OpenStatistics, error) {
		if w.unread != nil {
			return postgres.OpenStatistics{}, w.unread
		}
		return w.Store.OpenStatistics(ctx)
	}, &promobserve.RecordsOptions{Timeout: recordsTimeout, Now: func() time.Time { return w.now }}), promobserve.NewMessagesCollector(func(ctx context.Context) (postgres.MessageStatistics, error) {
		if w.unread != nil {
			return postgres.MessageStatistics{}, w.unread
		}
		return w.Store.MessageStatistics(ctx)
	}, &promobserve.RecordsOptions{Timeout: recordsTimeout, Now: func() time.Time { return w.now }}))
	w.messages = promobserve.NewMessages(registry)
	w.scraped = promhttp.HandlerFor(registry, promhttp.HandlerOpts{ErrorHandling: promhttp.HTTPErrorOnError})

	options := tsdb.DefaultOptions()
	options.MinBlockDuration = (24 * time.Hour).Milliseconds() // all of it stays in memory
	options.MaxBlockDuration = options.MinBlockDuration
	options.RetentionDuration = 0
	options.WALSegmentSize = -1
	var err error
	if w.db, err = tsdb.Open(t.TempDir(), nil, nil, options, nil); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.db.Close(); err != nil {
			t.Error(err)
		}
	})
	w.engine = promql.NewEngine(promql.EngineOpts{MaxSamples: 1e6, Timeout: time.Minute, Parser: parser.NewParser(parser.Options{})})
	t.Cleanup(func() { _ = w.engine.Close() })
	return w
}

// tick lets events happen and an interval pass. Prometheus scrapes at its end, unless the events
// scraped meanwhile.
func (w *world) tick(happen func()) {
	w.t.Helper()
	next := w.now.Add(interval)
	happen()
	if w.now.Before(next) {
		w.scrapeNow()
	}
}

func (w *world) scrapeNow() {
	w.t.Helper()
	w.now = w.now.Add(interval)
	w.scrape()
}

// usual has the events of an interval of a good day: payments, a retry now and then, a declined
// one, a walk of the reaper.
func (w *world) usual(n int) {
	w.t.Helper()
	w.Execute(fixture.Transfers, 3)
	w.Execute(fixture.Payments, 2)
	if n%3 == 0 {
		w.Replay(fixture.Transfers)
	}
	if n%5 == 0 {
		w.Decline()
	}
	w.reap()
	w.consume(nil)
	w.messages.OnDrain(0, relay.Drained{Published: 3}, 10*time.Millisecond, nil)
}

// consume counts a batch of the consumer ledger.
func (w *world) consume(err error) {
	w.messages.OnBatch(consumer.BatchEnd{Consumer: "ledger", Duration: 10 * time.Millisecond, Executed: 3, Err: err})
}

// exec changes what lies in the tables of messages.
func (w *world) exec(sql string) {
	w.t.Helper()
	if _, err := w.Pool.Exec(context.Background(), sql); err != nil {
		w.t.Fatal(err)
	}
}

// Rows of messages, to be completed.
const (
	outboxRow  = "INSERT INTO message_outbox (shard, message_id, topic, headers, body, created_at, refused) VALUES (3, gen_random_uuid(), 't', '', '', "
	parkedRow  = "INSERT INTO message_parked (position, partition, attempts, consumer, message_id, source, topic, error, headers, body, parked_at, not_before, state) VALUES (0, 0, 1, 'ledger', gen_random_uuid()::text, 's', 't', 'e', '', '', "
	offsetsRow = "INSERT INTO message_offsets (next_offset, incarnation, attempt_id, partition, consumer, source, updated_at, deaths) VALUES (0, gen_random_uuid(), gen_random_uuid(), 0, 'ledger', 's', "
)

func (w *world) reap() {
	started := time.Now()
	deleted, err := w.Store.DeleteExpired(context.Background())
	w.tracer.OnWalk(deleted, time.Since(started), err)
}

// text returns the service's answer to a scrape.
func (w *world) text() string {
	w.t.Helper()
	answer := httptest.NewRecorder()
	w.scraped.ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	if answer.Code != http.StatusOK {
		w.t.Fatalf("scrape: %d %s", answer.Code, answer.Body)
	}
	return answer.Body.String()
}

// scrape reads the service's metrics, and stores them as Prometheus does, under a job and an
// instance.
func (w *world) scrape() {
	w.t.Helper()
	appender := w.db.Appender(context.Background())
	text := textparse.NewPromParser([]byte(w.text()), labels.NewSymbolTable(), false)
	for {
		entry, err := text.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			w.t.Fatalf("the scrape can't be read: %v", err)
		}
		if entry != textparse.EntrySeries {
			continue
		}
		var series labels.Labels
		text.Labels(&series)
		_, _, value := text.Series()
		series = labels.NewBuilder(series).Set("job", "shop").Set("instance", "shop-1:8080").Labels()
		if _, err := appender.Append(0, series, w.now.UnixMilli(), value); err != nil {
			w.t.Fatalf("%s: %v", series, err)
		}
	}
	if err := appender.Commit(); err != nil {
		w.t.Fatal(err)
	}
}

// query evaluates an expression at every interval from the beginning on.
func (w *world) query(expression string) promql.Matrix {
	w.t.Helper()
	query, err := w.engine.NewRangeQuery(context.Background(), w.db, nil, expression, w.begin, w.now, interval)
	if err != nil {
		w.t.Errorf("%s: %v", expression, err)
		return nil
	}
	defer query.Close()
	result := query.Exec(context.Background())
	if result.Err != nil || len(result.Warnings) > 0 {
		w.t.Errorf("%s: %v %v", expression, result.Err, result.Warnings)
		return nil
	}
	matrix, err := result.Matrix()
	if err != nil {
		w.t.Errorf("%s: %v", expression, err)
		return nil
	}
	for i := range matrix { // Close reuses the points
		matrix[i].Floats = slices.Clone(matrix[i].Floats)
	}
	return slices.Clone(matrix)
}

// fires reports whether an alert's expression ever held for that long, as Prometheus counts it.
func (w *world) fires(expression string, hold time.Duration) bool {
	w.t.Helper()
	for _, series := range w.query(expression) {
		since := int64(math.MinInt64)
		for i, point := range series.Floats {
			if i == 0 || point.T-series.Floats[i-1].T > interval.Milliseconds() {
				since = point.T
			}
			if point.T-since >= hold.Milliseconds() {
				return true
			}
		}
	}
	return false
}
