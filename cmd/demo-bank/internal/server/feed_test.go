package server

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/paidonce/idempotency/broker/kafka"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/events"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// fed waits until no message is under way, and returns the audit.
func (b *bundle) fed() bank.Audit {
	b.t.Helper()
	return b.auditUntil("no message is under way", func(a bank.Audit) bool {
		return a.OutboxPending == 0 && a.ProjectionLag != nil && *a.ProjectionLag == 0
	})
}

// auditUntil waits for an audit that meets a condition.
func (b *bundle) auditUntil(what string, met func(bank.Audit) bool) bank.Audit {
	b.t.Helper()
	deadline := time.Now().Add(settleMax)
	for {
		audit := b.audit()
		switch {
		case met(audit):
			return audit
		case time.Now().After(deadline):
			text, _ := json.Marshal(audit)
			b.t.Fatalf("it is not so that %s: %s", what, text)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// until waits for a condition.
func until(t *testing.T, what string, met func() bool) {
	t.Helper()
	for deadline := time.Now().Add(settleMax); !met(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it is not so that %s", what)
		}
	}
}

// expectProjected requires an audit that is ok with nothing wrong in the projection.
func expectProjected(t *testing.T, a bank.Audit) {
	t.Helper()
	if !a.OK || a.ProjectionMissing != 0 || a.ProjectionDoubled != 0 || a.ProjectionMismatches != 0 {
		text, _ := json.Marshal(a)
		t.Errorf("audit is %s: want a projection that matches the books", text)
	}
}

// moved makes a transfer, an order and a top-up, and returns the answers.
func (b *bundle) moved() []reply {
	b.t.Helper()
	replies := []reply{
		b.keyed(bank.TransfersPath, `{"from":"alice","to":"bob","amount":1250}`),
		b.keyed("/v1/orders", `{"account":"alice","sku":"mug","quantity":2}`),
		b.keyed(bank.TopUpsPath, `{"account":"bob","card":"tok","amount":500}`),
	}
	for _, r := range replies {
		if r.status != http.StatusCreated {
			b.t.Errorf("a move is answered with %d %s", r.status, r.body)
		}
	}
	return replies
}

type statement struct {
	Account       string
	BalanceChange int64 `json:"balance_change"`
	Entries       []struct {
		Transfer string
		Amount   int64
		At       time.Time
	}
}

func (b *bundle) statement(account string) (s statement) {
	b.t.Helper()
	b.into(b.get(bank.StatementsPath+account), &s)
	return s
}

// read returns the first records of the topic.
func read(t *testing.T, brokers []string, number int) []*kgo.Record {
	t.Helper()
	client, err := kgo.NewClient(kgo.SeedBrokers(brokers...), kgo.ConsumeTopics(bank.Topic), kgo.ConsumeResetOffset(kgo.NewOffset().AtStart()))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(t.Context(), settleMax)
	defer cancel()
	var records []*kgo.Record
	for len(records) < number && ctx.Err() == nil {
		records = append(records, client.PollFetches(ctx).Records()...)
	}
	if len(records) < number {
		t.Fatalf("the topic has %d records, want %d", len(records), number)
	}
	return records
}

// again publishes copies of records, as if a relay had died after the broker's confirmation.
func again(t *testing.T, brokers []string, records []*kgo.Record) {
	t.Helper()
	client, err := kgo.NewClient(kgo.SeedBrokers(brokers...))
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for _, r := range records {
		if err := client.ProduceSync(t.Context(), &kgo.Record{Topic: r.Topic, Key: r.Key, Value: r.Value, Headers: r.Headers}).FirstErr(); err != nil {
			t.Fatal(err)
		}
	}
}

func headerOf(r *kgo.Record, name string) string {
	for _, h := range r.Headers {
		if h.Key == name {
			return string(h.Value)
		}
	}
	return ""
}

// TestEachMoveIsPublishedAndProjected: a transfer, an order and a top-up publish one message each,
// with the account that pays or is topped up as its key, and a retry publishes none. Statements and
// mails follow from the messages.
func TestEachMoveIsPublishedAndProjected(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const key = "the-transfer"
	transfer := b.send(http.MethodPost, bank.TransfersPath, `{"from":"alice","to":"bob","amount":1250}`, "Idempotency-Key", key)
	b.send(http.MethodPost, bank.TransfersPath, `{"from":"alice","to":"bob","amount":1250}`, "Idempotency-Key", key)
	order := b.keyed("/v1/orders", `{"account":"alice","sku":"mug","quantity":2}`)
	topUp := b.keyed(bank.TopUpsPath, `{"account":"bob","card":"tok","amount":500}`)
	for _, refused := range []reply{
		b.keyed(bank.TransfersPath, `{"from":"alice","to":"bob","amount":999999999}`),
		b.send(http.MethodPost, bank.UnprotectedTransfersPath, `{"from":"carol","to":"bob","amount":1}`),
	} {
		if refused.status < 400 {
			t.Errorf("answer is %d", refused.status)
		}
	}
	audit := b.fed()
	expectProjected(t, audit)
	if audit.MessagesDead != 0 || audit.MessagesDuplicate != 0 {
		t.Errorf("audit is %+v", audit)
	}
	b.auditUntil("both consumers have handled all three messages", func(a bank.Audit) bool { return a.MessagesConsumed == 6 })
	until(t, "the metrics show the messages", func() bool {
		scraped := string(b.get("/metrics").body)
		return strings.Contains(scraped, `idempotency_messages_published_total{result="published"} 3`) &&
			strings.Contains(scraped, `idempotency_messages_consumed_total{consumer="statements",outcome="executed"} 3`)
	})

	byType := map[string]*kgo.Record{}
	records := read(t, b.brokers, 3)
	for _, r := range records {
		var kind struct{ Type string }
		if err := json.Unmarshal(r.Value, &kind); err != nil {
			t.Fatal(err)
		}
		byType[kind.Type] = r
	}
	if len(records) != 3 {
		t.Errorf("the topic has %d records", len(records))
	}
	for kind, want := range map[string]struct {
		answer  reply
		account string
	}{"transfer": {transfer, "alice"}, "order": {order, "alice"}, "topup": {topUp, "bob"}} {
		r := byType[kind]
		if r == nil {
			t.Errorf("there is no message about the %s", kind)
			continue
		}
		body := `{"type":"` + kind + `",` + strings.TrimSpace(string(want.answer.body))[1:]
		if string(r.Value) != body || string(r.Key) != want.account || uuid.Validate(headerOf(r, kafka.IDHeader)) != nil {
			t.Errorf("message is %s under %s with id %q: want %s under %s", r.Value, r.Key, headerOf(r, kafka.IDHeader), body, want.account)
		}
	}

	var made struct {
		ID        string
		CreatedAt time.Time `json:"created_at"`
	}
	b.into(transfer, &made)
	if s := b.statement("bob"); s.Account != "bob" || s.BalanceChange != 1750 || len(s.Entries) != 2 || s.Entries[0].Transfer != made.ID || s.Entries[0].Amount != 1250 || !s.Entries[0].At.Equal(made.CreatedAt) {
		t.Errorf("bob's statement is %+v", s)
	}
	if s := b.statement("alice"); s.BalanceChange != -3750 || b.balance("alice") != 10_000_000-3750 || len(s.Entries) != 2 {
		t.Errorf("alice's statement is %+v", s)
	}
	if s := b.statement("merchant"); s.BalanceChange != 2500 {
		t.Errorf("the merchant's statement is %+v", s)
	}
	if r := b.get(bank.StatementsPath + "acct-0001"); r.status != http.StatusOK || !strings.Contains(string(r.body), `"entries":[]`) {
		t.Errorf("a statement without entries is %d %s", r.status, r.body)
	}
	expectProblem(t, b.get(bank.StatementsPath+"nobody"), 404, "account-not-found")

	mails := b.listed("mails")
	if len(mails) != 1 || mails[0].To != "alice" || !strings.Contains(mails[0].Text, made.ID) || mails[0].Key == "" {
		t.Errorf("the mails are %+v: want one about the transfer", mails)
	}
}

// Mode 6: a message that is published twice under one id is projected and mailed once. So is one
// that is delivered again.
func TestAMessagePublishedTwiceIsHandledOnce(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.moved()
	b.fed()
	again(t, b.brokers, read(t, b.brokers, 3))
	audit := b.auditUntil("both consumers have dropped three copies", func(a bank.Audit) bool { return a.MessagesDuplicate == 6 })
	expectProjected(t, audit)
	expectProjected(t, b.fed())
	if mails := b.listed("mails"); len(mails) != 1 || audit.MessagesConsumed != 6 {
		t.Errorf("%d mails were sent, %d messages handled", len(mails), audit.MessagesConsumed)
	}
}

// TestAuditFindsWhatIsWrongInTheProjection plants each error in the projection.
func TestAuditFindsWhatIsWrongInTheProjection(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.moved()
	expectProjected(t, b.fed())
	for _, one := range []struct {
		name, plant string
		missing     int64
		doubled     int64
		mismatches  int64
	}{
		{"a transfer that is missing", `DELETE FROM demo_statements.entries WHERE abs(amount) = 1250`, 1, 0, 2},
		{"half of one", `DELETE FROM demo_statements.entries WHERE amount = -1250`, 1, 0, 1},
		{"a top-up that is there twice", `INSERT INTO demo_statements.entries (account, transfer, amount, at) SELECT account, transfer, amount, at FROM demo_statements.entries WHERE amount = 500`, 0, 1, 1},
		{"an order on another account", `UPDATE demo_statements.entries SET account = 'acct-0001' WHERE amount = -2500`, 1, 0, 2},
		{"an entry of nothing", `INSERT INTO demo_statements.entries (account, transfer, amount, at) VALUES ('alice', '1', 5, now())`, 0, 0, 1},
	} {
		t.Run(one.name, func(t *testing.T) {
			b.exec(`CREATE TABLE saved AS TABLE demo_statements.entries`)
			defer func() {
				b.exec(`TRUNCATE demo_statements.entries`)
				b.exec(`INSERT INTO demo_statements.entries OVERRIDING SYSTEM VALUE TABLE saved`)
				b.exec(`DROP TABLE saved`)
			}()
			b.exec(one.plant)
			if a := b.audit(); a.OK || a.ProjectionMissing != one.missing || a.ProjectionDoubled != one.doubled || a.ProjectionMismatches != one.mismatches {
				text, _ := json.Marshal(a)
				t.Errorf("audit is %s: want %+v", text, one)
			}
		})
	}
	expectProjected(t, b.audit())
	expectProblem(t, b.get(bank.MessagesPath+"?state=other"), 400, "invalid-page")
}

// Mode 21: a message that its consumer can't read is dead at once. The messages of its account wait
// behind it, those of others go on, and nothing of that makes the books wrong. A redrive keeps the
// id (Mode 23).
func TestPoisonBlocksOnlyItsAccount(t *testing.T) {
	t.Parallel()
	b := setup(t)
	poison := b.send(http.MethodPost, bank.PoisonPath, `{"key":"alice"}`)
	object := expectFields(t, poison.body, "message_id:text")
	id, _ := object["message_id"].(string)
	if poison.status != http.StatusAccepted {
		t.Fatalf("answer is %d %s", poison.status, poison.body)
	}
	dead := b.parkedUntil("?state=dead&consumer=statements", 1)[0]
	if dead.ID != id || dead.Consumer != bank.StatementsConsumer || dead.State != "dead" || dead.Key != "alice" || dead.Topic != bank.Topic || dead.Error == "" {
		t.Errorf("the dead message is %+v", dead)
	}
	if others := b.parked("?consumer=notices"); len(others) != 0 {
		t.Errorf("the other consumer has parked %+v", others)
	}
	b.keyed(bank.TransfersPath, `{"from":"alice","to":"bob","amount":7}`)
	b.keyed(bank.TransfersPath, `{"from":"acct-0001","to":"bob","amount":5}`)
	if behind := b.parkedUntil("?state=behind", 1)[0]; behind.Key != "alice" || behind.Consumer != bank.StatementsConsumer {
		t.Errorf("the message behind is %+v", behind)
	}
	audit := b.fed()
	expectProjected(t, audit)
	if s := b.statement("bob"); audit.MessagesDead != 1 || s.BalanceChange != 5 {
		t.Errorf("%d messages are dead; bob's statement is %+v", audit.MessagesDead, s)
	}

	redrive := func(consumer, id string) reply {
		return b.send(http.MethodPost, bank.MessagesPath+"/"+consumer+"/"+id+"/redrive", "")
	}
	expectProblem(t, redrive("notices", id), 404, "message-not-found")
	expectProblem(t, redrive("nobody", id), 404, "message-not-found")
	expectProblem(t, b.get(bank.MessagesPath+"?consumer=nobody"), 400, "invalid-page")
	expectProblem(t, redrive("statements", b.parked("?state=behind")[0].ID), 409, "message-behind")
	if r := redrive("statements", id); r.status != http.StatusAccepted {
		t.Fatalf("redrive: %d %s", r.status, r.body)
	}
	until(t, "the redriven message, which was waiting, is dead again under its id", func() bool {
		dead := b.parked("?state=dead")
		return len(dead) == 1 && dead[0].ID == id
	})
	if acts := b.count(`SELECT count(*) FROM idempotency_audit WHERE action = 'redrive' AND key = $1`, id); acts != 1 {
		t.Errorf("%d acts are in the audit table, want the redrive", acts)
	}
	// Once no message is in front of them, those behind are handled.
	b.exec(`DELETE FROM message_parked WHERE message_id = $1`, id)
	until(t, "nothing is parked", func() bool { return len(b.parked("")) == 0 })
	expectProjected(t, b.fed())
	if s := b.statement("bob"); s.BalanceChange != 12 {
		t.Errorf("bob's statement is %+v", s)
	}
	expectProblem(t, b.send(http.MethodPost, bank.PoisonPath, `{"key":""}`), 400, "invalid-poison")
	expectProblem(t, b.send(http.MethodPost, bank.PoisonPath, `{"key":"`+strings.Repeat("k", 4097)+`"}`), 400, "invalid-poison")
	if r := b.send(http.MethodPost, bank.PoisonPath, `{"key":"`+strings.Repeat("k", 4096)+`"}`); r.status != http.StatusAccepted {
		t.Errorf("the longest key: %d %s", r.status, r.body)
	}
}

func (b *bundle) parked(query string) []bank.ParkedMessage {
	b.t.Helper()
	var list struct{ Messages []bank.ParkedMessage }
	b.into(b.get(bank.MessagesPath+query), &list)
	return list.Messages
}

func (b *bundle) parkedUntil(query string, number int) (list []bank.ParkedMessage) {
	b.t.Helper()
	until(b.t, fmt.Sprintf("%d messages are parked (%s)", number, query), func() bool {
		list = b.parked(query)
		return len(list) == number
	})
	return list
}

// cluster starts a Kafka of its own, for a test that breaks it or has several processes on it.
func cluster(t *testing.T) *kfake.Cluster {
	t.Helper()
	c, err := kfake.NewCluster(kfake.NumBrokers(1), kfake.BrokerConfigs(map[string]string{"group.initial.rebalance.delay.ms": "0"}))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// inBackground runs a process beside the bank until stop is called, or the test ends.
func inBackground(t *testing.T, run func(context.Context) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("it ended with %v", err)
			}
		case <-time.After(startTimeout):
			t.Error("it did not end")
		}
	})
	t.Cleanup(stop)
	return stop
}

// TestRelayAndConsumersApart: without a relay messages stay in the outbox, and without consumers at
// the broker. A relay and consumers in processes of their own find the broker and the processor by
// the bank's database.
func TestRelayAndConsumersApart(t *testing.T) {
	t.Parallel()
	database := pgtest.Database(t)
	b := setupOn(t, database, func(c *Config) { c.Brokers, c.NoRelay, c.NoConsumers = cluster(t).ListenAddrs(), true, true })
	b.moved()
	if a := b.audit(); a.OutboxPending != 3 || !a.OK {
		t.Errorf("audit without a relay is %+v", a)
	}
	config := ApartConfig{DatabaseURL: database, Addr: "127.0.0.1:0"}
	inBackground(t, func(ctx context.Context) error { return Relay(ctx, config) })
	a := b.auditUntil("the messages are at the broker", func(a bank.Audit) bool {
		return a.OutboxPending == 0 && a.ProjectionLag != nil && *a.ProjectionLag == 3
	})
	if !a.OK || a.ProjectionMissing != 3 {
		t.Errorf("audit without consumers is %+v", a)
	}
	inBackground(t, func(ctx context.Context) error { return Consume(ctx, config) })
	expectProjected(t, b.fed())
	b.auditUntil("the mail is sent", func(a bank.Audit) bool { return a.MessagesConsumed == 6 })
	if mails := b.listed("mails"); len(mails) != 1 {
		t.Errorf("%d mails were sent", len(mails))
	}
}

// TestConsumersApartStartFailsInOneLine: the error names what is missing, and the remedy.
func TestConsumersApartStartFailsInOneLine(t *testing.T) {
	t.Parallel()
	for _, one := range []struct {
		config ApartConfig
		names  string
	}{
		{ApartConfig{Addr: "127.0.0.1:0"}, "--database-url"},
		{ApartConfig{Addr: "127.0.0.1:0", DatabaseURL: "postgres://nobody@127.0.0.1:1/none"}, "mend --database-url"},
		{ApartConfig{Addr: "127.0.0.1:0", DatabaseURL: pgtest.Database(t)}, "--brokers"},
		{ApartConfig{Addr: "127.0.0.1:0", DatabaseURL: pgtest.Database(t), Brokers: []string{"127.0.0.1:1"}, PSP: "nonsense"}, "--psp"},
		{ApartConfig{Addr: "nonsense", DatabaseURL: pgtest.Database(t)}, "--addr"},
	} {
		if err := Consume(t.Context(), one.config); err == nil || !strings.Contains(err.Error(), one.names) || strings.Contains(err.Error(), "\n") || strings.Contains(err.Error(), "embedded") {
			t.Errorf("%+v: %v", one.config, err)
		}
	}
}

// Mode 13 and its reverse: if the broker does not take the commit of a consumer without an inbox,
// the next one repeats the effect, and a copy counts as a new message. With an inbox there is one
// effect.
func TestOnlyAnInboxHandlesOnce(t *testing.T) {
	t.Parallel()
	for _, naive := range []bool{true, false} {
		t.Run(fmt.Sprintf("naive=%t", naive), func(t *testing.T) {
			t.Parallel()
			c := cluster(t)
			var refuse atomic.Bool
			var refused atomic.Int64
			c.ControlKey(kmsg.OffsetCommit.Int16(), func(request kmsg.Request) (kmsg.Response, error, bool) {
				c.KeepControl()
				commit, ok := request.(*kmsg.OffsetCommitRequest)
				if !ok || !refuse.Load() {
					return nil, nil, false
				}
				refused.Add(1)
				response := commit.ResponseKind().(*kmsg.OffsetCommitResponse)
				for _, topic := range commit.Topics {
					answer := kmsg.NewOffsetCommitResponseTopic()
					answer.Topic, answer.TopicID = topic.Topic, topic.TopicID
					for _, p := range topic.Partitions {
						partition := kmsg.NewOffsetCommitResponseTopicPartition()
						partition.Partition, partition.ErrorCode = p.Partition, kerr.UnknownServerError.Code
						answer.Partitions = append(answer.Partitions, partition)
					}
					response.Topics = append(response.Topics, answer)
				}
				return response, nil, true
			})
			database := pgtest.Database(t)
			b := setupOn(t, database, func(c2 *Config) { c2.Brokers, c2.NoConsumers = c.ListenAddrs(), true })
			consume := func() (stop func()) {
				return inBackground(t, func(ctx context.Context) error {
					return Consume(ctx, ApartConfig{DatabaseURL: database, Addr: "127.0.0.1:0", NoInbox: naive})
				})
			}
			// It is as if the first process died before its commit at the broker.
			refuse.Store(true)
			stop := consume()
			b.moved()
			b.auditUntil("all is handled", func(a bank.Audit) bool { return a.MessagesConsumed == 6 && a.ProjectionMissing == 0 })
			until(t, "a commit was refused", func() bool { return !naive || refused.Load() > 0 })
			stop()
			refuse.Store(false)
			consume()
			again(t, b.brokers, read(t, b.brokers, 3)[:1])
			if !naive {
				a := b.auditUntil("the copy is dropped by both consumers", func(a bank.Audit) bool { return a.MessagesDuplicate >= 2 })
				expectProjected(t, a)
				expectProjected(t, b.fed())
				if mails := b.listed("mails"); len(mails) != 1 {
					t.Errorf("%d mails were sent", len(mails))
				}
				return
			}
			a := b.auditUntil("the projection is judged", func(a bank.Audit) bool {
				return a.ProjectionDoubled == 3 && a.ProjectionLag != nil && *a.ProjectionLag == 0
			})
			if a.OK || a.ProjectionMismatches == 0 || a.MessagesDuplicate != 0 {
				t.Errorf("audit is %+v: want three doubles", a)
			}
			until(t, "the mail is sent twice", func() bool { return len(b.listed("mails")) >= 2 })
		})
	}
}

// TestABrokerInsideThatIsGoneLosesNothing: a bank on a database of its own keeps its broker's log in
// memory. The next bank publishes the messages that were not consumed again, with the same ids.
func TestABrokerInsideThatIsGoneLosesNothing(t *testing.T) {
	t.Parallel()
	database := pgtest.Database(t)
	first := setupOn(t, database)
	first.moved()
	expectProjected(t, first.fed())
	first.auditUntil("both consumers are done", func(a bank.Audit) bool { return a.MessagesConsumed == 6 })
	mails := len(first.listed("mails"))
	first.stop()

	second := setupOn(t, database, func(c *Config) { c.NoConsumers = true })
	second.moved()
	second.auditUntil("three messages are at the broker", func(a bank.Audit) bool {
		return a.OutboxPending == 0 && a.ProjectionLag != nil && *a.ProjectionLag == 3
	})
	records := read(t, second.brokers, 3)
	second.stop()

	third := setupOn(t, database)
	third.auditUntil("all is handled", func(a bank.Audit) bool { return a.MessagesConsumed == 12 })
	a := third.fed()
	expectProjected(t, a)
	if a.MessagesDuplicate != 0 || mails != 1 || len(third.listed("mails")) != 1 {
		t.Errorf("%d copies; %d and %d mails, of processors of their own", a.MessagesDuplicate, mails, len(third.listed("mails")))
	}
	ids := func(records []*kgo.Record) (ids []string) {
		for _, r := range records {
			ids = append(ids, headerOf(r, kafka.IDHeader)+" "+string(r.Value))
		}
		slices.Sort(ids)
		return ids
	}
	if was, is := ids(records), ids(read(t, third.brokers, 3)); !slices.Equal(was, is) {
		t.Errorf("the messages were\n%q\nand are\n%q", was, is)
	}
}

// TestOnlyWhatWasThereAtTheStartIsPublishedAgain: the messages of moves that are made later are on
// their way, although they have left the outbox and are not handled yet.
func TestOnlyWhatWasThereAtTheStartIsPublishedAgain(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *Config) { c.NoRelay, c.NoConsumers = true, true })
	broker, err := events.Start("", 0, "", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(broker.Close)
	books := bank.New(b.db, nil, time.Hour, slog.New(slog.DiscardHandler))
	books.Feed(broker, nil)
	relayed := func() {
		b.moved()
		b.exec(`DELETE FROM message_outbox`)
	}
	relayed()
	republish, err := books.Lost(t.Context(), time.Hour, bank.StatementsConsumer, bank.NoticesConsumer)
	if err != nil {
		t.Fatal(err)
	}
	relayed()
	if published, err := republish(t.Context()); published != 3 || err != nil {
		t.Errorf("%d messages are published again (%v), want the first three", published, err)
	}
}

// TestABrokerInsideIsKeptInTheDataFolder: the next bank goes on where the last one stopped.
func TestABrokerInsideIsKeptInTheDataFolder(t *testing.T) {
	t.Parallel()
	database, dir := pgtest.Database(t), t.TempDir()
	kept := func(c *Config) { c.DataDir = dir }
	first := setupOn(t, database, kept)
	first.moved()
	first.auditUntil("both consumers are done", func(a bank.Audit) bool { return a.MessagesConsumed == 6 })
	first.stop()
	second := setupOn(t, database, kept, func(c *Config) { c.NoConsumers = true })
	second.moved()
	second.auditUntil("three messages are at the broker", func(a bank.Audit) bool {
		return a.OutboxPending == 0 && a.ProjectionLag != nil && *a.ProjectionLag == 3
	})
	second.stop()
	third := setupOn(t, database, kept)
	third.moved()
	a := third.auditUntil("all is handled", func(a bank.Audit) bool { return a.MessagesConsumed == 18 })
	if a.MessagesDuplicate != 0 || first.brokers[0] != third.brokers[0] {
		t.Errorf("%d copies were dropped; the broker was at %s and is at %s", a.MessagesDuplicate, first.brokers, third.brokers)
	}
	expectProjected(t, third.fed())
	read(t, third.brokers, 9)
}

// TestTwoBanksWithBrokersOfTheirOwn: each relay may publish the other's messages, so neither bank
// judges the projection, which is right all the same.
func TestTwoBanksWithBrokersOfTheirOwn(t *testing.T) {
	t.Parallel()
	database := pgtest.Database(t)
	one, other := setupOn(t, database), setupOn(t, database)
	var group sync.WaitGroup
	for _, b := range []*bundle{one, other} {
		group.Go(func() {
			for range 10 {
				b.moved()
			}
		})
	}
	one.auditDuring(&group)
	a := one.auditUntil("all is handled", func(a bank.Audit) bool { return a.MessagesConsumed == 120 })
	expectProjected(t, a)
	if a.ProjectionLag != nil {
		t.Errorf("the lag is %d: want that it is not known", *a.ProjectionLag)
	}
}

// TestABankDoesNotJudgeWhatAnotherBrokerHas: only another bank runs a relay, with a broker of its
// own, so this bank can't know that the messages are on their way.
func TestABankDoesNotJudgeWhatAnotherBrokerHas(t *testing.T) {
	t.Parallel()
	database := pgtest.Database(t)
	one := setupOn(t, database, func(c *Config) { c.NoRelay = true })
	setupOn(t, database, func(c *Config) { c.NoConsumers = true })
	one.moved()
	a := one.auditUntil("the messages are at the other broker", func(a bank.Audit) bool { return a.OutboxPending == 0 })
	if !a.OK || a.ProjectionLag != nil || a.ProjectionMissing != 3 {
		t.Errorf("audit is %+v: want ok, with three moves that are missing so far", a)
	}
}

// TestNoticesWaitForTheProcessor: an outage of the mail service parks notices, and makes none of
// them dead. After it they are sent.
func TestNoticesWaitForTheProcessor(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.faults(`{"down":true}`)
	b.keyed(bank.TransfersPath, `{"from":"alice","to":"bob","amount":7}`)
	waiting := b.parkedUntil("?consumer=notices&state=waiting", 1)[0]
	if waiting.NotBefore == nil || waiting.Attempts != 0 {
		t.Errorf("the notice is %+v", waiting)
	}
	b.faults(`{"lose_reply":1}`) // a mail is sent, and the bank does not know it
	until(t, "the mail is sent", func() bool { return len(b.listed("mails")) == 1 })
	until(t, "the notice is handled", func() bool { return len(b.parked("?consumer=notices")) == 0 })
	if mails := b.listed("mails"); len(mails) != 1 {
		t.Errorf("%d mails were sent", len(mails))
	}
	expectProjected(t, b.fed())
}

// TestAMailThatIsAlwaysRefusedCounts: a 500 that the processor repeats to the mail's key is no outage,
// so the tries count, and the message will be dead in the end. Notices of other accounts go on.
func TestAMailThatIsAlwaysRefusedCounts(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.faults(`{"same_error":1}`)
	b.keyed(bank.TransfersPath, `{"from":"alice","to":"bob","amount":7}`)
	waiting := b.parkedUntil("?consumer=notices", 1)[0]
	if waiting.State != "waiting" || waiting.Attempts == 0 {
		t.Errorf("the notice is %+v: want one that waits, with attempts", waiting)
	}
	b.faults(`{}`)
	b.keyed(bank.TransfersPath, `{"from":"bob","to":"alice","amount":7}`)
	until(t, "the other account's mail is sent", func() bool { return len(b.listed("mails")) == 1 })
	expectProjected(t, b.fed())
}

// TestAMailServiceThatHangsHoldsFewConnections: while mails to four accounts, in several
// partitions, have no answer, the consumer holds no more connections than it may, and transfers are
// made.
func TestAMailServiceThatHangsHoldsFewConnections(t *testing.T) {
	t.Parallel()
	const pool = 16
	p := newHoldingProcessor(t, 0)
	b := setup(t, func(c *Config) { c.PSP, c.PoolSize = p.URL, pool })
	held := func() int {
		return b.count(`SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'idle in transaction'
			AND clock_timestamp() - state_change > interval '1 second' AND application_name <> $1`, testerName)
	}
	transfer := func(i int) {
		if r := b.keyed(bank.TransfersPath, fmt.Sprintf(`{"from":"acct-%04d","to":"bob","amount":7}`, i)); r.status != http.StatusCreated {
			t.Errorf("a transfer is answered with %d %s", r.status, r.body)
		}
	}
	for i := range 20 {
		transfer(i)
	}
	most := 0
	until(t, "a mail waits for its answer", func() bool { most = held(); return most > 0 })
	transfer(20)
	until(t, "three were waited for", func() bool {
		most = max(most, held())
		p.mu.Lock()
		defer p.mu.Unlock()
		return len(p.held) >= 3
	})
	if limit := events.AtOnce(pool); most > limit {
		t.Errorf("%d connections wait for mails, want at most %d", most, limit)
	}
	close(p.free)
	b.auditUntil("all notices are handled", func(a bank.Audit) bool {
		return a.OutboxPending == 0 && a.MessagesConsumed == 2*21
	})
}

// TestABankIsReadyWithoutItsBroker: a broker that is away delays messages, but no payment.
func TestABankIsReadyWithoutItsBroker(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *Config) { c.Brokers = []string{"127.0.0.1:1"} })
	if r := b.get("/readyz"); r.status != http.StatusOK {
		t.Errorf("/readyz is %d %s", r.status, r.body)
	}
	if r := b.keyed(bank.TransfersPath, `{"from":"alice","to":"bob","amount":7}`); r.status != http.StatusCreated {
		t.Errorf("a transfer is answered with %d %s", r.status, r.body)
	}
	if a := b.audit(); !a.OK || a.OutboxPending != 1 || a.ProjectionLag != nil {
		t.Errorf("audit is %+v", a)
	}
	expectProblem(t, b.send(http.MethodPost, bank.PoisonPath, `{"key":"alice"}`), 503, "broker-unavailable")
}

// TestAPortOfAnAddress: any text that a bank may have left as an address has a port, or 0.
func TestAPortOfAnAddress(t *testing.T) {
	t.Parallel()
	for address, want := range map[string]int{"127.0.0.1:9092": 9092, "": 0, "a": 0, "a:b": 0, "a:65536": 0, "a:65535": 65535, "a:1,b:2": 0, "a:-1": 0} {
		if got := events.Port(address); got != want {
			t.Errorf("the port of %q is %d, want %d", address, got, want)
		}
	}
}

// TestAnInstanceIsAProcessThatComesBack: only with a fixed port does the next process get the same
// name.
func TestAnInstanceIsAProcessThatComesBack(t *testing.T) {
	t.Parallel()
	one, other, none := events.Instance("127.0.0.1:8080"), events.Instance("127.0.0.1:8081"), events.Instance("127.0.0.1:0")
	if !strings.HasSuffix(one, "-127.0.0.1-8080") || one == other || none != "" {
		t.Errorf("the instances are %q, %q, %q", one, other, none)
	}
}
