//go:build unix

package main

import (
	"bytes"
	"encoding/json"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"sync/atomic"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/storm"
	"github.com/paidonce/idempotency/internal/pgtest"
)

func connect(t *testing.T, database string) *pgxpool.Pool {
	t.Helper()
	return pgtest.Pool(t, database, map[string]string{"search_path": bank.Schema})
}

// transfersMade returns the number of transfers in a bank's books, or -1 if it does not answer.
func transfersMade(client *http.Client, url string) int64 {
	response, err := client.Get(url + "/v1/audit")
	if err != nil {
		return -1
	}
	defer response.Body.Close()
	var audit bank.Audit
	if json.NewDecoder(response.Body).Decode(&audit) != nil {
		return -1
	}
	return audit.Transfers
}

// TestAStormOutlivesFiveKills: bank and PostgreSQL are killed with -9 five times during a storm,
// and started again on the same data folder. Nothing is paid twice, and nothing acknowledged is
// lost.
func TestAStormOutlivesFiveKills(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "kills and restarts a bank five times")
	const keys, kills = 1200, 5
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := listener.Addr().String()
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	dir, client := pgtest.Folder(t), newClient(t)
	start := func() *program { return serve(t, "--addr", address, "--data-dir", dir, "--log-level", "ERROR") }
	p := start()

	type ending struct {
		report *storm.Report
		err    error
	}
	ended := make(chan ending, 1)
	go func() {
		report, err := storm.Run(t.Context(), storm.Config{
			URL: "http://" + address, Keys: keys, Copies: 4, Clients: 16, Patience: waitMax,
		})
		ended <- ending{report, err}
	}()
	for n := range kills {
		// Each run of the bank makes a part of the transfers, so that each kill comes during the
		// storm.
		due := int64(keys * (n + 1) / (kills + 2))
		eventually(t, "the storm goes on", func() bool { return transfersMade(client, p.url) >= due })
		p.kill()
		if len(ended) > 0 {
			t.Fatalf("the storm was over before kill %d", n+1)
		}
		client.CloseIdleConnections()
		p = start()
	}
	got := <-ended
	if got.err != nil {
		t.Fatal(got.err)
	}
	var text bytes.Buffer
	if err := got.report.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", text.String())
	if !got.report.OK() || got.report.Audit.Transfers != keys || got.report.KeysAcknowledged != keys || len(got.report.NotSeen) > 0 {
		t.Error("the storm broke the bank")
	}
	p.terminate()
	if code := p.exitCode(); code != 0 {
		t.Errorf("exit code is %d:\n%s", code, p.stderr.String())
	}
}

// TestTwoBanksOnOneDatabaseUnderAStorm: two processes start on an empty database at the same time
// and share its keys and money. The storm's requests alternate between them, so that the copies of
// a transfer meet both.
func TestTwoBanksOnOneDatabaseUnderAStorm(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "starts two banks and a storm")
	const keys = 300
	database := pgtest.Database(t)
	start := func() func() *program {
		return launch(t, "--addr", "127.0.0.1:0", "--database-url", database, "--pool-size", "16")
	}
	one, other := start(), start()
	banks := []*program{one(), other()}
	var addresses []*url.URL
	for _, p := range banks {
		address, err := url.Parse(p.url)
		if err != nil {
			t.Fatal(err)
		}
		addresses = append(addresses, address)
	}
	var requests atomic.Int64
	balancer := httptest.NewServer(&httputil.ReverseProxy{
		Rewrite:  func(r *httputil.ProxyRequest) { r.SetURL(addresses[int(requests.Add(1))%len(addresses)]) },
		ErrorLog: log.New(io.Discard, "", 0), // the storm's clients hang up
	})
	defer balancer.Close()
	report, err := storm.Run(t.Context(), storm.Config{
		URL: balancer.URL, Keys: keys, Copies: 4, Clients: 16, Patience: waitMax,
	})
	if err != nil {
		t.Fatal(err)
	}
	if !report.OK() || len(report.NotSeen) > 0 || report.Mismatches != keys/100 {
		t.Errorf("verdict is %s: %v %v; %d mismatches, not seen: %v", report.Verdict, report.Broken, report.Examples, report.Mismatches, report.NotSeen)
	}
	if report.KeysAcknowledged != keys || report.Audit.Transfers != keys {
		t.Errorf("%d of %d keys were acknowledged, and %d transfers made", report.KeysAcknowledged, keys, report.Audit.Transfers)
	}
	if report.LostReplies == 0 || report.Retries == 0 || report.P50MS <= 0 || report.P99MS < report.P50MS {
		t.Errorf("the storm lost %d replies, retried %d times, p50 %v ms, p99 %v ms", report.LostReplies, report.Retries, report.P50MS, report.P99MS)
	}
	for _, p := range banks {
		p.terminate()
		if code := p.exitCode(); code != 0 {
			t.Errorf("exit code is %d:\n%s", code, p.stderr.String())
		}
	}
}

// TestStormPrintsOneObject: with --json, stdout has one JSON object and nothing else, and the exit
// code is the verdict.
func TestStormPrintsOneObject(t *testing.T) {
	t.Parallel()
	p := serve(t, "--addr", "127.0.0.1:0", "--database-url", pgtest.Database(t), "--pool-size", "16")
	cmd := command(t.Context(), "storm", "--url", p.url, "--keys", "100", "--clients", "8", "--json", "--seed", "3")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	output, err := cmd.Output()
	if err != nil {
		t.Fatalf("storm: %v\n%s%s", err, output, stderr.String())
	}
	var object map[string]any
	if err := json.Unmarshal(output, &object); err != nil {
		t.Fatalf("%s: %v", output, err)
	}
	for _, name := range []string{"verdict", "executed", "replayed", "in_progress", "mismatches", "retries", "lost_replies", "p50_ms", "p99_ms", "audit"} {
		if _, ok := object[name]; !ok {
			t.Errorf("the object has no %s", name)
		}
	}
	if object["verdict"] != "ok" || object["mismatches"] != 1.0 || stderr.Len() > 0 {
		t.Errorf("it says %s, and on stderr %s", output, stderr.String())
	}
}
