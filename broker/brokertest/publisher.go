package brokertest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/relay"
)

var publisherCases = []aCase{
	{"publish/messages arrive as they were", "key, id, headers and body are the same at the broker, nil and empty too", publisherNeeds(nil), arriveAsTheyWere},
	{"publish/order per key", "messages with one topic and key arrive in their order", publisherNeeds(nil), orderPerKey},
	{"publish/concurrently", "a publisher is safe for concurrent use", publisherNeeds(nil), publishConcurrently},
	{"publish/refused message", "a message that the broker will never take gets ErrRefused, later ones of its key are not kept, and others are", publisherNeeds(nil), refusedMessage},
	{"publish/unknown topic", "a message for a topic that does not exist gets ErrRefused, and others are kept", publisherNeeds(nil), unknownTopic},
	{"publish/ended context", "it sends nothing after ctx has ended", publisherNeeds(nil), endedContext},
	{"publish/broker away", "it returns soon after ctx ends; what is not confirmed is not refused; later all arrive in their order", publisherNeeds(hasNetwork), brokerAway},
	{"publish/broker does not answer", "it returns soon after ctx ends, and sends nothing more; copies have the same ids and come in their order", publisherNeeds(hasNetwork), brokerSilent},
	{"publish/broker comes back", "an outage that is shorter than ctx is no error", publisherNeeds(hasNetwork), brokerComesBack},
	{"publish/restart", "what was confirmed is there after the broker was killed, and publishing goes on", publisherNeeds(func(h *Harness) bool { return h.Restart != nil }), publishAcrossRestart},
}

func hasNetwork(h *Harness) bool { return h.Network != nil }

// publishAll publishes messages, which must all be confirmed.
func publishAll(t *testing.T, p relay.Publisher, messages []message.Message) {
	t.Helper()
	ctx, cancel := soon(t)
	defer cancel()
	for i, err := range p.Publish(ctx, messages) {
		if err != nil {
			t.Fatalf("message %d: %v", i, err)
		}
	}
}

func arriveAsTheyWere(t *testing.T, h *Harness) {
	topic := h.Topic(t)
	sent := []message.Message{
		{ID: "5f0b9fbc-0d31-8a52-9b11-f1d3a7a2b1c4", Key: []byte("k"), Body: []byte(`{"amount":1}`), Header: map[string][]string{"Type": {"made"}, "x-Many": {"1", "", "2 3"}}},
		{ID: "1", Key: nil, Body: []byte("no key")},
		{ID: "2", Key: []byte("\x00\xff binary"), Body: []byte("\x00\xff\n")},
		{ID: "3", Key: []byte("empty"), Body: []byte{}},
		{ID: "4", Key: []byte("large"), Body: []byte(strings.Repeat("x", message.BodyBytesMax))},
	}
	for i := range sent {
		sent[i].Topic = topic
	}
	publishAll(t, h.Publisher(t), sent)
	got := map[string]consumer.Delivery{}
	for _, d := range h.read(t, topic) {
		got[d.ID] = d
	}
	if len(got) != len(sent) {
		t.Fatalf("%d messages arrived, %d were sent", len(got), len(sent))
	}
	for _, m := range sent {
		d := got[m.ID]
		if d.Topic != topic || string(d.Key) != string(m.Key) || (d.Key == nil) != (m.Key == nil) || string(d.Body) != string(m.Body) ||
			!maps.EqualFunc(d.Header, m.Header, func(a, b []string) bool { return fmt.Sprintf("%q", a) == fmt.Sprintf("%q", b) }) {
			t.Errorf("%s arrived with key %q, headers %q and a body of %d bytes", m.ID, d.Key, d.Header, len(d.Body))
		}
	}
}

func orderPerKey(t *testing.T, h *Harness) {
	const keys, calls, each = 20, 5, 200
	topic := h.Topic(t)
	var names []string
	for i := range keys {
		names = append(names, fmt.Sprint("key", i))
	}
	sent := makeMessages(topic, calls*each, names...)
	p := h.Publisher(t)
	for i := range calls {
		publishAll(t, p, sent[i*each:(i+1)*each])
	}
	got := h.read(t, topic)
	if len(got) != len(sent) {
		t.Errorf("%d messages arrived, %d were sent", len(got), len(sent))
	}
	for _, key := range names {
		if got, want := bodies(got, key, delivered), bodies(sent, key, published); got != want {
			t.Errorf("%s: %s arrived, %s was sent", key, got, want)
		}
	}
}

func publishConcurrently(t *testing.T, h *Harness) {
	const publishing, calls, each = 8, 10, 20
	topic := h.Topic(t)
	p := h.Publisher(t)
	var all sync.WaitGroup
	for i := range publishing {
		all.Go(func() {
			key := fmt.Sprint("key", i)
			sent := makeMessages(topic, calls*each, key)
			for c := range calls {
				for _, err := range p.Publish(t.Context(), sent[c*each:(c+1)*each]) {
					if err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	all.Wait()
	got := h.read(t, topic)
	for i := range publishing {
		key := fmt.Sprint("key", i)
		if got, want := bodies(got, key, delivered), bodies(makeMessages(topic, calls*each, key), key, published); got != want {
			t.Errorf("%s: %s arrived", key, got)
		}
	}
}

func refusedMessage(t *testing.T, h *Harness) {
	topic := h.Topic(t)
	sent := makeMessages(topic, 9, "a", "b", "")
	sent[3].Body = make([]byte, message.BodyBytesMax+1) // the second of "a"
	ctx, cancel := soon(t)
	defer cancel()
	results := h.Publisher(t).Publish(ctx, sent)
	if len(results) != len(sent) {
		t.Fatalf("%d results for %d messages", len(results), len(sent))
	}
	if !errors.Is(results[3], relay.ErrRefused) {
		t.Errorf("the message that is too large got %v", results[3])
	}
	if err := results[6]; err == nil || errors.Is(err, relay.ErrRefused) {
		t.Errorf("the message behind it got %v", err)
	}
	for _, i := range []int{0, 1, 2, 4, 5, 7, 8} {
		if results[i] != nil {
			t.Errorf("message %d: %v", i, results[i])
		}
	}
	if got := h.read(t, topic); len(got) != 7 || bodies(got, "a", delivered) != "a 0" {
		t.Errorf("%d messages arrived, of the key: %s", len(got), bodies(got, "a", delivered))
	}
}

func unknownTopic(t *testing.T, h *Harness) {
	topic := h.Topic(t)
	sent := append(makeMessages(topic, 2, "a"), makeMessages(topic+"-is-not-there", 4, "a", "b")...)
	p := h.Publisher(t)
	ctx, cancel := soon(t)
	defer cancel()
	for range 2 {
		results := p.Publish(ctx, sent)
		if results[0] != nil || results[1] != nil {
			t.Errorf("of a topic that exists: %v, %v", results[0], results[1])
		}
		for i := 2; i < 4; i++ {
			if !errors.Is(results[i], relay.ErrRefused) {
				t.Errorf("the first message of its key and an unknown topic got %v", results[i])
			}
			if err := results[i+2]; err == nil || errors.Is(err, relay.ErrRefused) {
				t.Errorf("the message behind it got %v", err)
			}
		}
	}
}

func endedContext(t *testing.T, h *Harness) {
	const times = 50 // a publisher that only notices soon is caught by one of them
	topic := h.Topic(t)
	p := h.Publisher(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range times {
		publishAll(t, p, makeMessages(topic, 1, "before"))
		for _, err := range p.Publish(ctx, makeMessages(topic, 1, "ended")) {
			if err == nil || errors.Is(err, relay.ErrRefused) {
				t.Fatalf("result %v", err)
			}
		}
	}
	if got := bodies(h.read(t, topic), "ended", delivered); got != "" {
		t.Errorf("%s arrived", got)
	}
}

// shortly is the time for which Publish may wait for a broker that is away.
const shortly = 300 * time.Millisecond

// publishShortly publishes messages to a broker that can't confirm them.
func publishShortly(t *testing.T, p relay.Publisher, messages []message.Message) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), shortly)
	defer cancel()
	returned := make(chan struct{})
	go func() {
		defer close(returned)
		for i, err := range p.Publish(ctx, messages) {
			if err == nil || errors.Is(err, relay.ErrRefused) {
				t.Errorf("message %d got %v while the broker was away", i, err)
			}
		}
	}()
	select {
	case <-returned:
	case <-time.After(patience / 2):
		t.Fatal("Publish did not return after ctx had ended")
	}
}

func brokerAway(t *testing.T, h *Harness) {
	topic := h.Topic(t)
	p := h.Publisher(t)
	sent := makeMessages(topic, 9, "a", "b", "c")
	h.Network.Cut() // before the first connection
	publishShortly(t, p, sent[:3])
	h.Network.Mend()
	publishAll(t, p, sent[:3])
	h.Network.Cut() // with connections
	publishShortly(t, p, sent[3:])
	h.Network.Mend()
	publishAll(t, p, sent[3:])
	arrivedInOrder(t, h, topic, sent)
}

func brokerSilent(t *testing.T, h *Harness) {
	topic := h.Topic(t)
	p := h.Publisher(t)
	sent := makeMessages(topic, 12, "a", "b", "c")
	publishAll(t, p, sent[:3])
	h.Network.Stop()
	publishShortly(t, p, sent[3:6])
	publishShortly(t, p, sent[3:9])
	h.Network.Mend()
	publishAll(t, p, sent[3:])
	arrivedInOrder(t, h, topic, sent)
}

func brokerComesBack(t *testing.T, h *Harness) {
	topic := h.Topic(t)
	p := h.Publisher(t)
	sent := makeMessages(topic, 30, "a", "b", "c")
	publishAll(t, p, sent[:3])
	for _, fault := range []func(){h.Network.Cut, h.Network.Stop} {
		fault()
		mending := time.AfterFunc(shortly, h.Network.Mend)
		publishAll(t, p, sent)
		mending.Stop()
	}
	arrivedInOrder(t, h, topic, sent)
}

func publishAcrossRestart(t *testing.T, h *Harness) {
	topic := h.Topic(t)
	p := h.Publisher(t)
	sent := makeMessages(topic, 30, "a", "b", "c")
	for i := range 3 {
		publishAll(t, p, sent[i*10:(i+1)*10])
		h.Restart(t)
	}
	arrivedInOrder(t, h, topic, sent)
}

// arrivedInOrder checks that all messages are there, and in the order of their keys once copies are
// dropped.
func arrivedInOrder(t *testing.T, h *Harness, topic string, sent []message.Message) {
	t.Helper()
	got := firsts(h.read(t, topic))
	for _, key := range []string{"a", "b", "c"} {
		if got, want := bodies(got, key, delivered), bodies(sent, key, published); got != want {
			t.Errorf("key %s: %s arrived, %s was sent", key, got, want)
		}
	}
}
