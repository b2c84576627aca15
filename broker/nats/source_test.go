package nats_test

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	natsgo "github.com/nats-io/nats.go"

	"github.com/paidonce/idempotency/broker/brokertest"
	"github.com/paidonce/idempotency/broker/nats"
	"github.com/paidonce/idempotency/consumer"
)

// A message of another producer has an id too: that of CloudEvents, or its place. A header that
// breaks our rules is dropped.
func TestMessagesOfOtherProducers(t *testing.T) {
	t.Parallel()
	b := startBroker(t)
	topic := b.newTopic(t, nats.TopicOptions{Partitions: 1})
	js := b.admin(t)
	for _, header := range []natsgo.Header{
		{"ce-id": {"event-1"}, "A": {"1", "2"}},
		{"Nats-Msg-Id": {"own"}, "ce-id": {"event-2"}, "Message-Key": {"100%"}}, // no percent-encoding
		{"B": {"bell \a"}, "no token": {"c"}, "D": {"d"}},
		nil,
	} {
		message := &natsgo.Msg{Subject: topic + ".0", Header: header, Data: []byte("body")}
		_, err := js.PublishMsg(t.Context(), message)
		if _, refused := header["no token"]; err != nil && refused { // by newer clients
			delete(header, "no token")
			_, err = js.PublishMsg(t.Context(), message)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	l := newBooks(t)
	got := make(chan consumer.Delivery, 10)
	source := b.connect(t, nil).Source("books", topic)
	l.project(t, source, consumer.Options{}, collect(got))
	var all []consumer.Delivery
	for range 4 {
		select {
		case d := <-got:
			all = append(all, d)
		case <-time.After(time.Minute):
			t.Fatalf("only %d messages arrived", len(all))
		}
	}
	if d := all[0]; d.ID != "event-1" || d.Key != nil || fmt.Sprint(d.Header) != "map[A:[1 2] ce-id:[event-1]]" {
		t.Errorf("%+v", d)
	}
	if d := all[1]; d.ID != "own" || string(d.Key) != "100%" {
		t.Errorf("%+v", d)
	}
	if d := all[2]; !strings.HasPrefix(d.ID, topic+"/0/3/") || fmt.Sprint(d.Header) != "map[D:[d]]" {
		t.Errorf("id %q, %d headers", d.ID, len(d.Header))
	}
	if d := all[3]; !strings.HasPrefix(d.ID, topic+"/0/4/") {
		t.Errorf("%+v", d)
	}
}

func TestOptionsAndNamesThatCantWork(t *testing.T) {
	t.Parallel()
	client, err := nats.Connect("nats://127.0.0.1:1", nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]func(){
		"no group":        func() { client.Source("", "t") },
		"group with a *":  func() { client.Source("a*", "t") },
		"no topic":        func() { client.Source("g") },
		"no subject":      func() { client.Source("g", "a..b") },
		"negative option": func() { _, _ = nats.Connect("nats://127.0.0.1:1", &nats.Options{SessionTimeout: -1}) },
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if recover() == nil {
					t.Error("no panic")
				}
			}()
			f()
		})
	}
	client.Source("a.b-c_1", "t", "t") // a topic that is named twice counts once
}

// blocking is a receiver. Its calls last until their context ends.
type blocking struct{ began, ended chan struct{} }

func (r *blocking) BatchMax() int { return 1 }

func (r *blocking) Assigned(context.Context, consumer.Partition) (int64, error) {
	return consumer.FromOldest, nil
}

func (r *blocking) Receive(ctx context.Context, _ consumer.Partition, _ []consumer.Delivery) (settled int, pause time.Duration) {
	r.began <- struct{}{}
	<-ctx.Done()
	r.ended <- struct{}{}
	return 0, 0
}

// A member that gets no beats ends its calls by itself, before others take its partitions. When it
// gets beats again it goes on.
func TestMemberThatIsCutOffEndsItsCalls(t *testing.T) {
	t.Parallel()
	b := startBroker(t)
	topic := b.newTopic(t, nats.TopicOptions{Partitions: 1})
	publishAll(t, b.publisher(t, nil), numbered(topic, 0, 1))
	network := new(brokertest.Network)
	source := b.connect(t, network).Source("books", topic)
	r := &blocking{make(chan struct{}), make(chan struct{})}
	ctx, cancel := context.WithCancel(t.Context())
	returned := make(chan error, 1)
	go func() { returned <- source.Run(ctx, r) }()
	t.Cleanup(network.Mend)
	wait := func(what string, c <-chan struct{}) {
		t.Helper()
		select {
		case <-c:
		case <-time.After(time.Minute):
			t.Fatalf("not within a minute: %s", what)
		}
	}
	wait("a call", r.began)
	network.Stop()
	wait("the end of the call", r.ended)
	network.Mend()
	wait("another call", r.began)
	cancel()
	wait("the end of that call, after RebalanceTimeout", r.ended)
	if err := <-returned; err != nil {
		t.Error(err)
	}
}
