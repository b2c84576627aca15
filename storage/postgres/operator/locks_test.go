package operator_test

import (
	"context"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// An ALTER TABLE that waits behind a reader stops every request. The doctor names its process, and
// its remedy helps.
func TestDoctorFindsWhoKeepsRequestsFromTheTable(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		reads bool // a reader holds the table, and the ALTER TABLE waits for it
		says  string
	}{
		"waits": {true, "requests wait behind it"},
		"holds": {false, "requests wait for it"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ctx := t.Context()
			b := setup(t, nil)
			o := operator.New(b.Store, nil)
			if worst, text := levels(o.Doctor(ctx)); worst["locks"] != operator.LevelOK {
				t.Errorf("before:\n%s", text)
			}
			reader, other := b.conn(t), b.conn(t)
			if test.reads {
				mustExec(t, reader, "BEGIN; LOCK TABLE idempotency_keys IN ACCESS SHARE MODE")
			}
			mustExec(t, other, "BEGIN")
			ended := make(chan error, 1)
			go func() {
				_, err := other.Exec(context.Background(), "ALTER TABLE idempotency_keys ADD COLUMN more text")
				ended <- err
			}()
			var finding operator.Finding
			for deadline := time.Now().Add(30 * time.Second); finding.Level != operator.LevelFail; {
				if time.Now().After(deadline) {
					t.Fatalf("it is not found: %+v", finding)
				}
				for _, f := range o.Doctor(ctx) {
					if f.Check == "locks" {
						finding = f
					}
				}
			}
			if !strings.Contains(finding.What, test.says) {
				t.Errorf("%+v", finding)
			}
			remedy := regexp.MustCompile(`SELECT pg_\w+\(\d+\)`).FindString(finding.Remedy)
			mustExec(t, b.conn(t), remedy)
			if err := <-ended; (err != nil) != test.reads {
				t.Errorf("ALTER TABLE: %v", err)
			}
			if got := b.do(t, key("k"), 201); got.Outcome != idempotency.OutcomeExecuted {
				t.Errorf("after %s a request is %s, %v", remedy, got.Outcome, got.Err)
			}
			if worst, text := levels(o.Doctor(ctx)); worst["locks"] != operator.LevelOK {
				t.Errorf("after %s:\n%s", remedy, text)
			}
		})
	}
}

func (b *testBundle) conn(t *testing.T) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), b.URL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func mustExec(t *testing.T, conn *pgx.Conn, sql string) {
	t.Helper()
	if _, err := conn.Exec(t.Context(), sql); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}
