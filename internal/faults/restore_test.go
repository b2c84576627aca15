package faults_test

import (
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/storage/postgres"
)

// parted counts keys that have a payment without a record, or a record without a payment.
const parted = `SELECT count(*) FROM (SELECT key FROM payments) AS p FULL JOIN (SELECT key FROM idempotency_keys) AS r USING (key)
	WHERE p.key IS NULL OR r.key IS NULL`

// A dump is of one moment: whatever runs meanwhile, it contains a payment together with its record,
// or neither. After the restore payments from before the dump are replayed, and later ones are
// completely forgotten.
func TestF34DumpUnderLoadKeepsPaymentsAndRecordsTogether(t *testing.T) {
	t.Parallel()
	s := serve(t, pgtest.Database(t), nil)
	before := map[string]string{}
	for n := range 10 {
		key := fmt.Sprintf("before-%d", n)
		before[key] = s.mustPay(t, key, 201, "executed").body
	}
	const clients = 3
	var meanwhile sync.Map
	var load, warm sync.WaitGroup
	dumped := make(chan struct{})
	stop := sync.OnceFunc(func() { close(dumped); load.Wait() })
	defer stop()
	warm.Add(clients)
	for client := range clients {
		load.Go(func() {
			for n := 0; ; n++ {
				time.Sleep(5 * time.Millisecond)
				key := fmt.Sprintf("client-%d-%d", client, n)
				if got, err := s.pay(key); err != nil || !got.is(201, "executed") {
					t.Errorf("%s: %v, %v", key, got, err)
				} else {
					meanwhile.Store(key, got.body)
				}
				if n == 0 {
					warm.Done()
				}
				select {
				case <-dumped:
					return
				default:
				}
			}
		})
	}
	warm.Wait()
	file := filepath.Join(t.TempDir(), "dump")
	dump(t, s.upstream.get(), "--format=custom", "--file="+file)
	stop()

	restored := pgtest.Database(t)
	restore(t, restored, "--jobs=2", file)
	if n := count(t, restored, parted); n != 0 {
		t.Errorf("%d keys have a payment without a record, or a record without a payment", n)
	}
	again := serveOn(t, restored, nil)
	if err := again.store.Check(t.Context()); err != nil {
		t.Error(err)
	}
	for key, body := range before {
		if got := again.mustPay(t, key, 201, "replayed"); got.body != body {
			t.Errorf("%s: %s, first %s", key, got.body, body)
		}
	}
	const looked = 10 // at most, of each kind
	kept, lost := 0, 0
	meanwhile.Range(func(key, body any) bool {
		if again.records(t, key.(string)) == 0 {
			if lost++; lost <= looked {
				again.mustPay(t, key.(string), 201, "executed") // its payment is gone too
			}
		} else if kept++; kept <= looked && again.mustPay(t, key.(string), 201, "replayed").body != body {
			t.Errorf("%s has another answer than at first", key)
		}
		return kept < looked || lost < looked
	})
	const twice = "SELECT count(*) FROM (SELECT key FROM payments GROUP BY key HAVING count(*) > 1) AS twice"
	if n := count(t, restored, twice); n != 0 {
		t.Errorf("%d keys were paid twice", n)
	}
}

// A service that runs while its database is restored in one transaction answers not-executed until
// all of it is there, and then replays. If a restore commits table by table, there is a time in
// which a record is missing and its key would run: Check refuses the table until the last step has
// added its primary key.
func TestF34RestoreUnderARunningService(t *testing.T) {
	t.Parallel()
	s := serve(t, pgtest.Database(t), nil)
	body := s.mustPay(t, "k", 201, "executed").body
	file := filepath.Join(t.TempDir(), "dump")
	dump(t, s.upstream.get(), "--format=custom", "--file="+file)

	t.Run("in one transaction", func(t *testing.T) {
		t.Parallel()
		restored := pgtest.Database(t)
		again := serveOn(t, restored, nil)
		again.mustPay(t, "k", 503, "not-executed")
		done := make(chan struct{})
		go func() {
			defer close(done)
			restore(t, restored, "--single-transaction", file)
		}()
		for deadline := time.Now().Add(awaitMax); ; {
			got, err := again.pay("k")
			if err == nil && got.is(201, "replayed") && got.body == body {
				break
			}
			if err != nil || !got.is(503, "not-executed") || time.Now().After(deadline) {
				t.Errorf("while it is restored: %v, %v", got, err)
				break
			}
		}
		<-done
		again.onePayment(t, "k")
	})
	t.Run("table by table", func(t *testing.T) {
		t.Parallel()
		restored := pgtest.Database(t)
		again := serveOn(t, restored, nil)
		for _, section := range []string{"pre-data", "data", "post-data"} {
			if err := again.store.Check(t.Context()); !errors.Is(err, postgres.ErrSchemaOutdated) {
				t.Errorf("before %s Check says %v", section, err)
			}
			restore(t, restored, "--section="+section, file)
		}
		if err := again.store.Check(t.Context()); err != nil {
			t.Error(err)
		}
		again.mustPay(t, "k", 201, "replayed")
		again.onePayment(t, "k")
	})
}

func dump(t *testing.T, databaseURL string, args ...string) {
	t.Helper()
	runProgram(t, "pg_dump", append(args, databaseURL)...)
}

func restore(t *testing.T, databaseURL string, args ...string) {
	t.Helper()
	runProgram(t, "pg_restore", append([]string{"--exit-on-error", "--dbname=" + databaseURL}, args...)...)
}

// runProgram runs a program that was installed with the server.
func runProgram(t *testing.T, name string, args ...string) {
	t.Helper()
	path, ok := pgtest.Server(t).Program(name)
	if !ok {
		need(t, "the server has no "+name, "apt-get install postgresql")
	}
	if output, err := exec.CommandContext(t.Context(), path, args...).CombinedOutput(); err != nil {
		t.Errorf("%s: %v\n%s", name, err, output)
	}
}
