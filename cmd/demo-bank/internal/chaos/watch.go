package chaos

import (
	"context"
	"fmt"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/check"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/storm"
	"github.com/paidonce/idempotency/internal/deadline"
)

const (
	moneyInterval = 100 * time.Millisecond
	auditInterval = 2 * time.Second
	// auditShare keeps the audits, which read all books, from dominating the cluster's work: after
	// each audit the watcher rests this many times as long as the audit took.
	auditShare   = 20
	auditTimeout = 25 * time.Second
)

// watched is [check.MoneyKept] in all reads while the run was at work.
type watched struct {
	findings findings
	reads    atomic.Int64 // of sums
	audits   atomic.Int64
}

func (w *watched) result() check.Result {
	return w.findings.result(check.MoneyKept, "money is neither made nor lost, and no balance is negative", int(w.reads.Load()+w.audits.Load()))
}

// watch observes the money, the audit and the banks' metrics until the returned function is called.
// It also plants expired records.
func (r *run) watch(ctx context.Context) (end func()) {
	ctx, cancel := context.WithCancel(ctx)
	var group sync.WaitGroup
	group.Go(func() { r.watchMoney(ctx) })
	group.Go(func() { r.watchAudit(ctx) })
	group.Go(func() { r.planted.run(ctx) })
	for _, s := range r.banks.slots {
		group.Go(func() {
			client := newScraper()
			for ctx.Err() == nil {
				_, _ = s.scrape(ctx, client) // it may be down
				_ = deadline.Sleep(ctx, scrapeInterval)
			}
		})
	}
	return func() {
		cancel()
		group.Wait()
	}
}

// watchMoney sums the balances again and again, on one conn as long as that lasts.
func (r *run) watchMoney(ctx context.Context) {
	for ctx.Err() == nil {
		// A crash ends the conn, and the loop opens another.
		_ = r.cluster.with(ctx, r.config.DurationMax, func(ctx context.Context, conn *pgx.Conn) error {
			for {
				result, err := check.Money(ctx, conn)
				if err != nil {
					return err
				}
				r.money.reads.Add(1)
				for _, example := range result.Examples {
					r.money.findings.add("at %v: %s", r.clock().Round(time.Millisecond), example)
				}
				if err := deadline.Sleep(ctx, moneyInterval); err != nil {
					return err
				}
			}
		})
		_ = deadline.Sleep(ctx, moneyInterval)
	}
}

// watchAudit gets the banks' audit, as any client may.
func (r *run) watchAudit(ctx context.Context) {
	client := &http.Client{Timeout: auditTimeout, Transport: &http.Transport{DisableKeepAlives: true}}
	for n := 0; ctx.Err() == nil; n++ {
		started := time.Now()
		var audit bank.Audit
		// On an error the bank was down, or busy.
		if err := storm.Get(ctx, client, "http://"+r.banks.address(n%len(r.banks.slots))+"/v1/audit", &audit); err == nil {
			r.money.audits.Add(1)
			if !audit.OK {
				r.money.findings.add("at %v the audit was not ok: %+v", r.clock().Round(time.Millisecond), audit)
			}
		}
		_ = deadline.Sleep(ctx, max(auditInterval, auditShare*time.Since(started)))
	}
}

// takeBaseline measures the banks' resources before their first request, once these do not grow any
// more and the consumers of all banks have joined their groups.
func (r *run) takeBaseline(ctx context.Context) (err error) {
	var last check.Resources
	r.before, err = r.measure(ctx, func(now check.Resources) bool {
		grown := now.Goroutines > last.Goroutines || now.FileDescriptors > last.FileDescriptors
		last = now
		return !grown && r.broker.Joined(ctx, r.config.Banks)
	})
	return err
}

const measureWaitMax = 30 * time.Second

// measure sums the banks' resources once their pools are full and enough returns true, or after
// measureWaitMax.
func (r *run) measure(ctx context.Context, enough func(check.Resources) bool) (check.Resources, error) {
	until := time.Now().Add(measureWaitMax)
	client := newScraper()
	for {
		total, full, err := r.measureOnce(ctx, client)
		late := time.Now().After(until)
		if err == nil && (full && enough(total) || late) {
			return total, nil
		}
		if late {
			return total, fmt.Errorf("measure the banks: %w", err)
		}
		if err := deadline.Sleep(ctx, scrapeInterval); err != nil {
			return total, err
		}
	}
}

func (r *run) measureOnce(ctx context.Context, client *http.Client) (total check.Resources, full bool, err error) {
	pools := 0
	for _, s := range r.banks.slots {
		values, err := s.scrape(ctx, client)
		if err != nil {
			return total, false, err
		}
		total.Goroutines += int(values[metricGoroutines])
		total.FileDescriptors += int(values[metricFileDescriptors])
		pools += int(values[metricConnections])
	}
	err = r.cluster.with(ctx, databaseTimeout, func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, `
			SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend' AND application_name <> $1`, applicationOwn).Scan(&total.Connections)
	})
	// A bank's metric also counts connections that are still being opened, so PostgreSQL must have
	// them too.
	size, leases := poolSizeBig+(len(r.banks.slots)-1)*poolSizeSmall, len(r.banks.slots)
	return total, pools >= size && total.Connections >= size+leases, err
}
