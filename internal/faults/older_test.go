package faults_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"html"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// beforeOpenRequests is the last commit whose programs know nothing of open requests.
const beforeOpenRequests = "40085201a1f249fbc6aef2871ba36923c5c05d1c"

// A bank and an idemctl from before open requests, and a service of these sources whose requests
// stay open, are on one database, as during a deployment. The old programs answer unknown and run
// nothing. They read the rows or fail, and never lose an intent.
func TestOlderProgramsBesideOpenRequests(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "builds older programs")
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	sources := t.TempDir()
	if _, err := checkOut(root, sources, beforeOpenRequests); err != nil {
		t.Skipf("NO OLDER SOURCES (%v): clone with the history (git fetch --unshallow)", err)
	}
	for from, arguments := range map[string][]string{sources: {sources + "/", "./cmd/demo-bank", "./cmd/idemctl"}, root: {sources + "/newer-bank", "./cmd/demo-bank"}} {
		cmd := exec.CommandContext(t.Context(), "go", append([]string{"build", "-buildvcs=false", "-o"}, arguments...)...)
		cmd.Dir = from
		if text, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build: %v\n%s", err, text)
		}
	}
	o := &older{programs: sources, database: pgtest.Database(t)}

	// The old bank makes its tables and serves. A newer program migrates beside it.
	bank := o.start(t, regexp.MustCompile(`demo-bank is at (http://\S+)`), "demo-bank", "--addr=127.0.0.1:0", "--reap-interval=100ms", "--log-level=ERROR")[0] + "/v1/transfers"
	if got := sendTransfer(t, bank, "plain"); !got.is(201, "executed") {
		t.Fatalf("%v", got)
	}
	n := serveCharges(t, o.database, &postgres.Options{Schema: "demo_bank"})
	newer := n.URL + "/v1/transfers"
	paid := sendTransfer(t, newer, "paid")
	if !paid.is(201, "executed") {
		t.Fatalf("%v", paid)
	}
	n.set(true, false)
	keys := []string{"open-1", "open-2", "open-3"}
	for _, key := range keys {
		if got := sendTransfer(t, newer, key); !got.is(503, "unknown") || !strings.Contains(got.body, `"accepted":true`) {
			t.Fatalf("%v", got)
		}
	}
	intents := func() int {
		return count(t, o.database, "SELECT count(*) FROM demo_bank.idempotency_keys JOIN demo_bank.idempotency_open USING (scope, key) JOIN demo_bank.idempotency_effects USING (scope, key) WHERE status = 0")
	}
	transfers := func() int { return count(t, o.database, "SELECT count(*) FROM demo_bank.transfers") }

	// The bank gets the same keys, and then another request with one of them.
	for _, key := range keys {
		if got := sendTransfer(t, bank, key); !got.is(503, "unknown") {
			t.Errorf("%s: %v", key, got)
		}
	}
	if got := sendBody(t, bank, keys[0], strings.Replace(transfer, "7", "8", 1)); got.status < 400 || got.outcome != "mismatch" && got.outcome != "unknown" {
		t.Errorf("another request: %v", got)
	}
	if got := sendTransfer(t, bank, "paid"); !got.is(201, "replayed") || got.body != paid.body {
		t.Errorf("what the new program has recorded: %v", got)
	}
	if got := sendTransfer(t, newer, "plain"); got.status != 201 || got.outcome != "replayed" {
		t.Errorf("what the old program has recorded: %v", got)
	}
	if n := transfers(); n != 1 {
		t.Errorf("the old bank has %d transfers, want 1", n)
	}

	// Tools read the table.
	for _, c := range []struct{ says, command string }{
		{"open-1", "key list"}, {"open-1", "key list --recent"}, {"open-1", "key get public open-1"}, {"live", "stats"}, {"", "top --count=1"}, {"", "gc"}, {"3", "migrate status"},
	} {
		if text, code := o.idemctl(t, c.command); code != 0 || !strings.Contains(text, c.says) {
			t.Errorf("%s: %d\n%s", c.command, code, text)
		}
	}
	if text, code := o.idemctl(t, "doctor"); code != 4 || strings.Contains(text, "fail  schema") { // fsync is off
		t.Errorf("doctor: %d\n%s", code, text)
	}
	// None of them can lose an intent.
	for _, command := range []string{
		"key expire public open-1 --reason=test --yes", "key delete public open-1 --reason=test --yes", "migrate down --to=0 --yes", "migrate down --to=2 --yes",
	} {
		if text, code := o.idemctl(t, command); code == 0 {
			t.Errorf("%s: %d\n%s", command, code, text)
		}
	}
	o.page(t, keys)
	if n := intents(); n != len(keys) {
		t.Fatalf("%d intents are left, want %d", n, len(keys))
	}
	if n := count(t, o.database, "SELECT count(*) FROM demo_bank.idempotency_audit"); n != 0 {
		t.Errorf("%d acts are in the audit table", n)
	}

	// The bank's reaper goes on beside open requests, and its metrics are there.
	for _, key := range []string{"plain", "paid"} {
		if text, code := o.idemctl(t, "key expire public "+key+" --reason=test --yes"); code != 0 {
			t.Errorf("expire %s: %d\n%s", key, code, text)
		}
		await(t, o.database, "the old reaper deletes "+key, "NOT EXISTS (SELECT FROM demo_bank.idempotency_keys WHERE key = $1)", key)
	}
	if n := count(t, o.database, "SELECT count(*) FROM demo_bank.idempotency_effects"); n != len(keys) {
		t.Errorf("%d effects are left, want %d", n, len(keys))
	}
	at := strings.TrimSuffix(bank, "/v1/transfers")
	if text := o.get(t, http.DefaultClient, at+"/metrics"); !strings.Contains(text, "idempotency_") {
		t.Errorf("metrics: %s", text)
	}
	o.get(t, http.DefaultClient, at+"/readyz")

	// The new program ends each of them once, and both know the answers.
	n.set(false, false)
	for begin := time.Now(); intents() > 0; {
		if _, err := n.completer.Once(t.Context()); err != nil || time.Since(begin) > awaitMax {
			t.Fatalf("not completed: %v", err)
		}
	}
	for _, key := range keys {
		got := sendTransfer(t, newer, key)
		if again := sendTransfer(t, bank, key); !got.is(201, "replayed") || again != got {
			t.Errorf("%s: %v, and by the old bank %v", key, got, again)
		}
	}
	const posted = "SELECT count(*) FROM (SELECT key FROM postings GROUP BY key HAVING count(*) = 1) AS p"
	if charges, postings := n.charges(), count(t, o.database, posted); charges != len(keys)+1 || postings != charges {
		t.Errorf("%d charges and %d postings of %d keys", charges, postings, len(keys)+1)
	}
	if n := transfers(); n != 1 {
		t.Errorf("the old bank has %d transfers, want 1", n)
	}
	o.topUps(t, bank, transfers)
}

// topUps runs today's bank beside the old one: its processor is down, so its top-ups stay open, and
// the old bank gets their keys.
func (o *older) topUps(t *testing.T, bank string, transfers func() int) {
	t.Helper()
	newer := o.start(t, regexp.MustCompile(`demo-bank is at (http://\S+)[\s\S]* mails is at (http://\S+)`), "newer-bank", "--addr=127.0.0.1:0", "--log-level=ERROR")
	faults := func(body string) {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPut, newer[1]+"/faults", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		response, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != http.StatusNoContent {
			t.Fatalf("faults: %s", response.Status)
		}
	}
	const topUp = `{"account":"alice","card":"4242","amount":7}`
	keys := []string{"top-up-1", "top-up-2", "top-up-3"}
	before := transfers()
	faults(`{"down":true}`)
	for _, key := range keys {
		if got := sendBody(t, newer[0]+"/v1/topups", key, topUp); !got.is(503, "unknown") {
			t.Fatalf("%v", got)
		}
		if got := sendTransfer(t, bank, key); !got.is(503, "unknown") {
			t.Errorf("by the old bank: %v", got)
		}
		for _, act := range []string{"expire", "delete"} {
			if text, code := o.idemctl(t, "key "+act+" public "+key+" --reason=test --yes"); code == 0 {
				t.Errorf("%s: %d\n%s", act, code, text)
			}
		}
	}
	faults(`{}`)
	await(t, o.database, "the new bank ends its top-ups", "NOT EXISTS (SELECT FROM demo_bank.idempotency_open)")
	for _, key := range keys {
		if got := sendBody(t, newer[0]+"/v1/topups", key, topUp); !got.is(201, "replayed") {
			t.Errorf("%v", got)
		}
	}
	var audit struct {
		Charges  int
		Unposted int `json:"charges_without_posting"`
		Unpaid   int `json:"postings_without_charge"`
	}
	if text := o.get(t, http.DefaultClient, newer[0]+"/v1/audit"); json.Unmarshal([]byte(text), &audit) != nil || audit.Charges != len(keys) || audit.Unposted+audit.Unpaid != 0 {
		t.Errorf("audit: %s", text)
	}
	if n := transfers(); n != before {
		t.Errorf("the old bank has %d transfers, want %d", n, before)
	}
}

// transfer is a request that both programs know.
const transfer = `{"from":"alice","to":"bob","amount":7}`

// older are the old programs, on a database.
type older struct{ programs, database string }

// start runs a program until the test ends, and returns the addresses that it prints.
func (o *older) start(t *testing.T, addresses *regexp.Regexp, program string, arguments ...string) []string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(o.programs, program), append(arguments, "--database-url="+o.database)...)
	cmd.Env = append(os.Environ(), "IDEMCTL_TOKEN="+pageToken)
	said := &transcript{match: addresses, found: make(chan []string, 1)}
	cmd.Stdout, cmd.Stderr = said, said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = cmd.Wait()
	}()
	t.Cleanup(func() { // the context of the test has ended it
		<-ended
		if t.Failed() {
			t.Logf("%s:\n%s", program, said.text())
		}
	})
	select {
	case at := <-said.found:
		return at
	case <-ended:
	case <-time.After(awaitMax):
	}
	t.Fatalf("%s does not start:\n%s", program, said.text())
	return nil
}

// transcript keeps the output of a program, and finds its addresses in it.
type transcript struct {
	mu    sync.Mutex
	all   bytes.Buffer
	match *regexp.Regexp
	found chan []string
}

func (tr *transcript) Write(b []byte) (int, error) {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	tr.all.Write(b)
	if at := tr.match.FindStringSubmatch(tr.all.String()); at != nil && len(tr.found) == 0 {
		tr.found <- at[1:]
	}
	return len(b), nil
}

func (tr *transcript) text() string {
	tr.mu.Lock()
	defer tr.mu.Unlock()
	return tr.all.String()
}

// idemctl runs the old idemctl, and returns its output and exit code.
func (o *older) idemctl(t *testing.T, command string) (text string, code int) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(o.programs, "idemctl"), append(strings.Fields(command), "--schema=demo_bank", "--database-url="+o.database)...)
	output, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(output), cmd.ProcessState.ExitCode()
}

func sendTransfer(t *testing.T, address, key string) reply {
	t.Helper()
	return sendBody(t, address, key, transfer)
}

func sendBody(t *testing.T, address, key, body string) reply {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, address, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Idempotency-Key", key)
	response, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return reply{response.StatusCode, response.Header.Get("Idempotency-Status"), string(text)}
}

// pageToken is what the admin page asks for.
const pageToken = "0123456789abcdef"

// page reads the pages of the old admin page, and tries its forms on the keys.
func (o *older) page(t *testing.T, keys []string) {
	t.Helper()
	at := o.start(t, regexp.MustCompile(`the page is at (http://\S+/);`), "idemctl", "serve", "--addr=127.0.0.1:0", "--schema=demo_bank")[0]
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Jar: jar, Transport: bearer{}}
	for _, page := range []string{"", "list", "stats", "live", "doctor"} {
		if text := o.get(t, client, at+page); page == "list" && !strings.Contains(text, keys[0]) {
			t.Errorf("its list does not have %s", keys[0])
		}
	}
	for _, key := range keys {
		response, err := client.PostForm(at+"search", url.Values{"open": {"1"}, "scope": {"public"}, "key": {key}})
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		token := response.Request.URL.Query().Get("k")
		if response.StatusCode != http.StatusOK || token == "" {
			t.Fatalf("its page of %s: %s %s", key, response.Status, response.Request.URL)
		}
		for _, act := range []string{"expire", "delete"} {
			form := o.get(t, client, at+act+"?k="+url.QueryEscape(token))
			ticket := regexp.MustCompile(`name="ticket" value="([^"]+)"`).FindStringSubmatch(form)
			if ticket == nil {
				t.Fatalf("no form: %s", form)
			}
			response, err := client.PostForm(at+act, url.Values{"ticket": {html.UnescapeString(ticket[1])}, "reason": {"test"}, "confirm": {"delete"}})
			if err != nil {
				t.Fatal(err)
			}
			response.Body.Close()
			if response.StatusCode < http.StatusInternalServerError {
				t.Errorf("its page: %s of %s: %s", act, key, response.Status)
			}
		}
	}
}

type bearer struct{}

func (bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+pageToken)
	return http.DefaultTransport.RoundTrip(r)
}

func (o *older) get(t *testing.T, client *http.Client, address string) string {
	t.Helper()
	response, err := client.Get(address)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusOK {
		t.Errorf("%s: %s, %v", address, response.Status, err)
	}
	return string(text)
}

// charging is a service that charges a card at another service for each POST, and posts it.
type charging struct {
	*httptest.Server
	completer *idempotency.Completer

	mu      sync.Mutex
	isMute  bool // the other service acts, and does not answer
	isDown  bool // it does not
	charged map[string]bool
}

func serveCharges(t *testing.T, databaseURL string, opts *postgres.Options) *charging {
	t.Helper()
	n := &charging{charged: map[string]bool{}}
	store := testservice.Open(t, databaseURL, opts)
	if err := migrations.Up(t.Context(), store, nil); err != nil {
		t.Fatal(err)
	}
	execute(t, databaseURL, "CREATE TABLE postings (key text NOT NULL)")
	charge := effect.New("charge", effect.Effect[string, string]{
		Do: func(_ context.Context, key, in string) (string, error) {
			n.mu.Lock()
			defer n.mu.Unlock()
			if !n.isDown {
				n.charged[key] = true
			}
			if n.isDown || n.isMute {
				return "", errors.New("no reply")
			}
			return "ch_" + in, nil
		},
		Timeout: 5 * time.Second,
	})
	idem := middleware.New(store, func(*http.Request) (string, error) { return "public", nil }, &middleware.Options{Resumable: "transfer/1", BackoffMax: 10 * time.Millisecond})
	handler := idem.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		key, _ := idempotency.KeyFrom(r.Context())
		id, err := charge.Call(r.Context(), key.Value)
		if err != nil {
			return
		}
		if _, err := postgres.Tx(r.Context()).Exec(r.Context(), "INSERT INTO public.postings VALUES ($1)", key.Value); err != nil {
			http.Error(w, "not posted", http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(id)
	}))
	mux := http.NewServeMux()
	mux.Handle("POST /v1/transfers", handler)
	n.Server = httptest.NewServer(mux)
	t.Cleanup(n.Close)
	n.completer = idem.Completer(nil)
	return n
}

func (n *charging) set(isDown, isMute bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.isDown, n.isMute = isDown, isMute
}

func (n *charging) charges() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.charged)
}
