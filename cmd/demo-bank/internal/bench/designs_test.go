package bench

import (
	"net/http/httptest"
	"strings"
	"testing"
)

// TestEveryDesignPaysOnce: each design makes the requested number of transfers, and the books
// balance. Designs with records replay them and refuse another body under the key. With the bare
// designs a retry pays again, which is their purpose.
func TestEveryDesignPaysOnce(t *testing.T) {
	t.Parallel()
	const requests = 5
	c, url := testCluster(t)
	client := testStand(t, url, requesting()...)
	paid := int64(0)
	for _, name := range requesting() {
		d := designOf(name)
		if d.kind == read || d.kind == plain {
			continue
		}
		path := "/" + schemaOf(0) + "/" + d.name
		for range requests {
			made, err := client.make(t.Context(), &target{path: path, kind: fresh})
			if err != nil {
				t.Fatal(err)
			}
			paid++
			first := client.reply
			answer := string(first.body) // the next reply overwrites its bytes
			if len(answer) < 180 || len(answer) > 220 {
				t.Errorf("%s: the answer has %d bytes, want about 200", d.name, len(answer))
			}
			if err := client.post(t.Context(), path, made.key, made.body); err != nil {
				t.Fatal(err)
			}
			if !d.keyed {
				paid++
			}
			if client.reply.status != 201 || d.keyed != (client.reply.location == first.location) || d.keyed != (string(client.reply.body) == answer) {
				t.Errorf("%s: a retry was answered with %d %s %s, first it was %s", d.name, client.reply.status, client.reply.location, client.reply.body, answer)
			}
			changed := []byte(strings.Replace(string(made.body), `"amount":`, `"amount":1`, 1))
			if err := client.post(t.Context(), path, made.key, changed); err != nil {
				t.Fatal(err)
			}
			if !d.keyed {
				paid++
			}
			if refused := client.reply.status == 422; refused != d.keyed {
				t.Errorf("%s: another body was answered with %d %s", d.name, client.reply.status, client.reply.body)
			}
		}
		if err := c.check(t.Context(), paid); err != nil {
			t.Fatalf("%s: %v", d.name, err)
		}
	}
}

// testStand serves a design in this process.
func testStand(t *testing.T, url string, names ...string) *client {
	t.Helper()
	var w wire
	d, err := newStand(t.Context(), setting{DatabaseURL: url, Schemas: []string{schemaOf(0)}, Designs: names, PoolSize: 4}, &w)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.close)
	if busy := w.busy.Load(); busy != 0 {
		t.Errorf("%d connections are busy before the first request", busy)
	}
	server := httptest.NewServer(d.router)
	t.Cleanup(server.Close)
	c := newClient(strings.TrimPrefix(server.URL, "http://"), 1, 1)
	t.Cleanup(c.close)
	return c
}

// TestReadsAnswer: a design that only reads returns a transfer that was written before, or a
// constant that needs no database.
func TestReadsAnswer(t *testing.T) {
	t.Parallel()
	_, url := testCluster(t)
	client := testStand(t, url, "get-by-id", "no-database")
	made, err := client.make(t.Context(), &target{path: "/" + schemaOf(0) + "/" + routeMade, kind: fresh})
	if err != nil {
		t.Fatal(err)
	}
	answer := string(client.reply.body)
	if err := client.send(t.Context(), &target{path: "/" + schemaOf(0) + "/get-by-id", kind: read, records: []record{made}}); err != nil {
		t.Error(err)
	}
	if got := string(client.reply.body); got != answer {
		t.Errorf("it reads %s, and was told %s", got, answer)
	}
	if err := client.send(t.Context(), &target{path: "/" + schemaOf(0) + "/get-by-id", kind: read, records: []record{{id: "1"}}}); err == nil {
		t.Error("a transfer that is not there was read")
	}
	if err := client.send(t.Context(), &target{path: "/" + schemaOf(0) + "/no-database", kind: plain}); err != nil {
		t.Error(err)
	}
	if n := len(client.reply.body); n < 180 || n > 220 {
		t.Errorf("the constant answer has %d bytes, want about 200", n)
	}
}

// TestWrongBooksAreFound: money made, money lost, a missing entry, and a transfer without an
// acknowledgment.
func TestWrongBooksAreFound(t *testing.T) {
	t.Parallel()
	c, url := testCluster(t)
	client := testStand(t, url, "bare-batch")
	for range 3 {
		if _, err := client.make(t.Context(), &target{path: "/" + schemaOf(0) + "/bare-batch", kind: fresh}); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.check(t.Context(), 3); err != nil {
		t.Fatal(err)
	}
	for _, told := range []int64{2, 4} {
		if c.check(t.Context(), told) == nil {
			t.Errorf("3 transfers are well where %d were told", told)
		}
	}
	for _, sql := range []string{
		"UPDATE accounts SET balance = balance + 1 WHERE id = 'acct-0001'",
		"UPDATE accounts SET balance = balance + CASE id WHEN 'acct-0001' THEN 1 ELSE -1 END WHERE id IN ('acct-0001', 'acct-0002')",
		"DELETE FROM entries WHERE id = (SELECT min(id) FROM entries)",
		"UPDATE entries SET amount = amount + 1 WHERE id = (SELECT min(id) FROM entries)",
	} {
		tx, err := c.admin.Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tx.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
		if c.check(t.Context(), 3) == nil {
			t.Errorf("the books are well after %s", sql)
		}
		if err := tx.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}
