package nats_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/paidonce/idempotency/broker/brokertest"
	"github.com/paidonce/idempotency/broker/nats"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/relay"
)

func publishOne(t *testing.T, p relay.Publisher, m message.Message) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	return p.Publish(ctx, []message.Message{m})[0]
}

func (b *broker) count(t *testing.T, topic string) (n int) {
	t.Helper()
	for _, all := range b.read(t, topic) {
		n += len(all)
	}
	return n
}

// The function from key to partition is frozen: if a key's partition changed, it would lose its
// order.
func TestPartitionsOfKeysNeverChange(t *testing.T) {
	t.Parallel()
	b := startBroker(t)
	topic := newTopic()
	b.createTopic(t, topic, nats.TopicOptions{Partitions: 8})
	p := b.publisher(t, nil)
	want := map[string]int32{"account-1": 6, "account-2": 3, "account-3": 4, "alice": 7, "bob": 2, "": 4, "\x00\xff": 5}
	for key := range want {
		if err := publishOne(t, p, message.Message{ID: "id of " + key[:min(len(key), 5)], Topic: topic, Key: []byte(key), Body: []byte("b")}); err != nil {
			t.Fatal(err)
		}
	}
	for number, all := range b.read(t, topic) {
		for _, d := range all {
			if want[string(d.Key)] != number {
				t.Errorf("key %q is in partition %d, not %d", d.Key, number, want[string(d.Key)])
			}
		}
	}
	for _, id := range []string{"1", "2", "3"} { // without a key, copies come together by their id
		for range 2 {
			if err := publishOne(t, p, message.Message{ID: id, Topic: topic}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if n := p.Duplicates(); n != 3 {
		t.Errorf("%d duplicates", n)
	}
}

// A relay that died between the confirmation and the deletion publishes a message
// again, under the id that it had. The server drops the copy, and confirms it: it must not count as
// failed.
func TestCopiesWithinTheWindowAreConfirmedAndCounted(t *testing.T) {
	t.Parallel()
	b := startBroker(t)
	topic := newTopic()
	b.createTopic(t, topic, nats.TopicOptions{})
	m := message.Message{ID: "5f0b9fbc-0d31-8a52-9b11-f1d3a7a2b1c4", Topic: topic, Key: []byte("k"), Body: []byte("b")}
	for _, want := range []int64{0, 1} {
		p := b.publisher(t, nil) // of another relay
		if err := publishOne(t, p, m); err != nil {
			t.Fatal(err)
		}
		if n := p.Duplicates(); n != want {
			t.Errorf("%d duplicates, want %d", n, want)
		}
	}
	if n := b.count(t, topic); n != 1 {
		t.Errorf("%d messages are kept", n)
	}
}

// After the window the stream keeps a copy too. Its id is the same, so a consumer drops it:
// see TestEachMessageHasOneEffect.
func TestCopiesBehindTheWindowAreKeptUnderTheirID(t *testing.T) {
	t.Parallel()
	b := startBroker(t)
	topic := newTopic()
	b.createTopic(t, topic, nats.TopicOptions{Stream: jetstream.StreamConfig{Duplicates: 100 * time.Millisecond}})
	p := b.publisher(t, nil)
	eventually(t, "a copy is kept", func() bool {
		time.Sleep(150 * time.Millisecond)
		if err := publishOne(t, p, message.Message{ID: "1", Topic: topic, Key: []byte("k")}); err != nil {
			t.Fatal(err)
		}
		return b.count(t, topic) == 2
	})
	for _, all := range b.read(t, topic) {
		for _, d := range all {
			if d.ID != "1" {
				t.Errorf("id %q", d.ID)
			}
		}
	}
}

// A message that the server will never take is refused. One that it may take later is not.
func TestOnlyWhatStaysWrongIsRefused(t *testing.T) {
	t.Parallel()
	const payloadMax, messageMax, headerMax = 100_000, 10_000, 64<<10 - 1
	b := startBroker(t, func(o *server.Options) { o.MaxPayload = payloadMax })
	topic, small, full := newTopic(), newTopic(), newTopic()
	b.createTopic(t, topic, nats.TopicOptions{})
	b.createTopic(t, small, nats.TopicOptions{Partitions: 1, Stream: jetstream.StreamConfig{MaxMsgSize: messageMax}})
	b.createTopic(t, full, nats.TopicOptions{Partitions: 1, Stream: jetstream.StreamConfig{MaxMsgs: 1, Discard: jetstream.DiscardNew}})
	p := b.publisher(t, nil)
	if err := publishOne(t, p, message.Message{ID: "0", Topic: full}); err != nil {
		t.Fatal(err)
	}
	const headers = 500 // at most, of these messages
	for name, c := range map[string]struct {
		m       message.Message
		refused bool
		remedy  string // in the error; "" if there is none
	}{
		"fits into max_payload":            {message.Message{Topic: topic, Body: make([]byte, payloadMax-headers)}, false, ""},
		"is larger than max_payload":       {message.Message{Topic: topic, Body: make([]byte, payloadMax)}, true, "max_payload of 100000"},
		"has headers that fit":             {message.Message{Topic: topic, Header: map[string][]string{"A": {strings.Repeat("x", headerMax-headers)}}}, false, ""},
		"has headers that are too large":   {message.Message{Topic: topic, Header: map[string][]string{"A": {strings.Repeat("x", headerMax)}}}, true, "64 KiB"},
		"fits into max_msg_size":           {message.Message{Topic: small, Body: make([]byte, messageMax-headers)}, false, ""},
		"is larger than max_msg_size":      {message.Message{Topic: small, Body: make([]byte, messageMax)}, true, "max_msg_size"},
		"has a header that purges":         {message.Message{Topic: topic, Header: map[string][]string{"Nats-Rollup": {"all"}}}, true, "rename the header"},
		"has such a header in lower case":  {message.Message{Topic: topic, Header: map[string][]string{"nats-rollup": {"all"}}}, true, "rename the header"},
		"has the header of the key":        {message.Message{Topic: topic, Header: map[string][]string{nats.KeyHeader: {"k"}}}, true, "rename the header"},
		"has a header that is like them":   {message.Message{Topic: topic, Header: map[string][]string{"Nats": {"all"}}}, false, ""},
		"has a topic that is no subject":   {message.Message{Topic: "a..b"}, true, "rename the topic"},
		"has a topic that begins with it":  {message.Message{Topic: ".a"}, true, "rename the topic"},
		"has a topic that ends with it":    {message.Message{Topic: "a."}, true, "rename the topic"},
		"has a topic that is a wildcard":   {message.Message{Topic: "*"}, true, "letters"},
		"has a topic that is not there":    {message.Message{Topic: newTopic()}, true, "make it with Client.CreateTopic"},
		"comes to a stream that is full":   {message.Message{Topic: full}, false, "maximum messages exceeded"},
		"has no id, from somebody's relay": {message.Message{Topic: topic}, false, ""},
	} {
		t.Run(name, func(t *testing.T) {
			if !strings.HasPrefix(name, "has no id") {
				c.m.ID = "id of " + name
			}
			err := publishOne(t, p, c.m)
			if errors.Is(err, relay.ErrRefused) != c.refused || (err == nil) != (c.remedy == "") || err != nil && !strings.Contains(err.Error(), c.remedy) {
				t.Errorf("%v", err)
			}
		})
	}
}

// If nobody answers on a subject, that proves nothing: while the topic is there, no message is
// refused.
func TestMissingPartitionIsNoRefusal(t *testing.T) {
	t.Parallel()
	b := startBroker(t)
	topic := newTopic()
	b.createTopic(t, topic, nats.TopicOptions{Partitions: 2})
	p := b.publisher(t, nil)
	m := message.Message{ID: "1", Topic: topic, Key: []byte("account-2")} // partition 1
	if err := publishOne(t, p, m); err != nil {
		t.Fatal(err)
	}
	if err := b.admin(t).DeleteStream(t.Context(), streamOf(topic, "1")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if err := p.Publish(ctx, []message.Message{m})[0]; err == nil || errors.Is(err, relay.ErrRefused) {
		t.Errorf("%v", err)
	}
}

// A topic that is recreated while a publisher lives may have another number of partitions.
func TestTopicMadeAnewHasAnotherNumberOfPartitions(t *testing.T) {
	t.Parallel()
	b := startBroker(t)
	topic := newTopic()
	b.createTopic(t, topic, nats.TopicOptions{Partitions: 8})
	p := b.publisher(t, nil)
	m := message.Message{ID: "1", Topic: topic, Key: []byte("account-1")}
	publish := func() {
		t.Helper()
		if err := publishOne(t, p, m); err != nil {
			t.Fatal(err)
		}
	}
	publish()
	b.deleteTopic(t, topic)
	if err := publishOne(t, p, m); !errors.Is(err, relay.ErrRefused) {
		t.Errorf("without the topic: %v", err)
	}
	b.createTopic(t, topic, nats.TopicOptions{Partitions: 1})
	publish()
	if got := b.read(t, topic); len(got[0]) != 1 {
		t.Errorf("%v", got)
	}
}

// The number of partitions is fixed, and bounded.
func TestNumberOfPartitions(t *testing.T) {
	t.Parallel()
	b := startBroker(t)
	client, topic := b.connect(t, nil), newTopic()
	for range 2 { // each process may do it
		if err := client.CreateTopic(t.Context(), topic, nil); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(b.streams(t, topic)); n != nats.PartitionsDefault {
		t.Errorf("%d partitions", n)
	}
	if err := client.CreateTopic(t.Context(), topic, &nats.TopicOptions{Partitions: 4}); err == nil || !strings.Contains(err.Error(), "has 8 partitions, not 4: the number is fixed, so ask for 8") {
		t.Errorf("%v", err)
	}
	if err := client.CreateTopic(t.Context(), topic, &nats.TopicOptions{Partitions: 12}); err == nil || !strings.Contains(err.Error(), "has 8 partitions, not 12") {
		t.Errorf("%v", err)
	}
	if n := len(b.streams(t, topic)); n != nats.PartitionsDefault {
		t.Errorf("%d streams after a try to make more", n)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for n, inRange := range map[int]bool{-1: false, 1: true, nats.PartitionsMax: true, nats.PartitionsMax + 1: false} {
		err := client.CreateTopic(ended, newTopic(), &nats.TopicOptions{Partitions: n}) // the range is checked first
		if err == nil || errors.Is(err, context.Canceled) != inRange {
			t.Errorf("%d partitions: %v", n, err)
		}
	}
	long := strings.Repeat("t", message.TopicBytesMax)
	if err := client.CreateTopic(t.Context(), long, &nats.TopicOptions{Partitions: 1}); err != nil {
		t.Error(err)
	}

	foreign := newTopic()
	if _, err := b.admin(t).CreateStream(t.Context(), jetstream.StreamConfig{Name: streamOf(foreign, "0"), Subjects: []string{foreign + ".0"}}); err != nil {
		t.Fatal(err)
	}
	if err := publishOne(t, b.publisher(t, nil), message.Message{Topic: foreign}); errors.Is(err, relay.ErrRefused) || err == nil || !strings.Contains(err.Error(), "was not made by CreateTopic") {
		t.Errorf("%v", err)
	}
}

// After ctx has ended nothing is sent, not even the messages in the library's buffers.
func TestNothingIsSentAfterTheEnd(t *testing.T) {
	t.Parallel()
	b := startBroker(t)
	topic := newTopic()
	b.createTopic(t, topic, nats.TopicOptions{})
	network := new(brokertest.Network)
	p := b.publisher(t, network)
	if err := publishOne(t, p, message.Message{ID: "0", Topic: topic}); err != nil {
		t.Fatal(err)
	}
	network.Stop()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	late := []message.Message{{ID: "1", Topic: topic}, {ID: "2", Topic: topic}}
	for _, err := range p.Publish(ctx, late) {
		if err == nil || errors.Is(err, relay.ErrRefused) {
			t.Errorf("%v", err)
		}
	}
	network.Mend()
	if err := publishOne(t, p, message.Message{ID: "3", Topic: topic}); err != nil { // behind it on the wire
		t.Fatal(err)
	}
	if n := b.count(t, topic); n != 2 {
		t.Errorf("%d messages are kept", n)
	}
}

// A key or body is in no error.
func TestErrorsQuoteNoMessage(t *testing.T) {
	t.Parallel()
	b := startBroker(t, func(o *server.Options) { o.MaxPayload = 1 << 10 })
	topic := newTopic()
	b.createTopic(t, topic, nats.TopicOptions{})
	p := b.publisher(t, nil)
	for _, m := range []message.Message{
		{Topic: topic, Body: []byte(strings.Repeat("secret", 1000))},
		{Topic: topic, Key: []byte("secret"), Header: map[string][]string{"Nats-Secret": {"secret"}}},
		{Topic: "secret"},
	} {
		m.ID = "secret"
		if err := publishOne(t, p, m); err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%v", err)
		}
	}
}

// An invalid URL is an error at once, which quotes no password. A server that is away is no error.
func TestConnect(t *testing.T) {
	t.Parallel()
	for _, servers := range []string{"", "nats://user:secret@[::1", "nats://a:1,,nats://b:1"} {
		if _, err := nats.Connect(servers, nil); err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v", servers, err)
		}
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	away := listener.Addr().String()
	_ = listener.Close()
	client, err := nats.Connect("nats://"+away, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := client.CreateTopic(ctx, "t", nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	p := client.Publisher()
	if err := p.Publish(ctx, make([]message.Message, 1))[0]; err == nil || errors.Is(err, relay.ErrRefused) {
		t.Errorf("%v", err)
	}
	p.Close()
	if err := p.Publish(t.Context(), make([]message.Message, 1))[0]; err == nil || !strings.Contains(err.Error(), "closed") {
		t.Errorf("%v", err)
	}
}
