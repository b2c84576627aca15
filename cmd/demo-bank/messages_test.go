//go:build unix

package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/storm"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// Modes 13 and 14 for the bank: consumers and relays that are killed with -9 again and again, while
// transfers are made, leave nothing missing and nothing doubled. The same audit finds the doubles
// of consumers without an inbox: see TestOnlyAnInboxHandlesOnce of package server.
func TestKilledConsumersAndRelaysLoseAndDoubleNothing(t *testing.T) {
	t.Parallel()
	database := pgtest.Database(t)
	p := serve(t, "serve", "--addr", "127.0.0.1:0", "--database-url", database, "--no-relay", "--no-consumers")
	client := newClient(t)

	const payers = 3
	var paid [payers]int64
	var paying sync.WaitGroup
	killed := make(chan struct{}) // closed after the last kill
	for i := range payers {
		paying.Go(func() {
			for ; !isClosed(killed); paid[i]++ {
				body := fmt.Sprintf(`{"from":"acct-%04d","to":"bob","amount":7}`, i)
				response, _, err := post(client, p.url, uuid.NewString(), body)
				if err != nil || response.StatusCode != http.StatusCreated {
					t.Errorf("transfer: %v %v", response, err)
					return
				}
				time.Sleep(100 * time.Millisecond) // so that few are left after the last kill
			}
		})
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String() // of each process of the consumers
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, end := context.WithCancel(t.Context())
	defer end()
	audit := func() (a bank.Audit) {
		if err := storm.Get(ctx, client, p.url+"/v1/audit", &a); err != nil {
			t.Errorf("audit: %v", err)
		}
		if !a.OK {
			t.Errorf("audit is %+v", a)
		}
		return a
	}
	beside := func(name string, args ...string) *program {
		return start(t, command(context.Background(), append([]string{name, "--database-url", database, "--log-level", "WARN"}, args...)...))
	}
	for life := range 3 {
		relay, consumers := beside("relay"), beside("consume", "--addr", address)
		before := audit().MessagesConsumed
		eventually(t, fmt.Sprintf("the consumers of life %d handle messages", life), func() bool {
			return audit().MessagesConsumed > before
		})
		relay.kill()
		consumers.kill()
	}
	close(killed)
	paying.Wait()
	beside("relay")
	beside("consume", "--addr", address)
	all := int64(0)
	for _, number := range paid {
		all += number
	}
	eventually(t, "all messages are handled", func() bool { return audit().MessagesConsumed == 2*all })
	var a bank.Audit
	eventually(t, "the projection is judged", func() bool {
		a = audit()
		return a.OutboxPending == 0 && a.ProjectionLag != nil && *a.ProjectionLag == 0
	})
	if a.ProjectionMissing != 0 || a.ProjectionDoubled != 0 || a.ProjectionMismatches != 0 || a.MessagesDead != 0 {
		t.Errorf("audit is %+v", a)
	}
	for i := range payers {
		var s struct {
			BalanceChange int64 `json:"balance_change"`
		}
		if err := storm.Get(ctx, client, fmt.Sprintf("%s%sacct-%04d", p.url, bank.StatementsPath, i), &s); err != nil || s.BalanceChange != -7*paid[i] {
			t.Errorf("account %d changed by %d after %d transfers: %v", i, s.BalanceChange, paid[i], err)
		}
	}
}
