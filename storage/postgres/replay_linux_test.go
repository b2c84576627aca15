package postgres_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

// BenchmarkReplay compares three requests with a GET by id: the replay of a key that another
// process recorded (claim and ROLLBACK), the replay of a key that this process knows (a look-up)
// and, for scale, a POST with the same body and headers that is answered without this library and
// without a database. The clients send at the same time, over real HTTP, and the answers have about
// 200 bytes. Each of the b.N rounds sends all kinds of request in random order, and compares them
// with the GET of the same round. The results are medians and quartiles of two ratios: of requests
// per second, and of requests per second of CPU time (client, service and PostgreSQL). The two
// agree on an idle machine. On a busy one only the second is reliable.
//
//	go test -run '^$' -bench Replay -benchtime 100x ./storage/postgres
func BenchmarkReplay(b *testing.B) {
	for _, clients := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("clients=%d", clients), func(b *testing.B) { benchmarkReplay(b, clients) })
	}
}

const benchKeys, benchRound = 64, 40 * time.Millisecond

func benchmarkReplay(b *testing.B, clients int) {
	ctx := context.Background()
	bundle := setup(b, &setupOptions{store: &postgres.Options{AcquireTimeout: time.Minute}, configure: func(c *pgxpool.Config) { c.MaxConns, c.MinConns = 16, 16 }})
	if _, err := bundle.pool.Exec(ctx, `CREATE TABLE transfers (id bigint PRIMARY KEY, debit text NOT NULL, credit text NOT NULL, amount bigint NOT NULL, created_at timestamptz NOT NULL);
		INSERT INTO transfers SELECT n, 'acct-0001', 'acct-0002', n, now() FROM generate_series(1, 1000) n`); err != nil {
		b.Fatal(err)
	}

	type transfer struct {
		ID        int64     `json:"id,string"`
		From      string    `json:"from"`
		To        string    `json:"to"`
		Amount    int64     `json:"amount"`
		Reference string    `json:"reference"`
		CreatedAt time.Time `json:"created_at"`
	}
	write := func(w http.ResponseWriter, status int, one transfer) {
		one.Reference = strings.Repeat("r", 60)
		body, _ := json.Marshal(one)
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		_, _ = w.Write(body)
	}
	started := time.Now()
	scope := func(*http.Request) (string, error) { return "acme", nil }
	pay := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		write(w, http.StatusCreated, transfer{ID: 1, From: "acct-0001", To: "acct-0002", Amount: 1, CreatedAt: time.Now()})
	})
	mux := http.NewServeMux()
	mux.HandleFunc("GET /transfers/{id}", func(w http.ResponseWriter, r *http.Request) {
		var one transfer
		if err := bundle.pool.QueryRow(r.Context(), "SELECT id, debit, credit, amount, created_at FROM transfers WHERE id = $1", r.PathValue("id")).
			Scan(&one.ID, &one.From, &one.To, &one.Amount, &one.CreatedAt); err != nil {
			b.Error(err)
		}
		write(w, http.StatusOK, one)
	})
	mux.Handle("POST /unhinted", middleware.New(unhinted{bundle.store}, scope, nil).Handler(pay))
	mux.Handle("POST /hinted", middleware.New(bundle.store, scope, nil).Handler(pay))
	mux.HandleFunc("POST /bare", func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.Header().Set("Idempotent-Replayed", "true")
		w.Header().Set("Idempotency-Created-At", "2025-07-01T12:00:00Z")
		w.Header().Set("Idempotency-Expires-At", "2025-07-02T12:00:00Z")
		w.Header().Set("Idempotency-Status", "replayed")
		write(w, http.StatusCreated, transfer{ID: 1, From: "acct-0001", To: "acct-0002", Amount: 1, CreatedAt: started})
	})
	server := httptest.NewServer(mux)
	defer server.Close()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: clients}}
	defer client.CloseIdleConnections()

	send := func(kind string, n int) {
		var r *http.Request
		if kind == "get" {
			r, _ = http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("%s/transfers/%d", server.URL, 1+n), nil)
		} else {
			r, _ = http.NewRequestWithContext(ctx, http.MethodPost, server.URL+"/"+kind, strings.NewReader(`{"from":"acct-0001","to":"acct-0002","amount":1}`))
			r.Header.Set("Idempotency-Key", fmt.Sprintf("%s-%d", kind, n))
			r.Header.Set("Content-Type", "application/json")
		}
		response, err := client.Do(r)
		if err != nil {
			b.Error(err)
			return
		}
		_, _ = io.Copy(io.Discard, response.Body)
		_ = response.Body.Close()
		if status := response.Header.Get("Idempotency-Status"); response.StatusCode >= 300 || status != "" && status != "replayed" && status != "executed" {
			b.Errorf("%s: %d %s", kind, response.StatusCode, status)
		}
	}
	backends := backendsOf(b, bundle.pool)
	type rate struct{ wall, cpu, goUS, pgUS float64 }
	perSecond := func(kind string) rate {
		goBefore, pgBefore := cpuTime(b, backends)
		var sent atomic.Int64
		var group sync.WaitGroup
		started := time.Now()
		for range clients {
			group.Go(func() {
				for time.Since(started) < benchRound {
					send(kind, rand.IntN(benchKeys))
					sent.Add(1)
				}
			})
		}
		group.Wait()
		n := float64(sent.Load())
		goAfter, pgAfter := cpuTime(b, backends)
		goUS, pgUS := (goAfter-goBefore).Seconds()*1e6/n, (pgAfter-pgBefore).Seconds()*1e6/n
		return rate{n / time.Since(started).Seconds(), 1e6 / (goUS + pgUS), goUS, pgUS}
	}
	kinds := []string{"get", "unhinted", "hinted", "bare"}
	for _, kind := range kinds { // recorded, and warm
		for n := range benchKeys {
			send(kind, n)
		}
		perSecond(kind)
	}
	rates, ratios, cpuRatios := map[string][]float64{}, map[string][]float64{}, map[string][]float64{}
	goUS, pgUS := map[string][]float64{}, map[string][]float64{}
	for b.Loop() {
		round := map[string]rate{}
		for _, i := range rand.Perm(len(kinds)) {
			round[kinds[i]] = perSecond(kinds[i])
		}
		for _, kind := range kinds {
			rates[kind] = append(rates[kind], round[kind].wall)
			goUS[kind] = append(goUS[kind], round[kind].goUS)
			pgUS[kind] = append(pgUS[kind], round[kind].pgUS)
			ratios[kind] = append(ratios[kind], round[kind].wall/round["get"].wall)
			cpuRatios[kind] = append(cpuRatios[kind], round[kind].cpu/round["get"].cpu)
		}
	}
	b.ReportMetric(0, "ns/op") // the length of a round means nothing
	for _, kind := range kinds {
		for unit, figures := range map[string][]float64{"req/s": rates[kind], "go-us": goUS[kind], "pg-us": pgUS[kind], "x-get": ratios[kind], "x-get-by-cpu": cpuRatios[kind]} {
			slices.Sort(figures)
			for q, name := range []string{"", ":q1", "", ":q3"} {
				if q == 2 || name != "" && strings.HasPrefix(unit, "x") && kind != "get" {
					b.ReportMetric(figures[(len(figures)-1)*q/4], kind+"-"+unit+name)
				}
			}
		}
	}
}

// backendsOf returns the files with the CPU times of the backends of pools that have made all their
// connections.
func backendsOf(b *testing.B, pools ...*pgxpool.Pool) (files []string) {
	for _, pool := range pools {
		var conns []*pgxpool.Conn
		for range pool.Config().MaxConns {
			conn, err := pool.Acquire(context.Background())
			if err != nil {
				b.Fatal(err)
			}
			conns = append(conns, conn)
			files = append(files, fmt.Sprintf("/proc/%d/schedstat", conn.Conn().PgConn().PID()))
		}
		for _, conn := range conns {
			conn.Release()
		}
	}
	return files
}

// cpuTime returns the CPU time that this process and the backends have used.
func cpuTime(b *testing.B, backends []string) (ours, postgres time.Duration) {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	for _, file := range backends {
		stat, err := os.ReadFile(file)
		if err != nil {
			b.Fatal(err)
		}
		var ns int64
		if _, err := fmt.Sscan(string(stat), &ns); err != nil {
			b.Fatal(err)
		}
		postgres += time.Duration(ns)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano()), postgres
}

// unhinted is a store that never knows a key: each replay is one of a key that another process
// recorded.
type unhinted struct{ *postgres.Store }

func (s unhinted) Begin(ctx context.Context, claim *idempotency.Claim) (idempotency.Attempt, *idempotency.Record, error) {
	postgres.ForgetRecentKey(s.Store, claim.Key)
	return s.Store.Begin(ctx, claim)
}
