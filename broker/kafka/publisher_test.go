package kafka_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"
	"github.com/twmb/franz-go/pkg/kmsg"

	"github.com/paidonce/idempotency/broker/brokertest"
	"github.com/paidonce/idempotency/broker/kafka"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/relay"
)

// messages returns messages of one key each, with a body of some bytes.
func messages(topic string, n, bodyBytes int) []message.Message {
	all := make([]message.Message, n)
	for i := range all {
		all[i] = message.Message{ID: fmt.Sprint("id", i), Topic: topic, Key: fmt.Append(nil, "key", i%7), Body: bytes.Repeat([]byte{'x'}, bodyBytes)}
	}
	return all
}

// count returns the numbers of messages that were confirmed, refused, and neither.
func count(results []error) (confirmed, refused, failed int) {
	for _, err := range results {
		switch {
		case err == nil:
			confirmed++
		case errors.Is(err, relay.ErrRefused):
			refused++
		default:
			failed++
		}
	}
	return confirmed, refused, failed
}

// keysInOrder fails the test if a key's messages are not in the order of their ids, or one is there
// behind one that is not.
func keysInOrder(t *testing.T, brokers []string, topic string, sent []message.Message, results []error) {
	t.Helper()
	kept := map[string][]string{}
	for _, all := range read(t, brokers, topic) {
		for _, d := range all {
			kept[string(d.Key)] = append(kept[string(d.Key)], d.ID)
		}
	}
	want := map[string][]string{}
	for i, m := range sent {
		if results[i] == nil {
			want[string(m.Key)] = append(want[string(m.Key)], m.ID)
		}
	}
	for key, ids := range want {
		if fmt.Sprint(ids) != fmt.Sprint(kept[key]) {
			t.Errorf("%s: %v are kept, %v were confirmed", key, kept[key], ids)
		}
	}
}

// Kafka refuses a request as a whole if it is larger than the topic allows. The messages in it are
// all published, and only the one that is too large itself is refused.
func TestMessagesAreNotRefusedForTheSizeOfTheirBatch(t *testing.T) {
	t.Parallel()
	f := startBroker(t)
	topic := newTopic()
	createTopic(t, f.brokers, topic, map[string]*string{"max.message.bytes": kadm.StringPtr("5000")})
	sent := messages(topic, 100, 1000)
	for i := range sent { // which can't be compressed away
		sent[i].Body = randomBytes(t, 1000)
	}
	p := publisher(t, f.brokers, new(brokertest.Network))
	results := p.Publish(t.Context(), sent)
	if confirmed, _, _ := count(results); confirmed != len(sent) {
		t.Fatalf("%d of %d are confirmed; the first: %v", confirmed, len(sent), results[0])
	}
	keysInOrder(t, f.brokers, topic, sent, results)

	topic2 := newTopic()
	createTopic(t, f.brokers, topic2, map[string]*string{"max.message.bytes": kadm.StringPtr("5000")})
	for i := range sent {
		sent[i].Topic = topic2
	}
	sent[50].Body = randomBytes(t, 6000)
	results = p.Publish(t.Context(), sent)
	confirmed, refused, failed := count(results)
	if behind := 7; confirmed != 100-1-behind || refused != 1 || failed != behind || !errors.Is(results[50], relay.ErrRefused) {
		t.Errorf("%d confirmed, %d refused, %d failed", confirmed, refused, failed)
	}
	keysInOrder(t, f.brokers, topic2, sent, results)
}

// The limit of a record, from both sides: a record within it is taken by the library and the broker
// too.
func TestRecordBytesMax(t *testing.T) {
	t.Parallel()
	f := startBroker(t)
	topic := newTopic()
	createTopic(t, f.brokers, topic, nil)
	p := publisher(t, f.brokers, new(brokertest.Network))
	m := message.Message{ID: strings.Repeat("i", 36), Topic: topic, Key: bytes.Repeat([]byte{'k'}, message.KeyBytesMax), Body: randomBytes(t, message.BodyBytesMax), Header: map[string][]string{}}
	left := kafka.RecordBytesMax - 100 - len(m.Key) - len(m.Body)
	for i := 0; left > 0; i++ { // short headers need the most bytes around them
		name := fmt.Sprintf("h%05d", i)
		value := strings.Repeat("v", max(min(left-len(name)-10, 6), 0))
		if left -= len(name) + len(value) + 10; left < 16 {
			value += strings.Repeat("v", left)
			left = 0
		}
		m.Header[name] = []string{value}
	}
	if results := p.Publish(t.Context(), []message.Message{m}); results[0] != nil {
		t.Errorf("at the limit: %v", results[0])
	}
	m.Header["h00000"][0] += "v"
	results := p.Publish(t.Context(), []message.Message{m})
	if err := results[0]; !errors.Is(err, relay.ErrRefused) || !strings.Contains(err.Error(), "over the limit of 1000000") {
		t.Errorf("over the limit: %v", err)
	}
	if n := len(records(t, f.brokers, topic)); n != 1 {
		t.Errorf("%d records are kept", n)
	}
}

// The producer is idempotent: if the broker has kept a message, and its answer does not confirm
// that, the library sends it again, and the broker keeps one.
func TestRepeatedRequestIsKeptOnce(t *testing.T) {
	t.Parallel()
	for _, answer := range []*kerr.Error{kerr.NotEnoughReplicasAfterAppend, kerr.RequestTimedOut} {
		f := startFake(t)
		topic := newTopic()
		createTopic(t, f.brokers, topic, nil)
		f.now().Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Topic: topic, Err: answer, Count: 4})
		sent := messages(topic, 20, 10)
		results := publisher(t, f.brokers, new(brokertest.Network)).Publish(t.Context(), sent)
		if confirmed, _, _ := count(results); confirmed != len(sent) {
			t.Errorf("%v: %d confirmed", answer, confirmed)
		}
		if n := len(records(t, f.brokers, topic)); n != len(sent) {
			t.Errorf("%v: %d messages are kept", answer, n)
		}
	}
}

// Missing rights are an operator's to grant: no message is refused because of them, or because of
// an error of the broker that passes.
func TestOnlyWhatStaysWrongIsRefused(t *testing.T) {
	t.Parallel()
	f := startFake(t)
	topic := newTopic()
	createTopic(t, f.brokers, topic, nil)
	p := publisher(t, f.brokers, new(brokertest.Network))
	for _, c := range []struct {
		err     *kerr.Error
		refused bool
	}{
		{kerr.TopicAuthorizationFailed, false},
		{kerr.ClusterAuthorizationFailed, false},
		{kerr.KafkaStorageError, false}, // the library tries again
		{kerr.CorruptMessage, false},
		{kerr.InvalidTimestamp, false},
		{kerr.UnknownServerError, false},
		{kerr.InvalidRecord, true},
		{kerr.MessageTooLarge, true},
		{kerr.PolicyViolation, true},
		{kerr.InvalidTopicException, true},
	} {
		fault := f.now().Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Topic: topic, Err: c.err, Count: 1})
		err := p.Publish(t.Context(), messages(topic, 1, 10))[0]
		fault.Remove()
		if errors.Is(err, relay.ErrRefused) != c.refused || (err == nil) != (c.err == kerr.KafkaStorageError) {
			t.Errorf("%v: %v", c.err, err)
		}
		if err := p.Publish(t.Context(), messages(topic, 1, 10))[0]; err != nil {
			t.Errorf("after %v: %v", c.err, err)
		}
	}
}

// adding is a hook that runs while messages are added to the library.
type adding func()

func (a adding) OnProduceRecordBuffered(*kgo.Record) { a() }

// Nothing is sent until all messages of a batch are added: otherwise the broker could refuse one
// while a later one of its key is still being added, which would be kept.
func TestNothingIsSentWhileMessagesAreAdded(t *testing.T) {
	t.Parallel()
	f := startFake(t)
	topic := newTopic()
	createTopic(t, f.brokers, topic, nil)
	var requests *kfake.FaultHandle
	client, err := kafka.Connect(f.brokers, &kafka.Options{Kgo: []kgo.Opt{kgo.WithHooks(adding(func() {
		if requests != nil {
			time.Sleep(5 * time.Millisecond) // in which a request would arrive
			if n := requests.Hits(); n != 0 {
				t.Errorf("%d requests arrived", n)
			}
		}
	}))}})
	if err != nil {
		t.Fatal(err)
	}
	p := client.Publisher()
	defer p.Close()
	publishAll := func() {
		if confirmed, _, _ := count(p.Publish(t.Context(), messages(topic, 20, 10))); confirmed != 20 {
			t.Errorf("%d confirmed", confirmed)
		}
	}
	publishAll()
	requests = f.now().Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Observe: true, Count: -1})
	publishAll()
	if requests.Hits() == 0 {
		t.Error("no request arrived in the end")
	}
}

// A key or body is in no error, whatever the broker says.
func TestErrorsQuoteNoMessage(t *testing.T) {
	t.Parallel()
	f := startFake(t)
	topic := newTopic()
	createTopic(t, f.brokers, topic, nil)
	p := publisher(t, f.brokers, new(brokertest.Network))
	for _, refusal := range []*kerr.Error{kerr.InvalidRecord, kerr.TopicAuthorizationFailed} {
		f.now().Fault(kfake.Fault{Keys: []kmsg.Key{kmsg.Produce}, Topic: topic, Err: refusal, Count: 2})
		for _, err := range p.Publish(t.Context(), []message.Message{
			{ID: "1", Topic: topic, Key: []byte("secret"), Body: []byte("secret")},
			{ID: "2", Topic: topic, Key: []byte("secret"), Body: []byte("secret")},
			{ID: "3", Topic: topic, Key: []byte("secret"), Body: bytes.Repeat([]byte("secret"), message.BodyBytesMax)},
		}) {
			if err == nil || strings.Contains(err.Error(), "secret") {
				t.Errorf("%v: %v", refusal, err)
			}
		}
	}
}

// A topic that was deleted is refused, and one that was recreated under its name takes messages.
func TestPublishToARecreatedTopic(t *testing.T) {
	t.Parallel()
	f := startBroker(t)
	topic := newTopic()
	createTopic(t, f.brokers, topic, nil)
	p := publisher(t, f.brokers, new(brokertest.Network))
	sent := messages(topic, 50, 10)
	if confirmed, _, _ := count(p.Publish(t.Context(), sent)); confirmed != len(sent) {
		t.Fatalf("%d confirmed", confirmed)
	}
	if deleted, err := kadm.NewClient(admin(t, f.brokers)).DeleteTopic(t.Context(), topic); err != nil || deleted.Err != nil {
		t.Fatal(err, deleted.Err)
	}
	if confirmed, refused, failed := count(p.Publish(t.Context(), sent)); refused != 7 || failed != len(sent)-7 {
		t.Errorf("without the topic: %d confirmed, %d refused, %d failed", confirmed, refused, failed)
	}
	createTopic(t, f.brokers, topic, nil)
	results := p.Publish(t.Context(), sent)
	if confirmed, _, _ := count(results); confirmed != len(sent) {
		t.Errorf("with a new topic: %d confirmed; the first: %v", confirmed, results[0])
	}
	keysInOrder(t, f.brokers, topic, sent, results)
}

// After Close nothing is published, and a Publish under way ends.
func TestPublisherClose(t *testing.T) {
	t.Parallel()
	f := startBroker(t)
	topic := newTopic()
	createTopic(t, f.brokers, topic, nil)
	p := publisher(t, f.brokers, new(brokertest.Network))
	if err := p.Publish(t.Context(), messages(topic, 1, 1))[0]; err != nil {
		t.Fatal(err)
	}
	p.Close()
	p.Close()
	if err := p.Publish(t.Context(), messages(topic, 1, 1))[0]; err == nil || errors.Is(err, relay.ErrRefused) {
		t.Errorf("result %v", err)
	}
	if n := len(records(t, f.brokers, topic)); n != 1 {
		t.Errorf("%d records", n)
	}
}

func TestConnectNeedsBrokers(t *testing.T) {
	t.Parallel()
	if _, err := kafka.Connect(nil, nil); err == nil {
		t.Error("no broker, no error")
	}
	if _, err := kafka.Connect([]string{"a:port"}, nil); err == nil {
		t.Error("no address, no error")
	}
}

func TestPublishNothing(t *testing.T) {
	t.Parallel()
	client, err := kafka.Connect([]string{"127.0.0.1:1"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	p := client.Publisher()
	defer p.Close()
	if results := p.Publish(context.Background(), nil); len(results) != 0 {
		t.Errorf("%v", results)
	}
}
