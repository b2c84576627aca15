package bench

import (
	"fmt"
	"strings"
	"testing"

	"github.com/paidonce/idempotency/consumer"
)

// TestEveryDesignConsumesOnce: each design has the effects of its messages, and a design that keeps
// ids has none of a copy. The check finds an effect that is missing, doubled or wrong.
func TestEveryDesignConsumesOnce(t *testing.T) {
	t.Parallel()
	c, url := testCluster(t)
	var w wire
	d, err := newStand(t.Context(), setting{DatabaseURL: url, Schemas: []string{schemaOf(0)}, Designs: consuming(), PoolSize: 4, Partitions: 2}, &w)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.close)
	for _, name := range consuming() {
		e := &entry{design: designOf(name)}
		for range 2 {
			done, err := d.messages.consume(t.Context(), &consume{Design: name})
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if done.Messages != 2*fetchOf(name) || done.PerSecond <= 0 {
				t.Errorf("%s: %+v", name, done)
			}
			e.next = done.Next
		}
		if err := c.checkMessages(t.Context(), []*entry{e}); err != nil {
			t.Error(err)
		}
		if e.design.keyed { // published twice: at other offsets, with the same ids
			copies := deliveriesOf(0, 2, 0, fetchOf(name))
			for i := range copies {
				copies[i].Offset += 2 * fetchOf(name)
			}
			take := d.messages.takers[name]
			err := take(t.Context(), 0, copies)
			if name == "consume-engine" && (err == nil || !strings.Contains(err.Error(), "replayed")) || name != "consume-engine" && err != nil {
				t.Errorf("%s: copies: %v", name, err)
			}
			if err := c.checkMessages(t.Context(), []*entry{e}); err != nil {
				t.Errorf("after copies: %v", err)
			}
		}
		for _, wrong := range []string{
			"DELETE FROM %[1]s.entries WHERE ctid = (SELECT min(ctid) FROM %[1]s.entries)",
			"INSERT INTO %[1]s.entries SELECT * FROM %[1]s.entries LIMIT 1",
			"UPDATE %[1]s.entries SET message = (SELECT max(message) FROM %[1]s.entries)",
			"UPDATE %[1]s.entries SET amount = amount + 1 WHERE ctid = (SELECT min(ctid) FROM %[1]s.entries)",
			"UPDATE %[1]s.balances SET balance = balance + 1 WHERE account = 'acct-0000'",
		} {
			tx, err := c.admin.Begin(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if _, err := tx.Exec(t.Context(), fmt.Sprintf(wrong, messagesSchema(name))); err != nil {
				t.Fatal(err)
			}
			if c.checkMessages(t.Context(), []*entry{e}) == nil {
				t.Errorf("%s: the effects are well after %s", name, wrong)
			}
			if err := tx.Rollback(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// TestMessagesOfTheSource: all ids differ, and no two partitions share an account.
func TestMessagesOfTheSource(t *testing.T) {
	t.Parallel()
	ids, owners := map[string]bool{}, map[string]int{}
	for partition := range messagesQuickPartitions {
		for from := int64(0); from < 1000; from += messagesBatch {
			for i, d := range deliveriesOf(partition, messagesQuickPartitions, from, messagesBatch) {
				if d.Offset != from+int64(i) || ids[d.ID] || len(d.Body) < 160 || len(d.Body) > 220 {
					t.Fatalf("message %d is %+v, its body has %d bytes", from+int64(i), d, len(d.Body))
				}
				ids[d.ID] = true
				if owner, known := owners[string(d.Key)]; known && owner != partition {
					t.Fatalf("account %s is in two partitions", d.Key)
				}
				owners[string(d.Key)] = partition
				if e, err := decodeEvent(d.Body); err != nil || e.ID != d.ID || e.Amount != amountOf(d.Offset) {
					t.Fatalf("its event is %+v: %v", e, err)
				}
			}
		}
	}
	if len(owners) != accounts {
		t.Errorf("the messages are of %d accounts, want %d", len(owners), accounts)
	}
	if _, err := decodeEvent([]byte("{}")); err == nil || !strings.Contains(err.Error(), consumer.ErrRejected.Error()) {
		t.Errorf("what is no event: %v", err)
	}
}
