package nats_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	natsgo "github.com/nats-io/nats.go"

	"github.com/paidonce/idempotency/broker/nats"
	"github.com/paidonce/idempotency/consumer"
)

// What other producers publish has an id too: that of CloudEvents, or its place. A header that breaks
// our rules is dropped.
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
		if _, err := js.PublishMsg(t.Context(), &natsgo.Msg{Subject: topic + ".0", Header: header, Data: []byte("body")}); err != nil {
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
