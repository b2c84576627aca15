// Package brokertest tests that a broker keeps the contracts of relay.Publisher and
// consumer.Source.
//
//	func TestBroker(t *testing.T) {
//		brokertest.Run(t, brokertest.Features{}, func(t *testing.T) *brokertest.Harness {
//			return &brokertest.Harness{Publisher: ..., Source: ..., Topic: ..., Read: ...}
//		})
//	}
//
// Each case is a subtest on a harness of its own, and guards one rule, which it prints if it fails.
// A case is skipped, with the reason, if it needs something that the broker does not promise or
// that the harness can't do. Run the suite with -race.
package brokertest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/relay"
)

// Features names the promises that a broker does not make. The zero value is a broker that makes
// all of them.
type Features struct {
	// NoGroups: a source shares its partitions with no other source of the same consumer.
	NoGroups bool

	// NoIncarnation: the broker can't distinguish a topic from a deleted one with its name.
	NoIncarnation bool

	// NoSource and NoPublisher: the broker has only the other half.
	NoSource    bool
	NoPublisher bool
}

// Partitions is the number of partitions of each topic of the suite, if the broker has such a
// number.
const Partitions = 3

// Harness is a broker, and the functions that the suite needs. They are safe for concurrent use. If
// a function is nil, the cases that need it are skipped. A function that fails ends the test.
type Harness struct {
	// Topic creates an empty topic with a name that nobody else uses.
	Topic func(t *testing.T) string

	// Publisher returns a publisher with connections of its own, behind the network.
	Publisher func(t *testing.T) relay.Publisher

	// Source returns a source of a consumer, with connections of its own behind a network of its own.
	// The network may be nil.
	Source func(t *testing.T, consumer string, topics ...string) (consumer.Source, *Network)

	// SourceNetwork must be true if Source returns a network.
	SourceNetwork bool

	// Read returns all messages that the broker has of a topic, by partition, in their order. It does
	// not use the code under test.
	Read func(t *testing.T, topic string) map[int32][]consumer.Delivery

	// Network is between the publishers and the broker.
	Network *Network

	// Restart kills the broker, and starts it again with its stored data and at the same addresses.
	Restart func(t *testing.T)

	// Trim deletes all messages of a topic, as the broker's retention does. The offsets go on.
	Trim func(t *testing.T, topic string)

	// Recreate deletes a topic and creates it again under its name.
	Recreate func(t *testing.T, topic string)

	// Session is the time after which the broker gives the partitions of a silent member to others. It
	// should be short.
	Session time.Duration

	// Rebalance is the time that a member has to hand a partition over, if it is short enough for
	// tests. Zero leaves the case out.
	Rebalance time.Duration

	// Rebalancing blocks until the broker has begun to take a partition from one of the two members
	// that consume a topic. May be nil: a case is weaker without it.
	Rebalancing func(t *testing.T, consumer, topic string)
}

// patience bounds every wait of a case. A correct broker never takes that long.
const patience = 60 * time.Second

// aCase guards one rule.
type aCase struct {
	name, rule string
	lacks      func(f Features, h *Harness) string // the reason to skip it, or ""
	check      func(t *testing.T, h *Harness)
}

// Run runs the suite, each case on a harness of its own.
func Run(t *testing.T, features Features, newHarness func(t *testing.T) *Harness) {
	for _, one := range slices.Concat(publisherCases, sourceCases) {
		t.Run(one.name, func(t *testing.T) {
			t.Parallel()
			h := newHarness(t)
			if lacks := one.lacks(features, h); lacks != "" {
				t.Skipf("%s: not run: %s", lacks, one.rule)
			}
			t.Cleanup(func() {
				if t.Failed() {
					t.Logf("the rule: %s", one.rule)
				}
			})
			one.check(t, h)
		})
	}
}

// publisherNeeds returns the reason to skip a case of a publisher.
func publisherNeeds(has func(h *Harness) bool) func(Features, *Harness) string {
	return func(f Features, h *Harness) string {
		switch {
		case f.NoPublisher:
			return "Features.NoPublisher"
		case has != nil && !has(h):
			return "the harness can't do that"
		}
		return ""
	}
}

// within fails the case if is does not become true.
func within(t *testing.T, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// makeMessages returns n messages with the keys in turn. The body is the key and a number that
// rises by one within the key; the id is unique in the topic.
func makeMessages(topic string, n int, keys ...string) []message.Message {
	all := make([]message.Message, n)
	for i := range all {
		key := keys[i%len(keys)]
		body := fmt.Sprintf("%s %d", key, i/len(keys))
		all[i] = message.Message{ID: "id " + body, Topic: topic, Key: []byte(key), Body: []byte(body)}
		if key == "" {
			all[i].Key = nil
		}
	}
	return all
}

// bodies returns the bodies of the messages of a key in their order.
func bodies[M any](messages []M, key string, of func(*M) *message.Message) string {
	var all []string
	for i := range messages {
		if m := of(&messages[i]); m.Key != nil && string(m.Key) == key {
			all = append(all, string(m.Body))
		}
	}
	return strings.Join(all, ", ")
}

// read returns all messages of a topic, one partition after the other.
func (h *Harness) read(t *testing.T, topic string) (all []consumer.Delivery) {
	t.Helper()
	byPartition := h.Read(t, topic)
	for _, number := range slices.Sorted(maps.Keys(byPartition)) {
		all = append(all, byPartition[number]...)
	}
	return all
}

func delivered(d *consumer.Delivery) *message.Message { return &d.Message }
func published(m *message.Message) *message.Message   { return m }
func soon(t *testing.T) (context.Context, func())     { return context.WithTimeout(t.Context(), patience) }
func firsts(all []consumer.Delivery) []consumer.Delivery { // without later copies
	seen := map[string]bool{}
	return slices.DeleteFunc(slices.Clone(all), func(d consumer.Delivery) bool {
		copied := seen[d.ID]
		seen[d.ID] = true
		return copied
	})
}
