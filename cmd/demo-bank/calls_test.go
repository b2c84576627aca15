//go:build unix

package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/internal/crashpoint"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// calling is a request that calls the processor.
type calling struct {
	path, body string
	table      string // of its rows
	list       string // of the processor
}

var (
	topUp  = calling{bank.TopUpsPath, `{"account":"alice","card":"tok_visa","amount":7}`, "topups", "/charges"}
	payOut = calling{bank.PayoutsPath, `{"account":"alice","iban":"DE1","amount":7}`, "payouts", "/payouts"}
)

// auditOf returns the audit of a bank.
func auditOf(t *testing.T, client *http.Client, url string) (audit bank.Audit) {
	t.Helper()
	response, err := client.Get(url + "/v1/audit")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if err := json.NewDecoder(response.Body).Decode(&audit); err != nil {
		t.Fatal(err)
	}
	return audit
}

// due makes open requests due, as if their leases had run out.
func due(t *testing.T, db *pgxpool.Pool) {
	t.Helper()
	if _, err := db.Exec(t.Context(), `UPDATE idempotency_open SET next_at = now()`); err != nil {
		t.Fatal(err)
	}
}

// paidOnce waits until no request is open, and requires that the processor and the books have the
// request this many times.
func paidOnce(t *testing.T, p, psp string, db *pgxpool.Pool, c calling, want int) {
	t.Helper()
	client := newClient(t)
	var audit bank.Audit
	eventually(t, "nothing is open", func() bool {
		due(t, db)
		audit = auditOf(t, client, p)
		return audit.OpenOperations == 0
	})
	response, err := client.Get(psp + c.list)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	var list struct{ Items []json.RawMessage }
	if err := json.NewDecoder(response.Body).Decode(&list); err != nil {
		t.Fatal(err)
	}
	var rows int
	if err := db.QueryRow(t.Context(), `SELECT count(*) FROM `+c.table).Scan(&rows); err != nil {
		t.Fatal(err)
	}
	if !audit.OK || audit.PSP == bank.ProcessorUnreachable || audit.ParkedOperations != 0 || audit.HeldTotal != "0" || len(list.Items) != want || rows != want {
		text, _ := json.Marshal(audit)
		t.Errorf("the processor has %d, the books %d, want %d; the audit says %s", len(list.Items), rows, want, text)
	}
}

// TestBankKilledAtEachPointOfACallPaysOnce: the bank is killed with -9 at each point of a top-up
// and of a payout, and nobody retries. The next bank ends the request, and the processor and the
// books have it once. A retry gets the one answer.
func TestBankKilledAtEachPointOfACallPaysOnce(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "kills many banks")
	for _, name := range crashpoint.BankCalls() {
		t.Run("topup "+name, func(t *testing.T) {
			t.Parallel()
			killedAt(t, topUp, name, 1)
		})
		t.Run("payout "+name, func(t *testing.T) {
			t.Parallel()
			killedAt(t, payOut, name, 1)
		})
	}
	for _, name := range []string{crashpoint.BeforeIntent, crashpoint.IntentSent} { // of the call, after the hold
		t.Run("payout, second "+name, func(t *testing.T) {
			t.Parallel()
			killedAt(t, payOut, name, 2)
		})
	}
}

func killedAt(t *testing.T, c calling, name string, nth int) {
	database, psp := pgtest.Database(t), servePSP(t, "--addr", "127.0.0.1:0")
	point := fmt.Sprintf("%s:%d", name, nth)
	first, firstName := point, name
	left := name == crashpoint.TakeOver || name == crashpoint.CompleterBatch
	if left { // they need an open request
		first, firstName = crashpoint.BeforeSend+":1", crashpoint.BeforeSend
	}
	p := bankOn(t, first, database, "--psp", psp.url)
	db := connect(t, database)
	if response, body, err := postTo(newClient(t), p.url+c.path, crashKey, c.body); err == nil {
		t.Errorf("the client of a bank that was to die got an answer: %d %s", response.StatusCode, body)
	}
	p.diesAt(firstName)
	if left {
		due(t, db)
		start(t, crashCommand(point, database, "--psp", psp.url)).diesAt(name) // perhaps before it serves
	}
	again := bankOn(t, "", database, "--psp", psp.url)
	switch {
	case name == crashpoint.IntentSent && nth == 1: // its COMMIT may still be on its way
	case name == crashpoint.BeforeIntent && nth == 1:
		paidOnce(t, again.url, psp.url, db, c, 0)
	default:
		paidOnce(t, again.url, psp.url, db, c, 1)
	}
	var outcomes, bodies []string
	for range 2 {
		eventually(t, "the retry has a final answer", func() bool {
			due(t, db)
			response, body, err := postTo(newClient(t), again.url+c.path, crashKey, c.body)
			if err != nil {
				t.Fatal(err)
			}
			outcome := response.Header.Get("Idempotency-Status")
			if outcome == "unknown" || outcome == "in-progress" {
				return false
			}
			if response.StatusCode != http.StatusCreated {
				t.Errorf("the retry got %d %s %s", response.StatusCode, outcome, body)
			}
			outcomes, bodies = append(outcomes, outcome), append(bodies, string(body))
			return true
		})
	}
	if outcomes[1] != "replayed" || bodies[0] != bodies[1] {
		t.Errorf("the retries got %q %q", outcomes, bodies)
	}
	paidOnce(t, again.url, psp.url, db, c, 1)
}

// TestEveryLineIsOutBeforeTheBankIsReady: once the bank is ready it has printed the processor's
// URL, and the processor serves there.
func TestEveryLineIsOutBeforeTheBankIsReady(t *testing.T) {
	t.Parallel()
	for name, args := range map[string][]string{"inside": nil, "given": {"--psp", servePSP(t, "--addr", "127.0.0.1:0").url}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			client := newClient(t)
			status := func(url string) int {
				response, err := client.Get(url)
				if err != nil {
					return 0
				}
				defer response.Body.Close()
				return response.StatusCode
			}
			stdout, address := startUntilReady(t, status, args...)
			said, err := os.ReadFile(stdout)
			if err != nil {
				t.Fatal(err)
			}
			line := regexp.MustCompile(`(?m)^The processor of its cards, payouts and mails is at (http://\S+) \(.+\)$`).FindSubmatch(said)
			if line == nil || !bytes.Contains(said, []byte("demo-bank storm --url http://"+address)) {
				t.Fatalf("it has said\n%s", said)
			}
			psp := string(line[1])
			if len(args) > 0 && psp != args[1] {
				t.Errorf("the processor is %s, want %s", psp, args[1])
			}
			if got := status(psp + "/faults"); got != http.StatusOK {
				t.Errorf("GET %s/faults is %d", psp, got)
			}
		})
	}
}

// startUntilReady starts a bank at a free port and waits until /readyz is 200. It returns the file
// with the bank's output, and its address.
func startUntilReady(t *testing.T, status func(url string) int, args ...string) (stdout, address string) {
	t.Helper()
	database := pgtest.Database(t)
	for range 10 { // another program may take the port in between
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		address = listener.Addr().String()
		if err := listener.Close(); err != nil {
			t.Fatal(err)
		}
		file, err := os.CreateTemp(t.TempDir(), "stdout")
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		cmd := command(t.Context(), append([]string{"--addr", address, "--database-url", database, "--pool-size", "4"}, args...)...)
		cmd.Stdout = file
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			_ = cmd.Wait() // it is killed below
		}()
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			<-ended
		})
		ready := false
		eventually(t, "the bank is ready, or has ended", func() bool {
			ready = status("http://"+address+"/readyz") == http.StatusOK
			return ready || isClosed(ended)
		})
		if ready {
			return file.Name(), address
		}
	}
	t.Fatal("no bank became ready")
	return "", ""
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// TestProcessorOfTheBankSurvivesKill9OfBoth: with a data folder the charges are still there after
// kill -9, and open requests are ended.
func TestProcessorOfTheBankSurvivesKill9OfBoth(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "starts banks with a PostgreSQL of their own")
	dir := pgtest.Folder(t)
	cmd := command(t.Context(), "--addr", "127.0.0.1:0", "--data-dir", dir, "--log-level", "ERROR")
	cmd.Env = append(cmd.Env, crashpoint.BankVariable+"="+crashpoint.AfterReply+":2")
	p := start(t, cmd).await()
	instance := auditOf(t, newClient(t), p.url).PSP
	for _, key := range []string{"one", "two"} {
		response, body, err := postTo(newClient(t), p.url+topUp.path, key, topUp.body)
		if key == "one" && (err != nil || response.StatusCode != http.StatusCreated) {
			t.Fatalf("%v %s", err, body)
		}
	}
	p.diesAt(crashpoint.AfterReply)
	again := serve(t, "--addr", "127.0.0.1:0", "--data-dir", dir, "--log-level", "ERROR")
	client := newClient(t)
	var audit bank.Audit
	eventually(t, "nothing is open", func() bool {
		audit = auditOf(t, client, again.url)
		return audit.OpenOperations == 0
	})
	if !audit.OK || audit.PSP != instance || audit.Charges == nil || *audit.Charges != 2 {
		text, _ := json.Marshal(audit)
		t.Errorf("the instance was %s, and the audit says %s", instance, text)
	}
	again.terminate()
	if code := again.exitCode(); code != 0 {
		t.Errorf("exit code is %d:\n%s", code, again.stderr.String())
	}
}

// TestProcessorThatCannotBeUsed: a wrong --psp or an unreadable file of the processor inside ends
// the bank with one line. A processor that does not serve yet is no error.
func TestProcessorThatCannotBeUsed(t *testing.T) {
	t.Parallel()
	database := pgtest.Database(t)
	for _, url := range []string{"127.0.0.1:8090", "ftp://127.0.0.1", "http://", "://"} {
		if line := fails(t, "--addr", "127.0.0.1:0", "--database-url", database, "--psp", url); !strings.Contains(line, "--psp") {
			t.Errorf("--psp %s: %s", url, line)
		}
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "processor.jsonl"), []byte("not a processor's\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := command(t.Context(), "--addr", "127.0.0.1:0", "--database-url", database, "--data-dir", dir)
	output, err := cmd.CombinedOutput()
	if text := string(output); err == nil || !strings.Contains(text, "used only by the processor inside") || !strings.Contains(text, "the processor inside can't start") {
		t.Errorf("%v:\n%s", err, text)
	}
	// The processor may start later: the bank is ready without it.
	p := serve(t, "--addr", "127.0.0.1:0", "--database-url", database, "--psp", "http://127.0.0.1:1", "--pool-size", "4")
	audit := auditOf(t, newClient(t), p.url)
	if !audit.OK || audit.PSP != bank.ProcessorUnreachable {
		t.Errorf("audit is %+v", audit)
	}
	response, body, err := postTo(newClient(t), p.url+topUp.path, "k", topUp.body)
	if err != nil || response.StatusCode != http.StatusServiceUnavailable || !bytes.Contains(body, []byte(`"accepted":true`)) {
		t.Errorf("%v %s", err, body)
	}
}
