package server

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/client/pgintent"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/internal/pgtest"
)

const (
	payers         = 64
	terminateEvery = 100                   // operations
	againMax       = 20 * time.Millisecond // from an error to the caller's next try
)

var operations = flag.Int("operations", 2000, "how many operations go through the proxy")

// setupShedding runs a bank with a pool so small that it sheds now and then.
func setupShedding(t *testing.T) *bundle {
	t.Helper()
	return setup(t, func(c *Config) { c.PoolSize, c.AcquireTimeout = 8, 20*time.Millisecond })
}

// options configure a Transport that gives up soon, to test its errors more than its patience.
func options(intents client.IntentStore) *client.Options {
	return &client.Options{
		Honours: client.Everywhere, Intents: intents, BackoffFirst: 2 * time.Millisecond, BackoffMax: 20 * time.Millisecond,
		RetryAfterMax: 10 * time.Millisecond, AttemptTimeout: 2 * time.Second, AttemptsMax: 3, RetryPercent: 60,
	}
}

// openIntents returns a store in a database that is not the bank's. Another process may take the
// intents of a killed one at once.
func openIntents(ctx context.Context, database string) (*pgintent.Store, *pgxpool.Pool, error) {
	config, err := pgxpool.ParseConfig(database)
	if err != nil {
		return nil, nil, err
	}
	config.MaxConns = 8
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, nil, err
	}
	return pgintent.New(pool, &pgintent.Options{PendingAfter: time.Microsecond}), pool, pgintent.Create(ctx, pool, nil)
}

// authorized adds the credential that an intent must not keep.
type authorized struct{ base http.RoundTripper }

func (a authorized) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer demo-acme")
	return a.base.RoundTrip(r)
}

func (a authorized) CloseIdleConnections() { a.base.(*http.Transport).CloseIdleConnections() }

func newBase() authorized {
	return authorized{&http.Transport{MaxIdleConnsPerHost: payers, DisableCompression: true}}
}

func transferBody(i int, reference string) string {
	from := i % 1000
	return fmt.Sprintf(`{"from":"acct-%04d","to":"acct-%04d","amount":1,"currency":"EUR","reference":%q}`, from, (from+1+i%7)%1000, reference)
}

// payer is a caller that trusts the client's errors: after ErrUnknown it repeats the key, and after
// ErrNotExecuted it makes a new request with a new key.
type payer struct {
	http    *http.Client
	url     string
	unknown atomic.Int64
	anew    atomic.Int64
}

// pay pays once, and returns the transfer's id.
func (p *payer) pay(ctx context.Context, body string) (id string, err error) {
	key := ""
	for ctx.Err() == nil {
		requestCtx := ctx
		if key != "" {
			requestCtx = client.WithKey(ctx, key)
		}
		r, err := http.NewRequestWithContext(requestCtx, http.MethodPost, p.url+"/v1/transfers", strings.NewReader(body))
		if err != nil {
			return "", err
		}
		r.Header.Set("Content-Type", "application/json")
		response, err := p.http.Do(r)
		var failed *client.Error
		switch {
		case errors.As(err, &failed) && errors.Is(err, client.ErrUnknown):
			p.unknown.Add(1)
			key = failed.Key.Value
		case errors.Is(err, client.ErrNotExecuted):
			p.anew.Add(1)
			key = ""
		case err != nil:
			return "", err
		default:
			return transferOf(response)
		}
		time.Sleep(rand.N(againMax)) // a caller does other things before it tries again
	}
	return "", ctx.Err()
}

func transferOf(response *http.Response) (id string, err error) {
	defer func() { _ = response.Body.Close() }() // it is in memory
	content, err := io.ReadAll(response.Body)
	if err != nil {
		return "", err
	}
	outcome := response.Header.Get("Idempotency-Status")
	if response.StatusCode != http.StatusCreated || outcome != "executed" && outcome != "replayed" {
		return "", fmt.Errorf("answer is %d %s %s", response.StatusCode, outcome, content)
	}
	var transfer bank.Transfer
	if err := json.Unmarshal(content, &transfer); err != nil {
		return "", err
	}
	return transfer.ID, nil
}

// TestOperationsThroughTheProxyPayOnce: the network loses, doubles, delays and cuts messages, and
// PostgreSQL terminates the bank's connections. Each operation is paid once and none is lost. The
// client's errors are true, because its caller acts on them.
func TestOperationsThroughTheProxyPayOnce(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "pays while connections break")
	b := setupShedding(t)
	p := startProxy(t, b)
	intents, pool, err := openIntents(t.Context(), pgtest.Database(t))
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	var attempts, lost atomic.Int64
	o := options(intents)
	o.Trace = func(_ context.Context, e client.Event) {
		switch e.Kind {
		case client.EventStarted:
			attempts.Add(1)
		case client.EventLost:
			lost.Add(1)
		case client.EventKept:
			t.Errorf("an intent was kept: %v", e.Err)
		}
	}
	transport := client.New(newBase(), o)
	defer transport.CloseIdleConnections()
	payer := &payer{http: &http.Client{Transport: transport}, url: "http://" + p.address}

	due := make(chan struct{}, 1)
	var breaking sync.WaitGroup
	var terminated int64
	breaking.Go(func() { terminated = terminate(t, b, due) })
	started := time.Now()
	ids := make([]string, *operations)
	var next atomic.Int64
	var group sync.WaitGroup
	for range payers {
		group.Go(func() {
			for i := int(next.Add(1)) - 1; i < len(ids); i = int(next.Add(1)) - 1 {
				id, err := payer.pay(t.Context(), transferBody(i, fmt.Sprintf("op-%06d", i)))
				if err != nil {
					t.Errorf("operation %d: %v", i, err)
					return
				}
				ids[i] = id
				if i%terminateEvery == 0 {
					select {
					case due <- struct{}{}:
					default: // the last one is still running
					}
				}
			}
		})
	}
	group.Wait()
	took := time.Since(started)
	close(due)
	breaking.Wait()

	t.Logf("%d operations in %v: %d attempts, %d lost, %d ends as unknown, %d as not executed and made anew, %d backends terminated; proxy: %v",
		len(ids), took.Round(time.Millisecond), attempts.Load(), lost.Load(), payer.unknown.Load(), payer.anew.Load(), terminated, p.counts())
	pending, err := intents.Pending(t.Context())
	if err != nil || len(pending) > 0 {
		t.Errorf("%d intents are left (%v)", len(pending), err)
	}
	expectOnce(t, b, ids)
	if payer.unknown.Load() == 0 || payer.anew.Load() == 0 {
		t.Error("the client's errors were not put to the proof")
	}
}

// expectOnce compares the bank's books with the acknowledged ids.
func expectOnce(t *testing.T, b *bundle, ids []string) {
	t.Helper()
	rows, err := b.db.Query(t.Context(), `SELECT reference, id::text FROM transfers WHERE reference LIKE 'op-%' ORDER BY reference`)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	found := map[string][]string{}
	for rows.Next() {
		var reference, id string
		if err := rows.Scan(&reference, &id); err != nil {
			t.Fatal(err)
		}
		found[reference] = append(found[reference], id)
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	for i, id := range ids {
		if got := found[fmt.Sprintf("op-%06d", i)]; len(got) != 1 || got[0] != id {
			t.Errorf("operation %d: transfers %v are in the books, %s was acknowledged", i, got, id)
		}
	}
	if len(found) != len(ids) {
		t.Errorf("%d operations are in the books, want %d", len(found), len(ids))
	}
	if audit := b.audit(); !audit.OK || audit.KeysWithManyTransfers != 0 {
		t.Errorf("audit is %+v", audit)
	}
}

// terminate terminates one of the bank's connections for each value of due, and returns the number
// terminated.
func terminate(t *testing.T, b *bundle, due <-chan struct{}) (terminated int64) {
	for range due {
		tag, err := b.db.Exec(t.Context(), `SELECT pg_terminate_backend(pid) FROM pg_stat_activity
			WHERE datname = current_database() AND application_name <> $1 AND backend_type = 'client backend'
			AND (query LIKE '%transfers%' OR query LIKE '%idempotency_keys%' OR query ILIKE 'commit%') ORDER BY random() LIMIT 1`, testerName)
		if err != nil {
			t.Error(err)
			continue
		}
		terminated += tag.RowsAffected()
	}
	return terminated
}

// childVariable makes the test binary a client: "<bank's URL> <database of intents> <round>".
const childVariable = "PAIDONCE_CLIENTPROOF_CHILD"

const (
	rounds     = 12
	childPlays = 8   // concurrent operations
	linesMin   = 10  // a child is killed after this many printed lines
	linesMax   = 150 // at most
)

type operationName struct{}

// child resumes the intents of earlier children, and pays until it is killed. It prints "saved" and
// an operation when the intent is saved, right before the first attempt; then "paid", and
// "resumed".
func child() int {
	arguments := strings.Fields(os.Getenv(childVariable))
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "child:", err)
		return 2
	}
	// One write per line. The parent reads until the kill.
	say := func(words ...string) { _, _ = os.Stdout.WriteString(strings.Join(words, " ") + "\n") }
	ctx := context.Background()
	intents, _, err := openIntents(ctx, arguments[1])
	if err != nil {
		return fail(err)
	}
	o := options(intents)
	o.Unbudgeted = true
	o.Trace = func(ctx context.Context, e client.Event) {
		if name, ok := ctx.Value(operationName{}).(string); ok && e.Kind == client.EventStarted && e.Attempt == 1 {
			say("saved", name)
		}
	}
	transport := client.New(newBase(), o)
	report, err := transport.Resume(ctx, nil)
	if err != nil {
		return fail(err)
	}
	say("resumed", strconv.Itoa(report.Settled))
	payer := &payer{http: &http.Client{Transport: transport}, url: arguments[0]}
	var next atomic.Int64
	var group sync.WaitGroup
	for range childPlays {
		group.Go(func() {
			for {
				i := int(next.Add(1))
				name := fmt.Sprintf("r%s-%06d", arguments[2], i)
				if _, err := payer.pay(context.WithValue(ctx, operationName{}, name), transferBody(i, name)); err != nil {
					fmt.Fprintln(os.Stderr, "child:", err)
					os.Exit(2)
				}
				say("paid", name)
			}
		})
	}
	group.Wait()
	return 0
}

// TestKilledClientGoesOnWithTheSameKeys: a client is killed with -9 during its work, again and
// again, behind a proxy that loses requests and replies. Each payment that it ever intended is made
// once.
func TestKilledClientGoesOnWithTheSameKeys(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "kills and restarts a client")
	b := setupShedding(t)
	p := startProxy(t, b)
	database := pgtest.Database(t)
	saved, paid, resumed := map[string]bool{}, map[string]bool{}, 0
	for round := range rounds {
		resumed += runChild(t, fmt.Sprintf("http://%s %s %02d", p.address, database, round), saved, paid)
	}

	// The last client is not killed.
	intents, pool, err := openIntents(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	o := options(intents)
	o.Unbudgeted = true
	transport := client.New(newBase(), o)
	defer transport.CloseIdleConnections()
	for {
		report, err := transport.Resume(t.Context(), func(_ context.Context, r *client.Resumed) error {
			if r.Intent.Header.Get("Authorization") != "" {
				t.Error("an intent keeps a credential")
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		resumed += report.Settled
		if report.Kept == 0 {
			break
		}
	}

	t.Logf("%d rounds: %d saved, %d paid before the kill, %d resumed", rounds, len(saved), len(paid), resumed)
	for name := range saved {
		if n := b.count(`SELECT count(*) FROM transfers WHERE reference = $1`, name); n != 1 {
			t.Errorf("%s was saved, and is %d times in the books", name, n)
		}
	}
	if n := b.count(`SELECT count(*) FROM (SELECT FROM transfers WHERE reference LIKE 'r%' GROUP BY reference HAVING count(*) > 1) AS doubles`); n > 0 {
		t.Errorf("%d are more than once in the books", n)
	}
	if audit := b.audit(); !audit.OK {
		t.Errorf("audit is %+v", audit)
	}
	if resumed == 0 || len(paid) == 0 || len(saved) <= len(paid) {
		t.Error("no client was killed in the middle of its work")
	}
}

// runChild starts a child and kills it after a number of lines. It returns the number of intents
// that it resumed.
func runChild(t *testing.T, arguments string, saved, paid map[string]bool) (resumed int) {
	t.Helper()
	command := exec.Command(os.Args[0])
	command.Env = append(os.Environ(), childVariable+"="+arguments)
	command.Stderr = os.Stderr
	stdout, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	watchdog := time.AfterFunc(startTimeout, func() { _ = command.Process.Kill() })
	defer watchdog.Stop()
	left := linesMin + rand.IntN(linesMax-linesMin)
	// To the end: lines from before the kill count.
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		what, name, _ := strings.Cut(lines.Text(), " ")
		switch what {
		case "saved":
			saved[name] = true
		case "paid":
			paid[name] = true
		case "resumed":
			resumed, _ = strconv.Atoi(name)
		}
		if left--; left == 0 {
			if err := command.Process.Kill(); err != nil { // kill -9
				t.Error(err)
			}
		}
	}
	if err := command.Wait(); err == nil || left > 0 {
		t.Fatalf("a child ended by itself: %v", err)
	}
	return resumed
}

// fault is a fault that the proxy causes in one request.
type fault string

const (
	faultNone      fault = "none"
	faultCutBefore fault = "request lost"      // cut before anything reached the bank
	faultHalf      fault = "request half sent" // the bank gets a part of it
	faultCutAfter  fault = "reply lost"        // the bank answers, the client gets nothing
	// The client's connection breaks, and then the request reaches the bank.
	faultLate      fault = "request late"
	faultMidAnswer fault = "reply cut in the middle" // headers and a part of the body, then a reset
	faultSilence   fault = "reply never comes"       // the connection stays open
	faultDelay     fault = "slow"                    // otherwise good
	// Replaces the bank's answer, without Idempotency-Status.
	faultBadGateway fault = "gateway's own 502"
	// It was executed, but the answer is unknown, as if the bank could not find out in time.
	faultUnknown fault = "bank does not know"
	faultLimited fault = "gateway's own 429" // instead of a request
)

// faultShares are thousandths of all requests.
var faultShares = []struct {
	fault
	share int
}{
	{faultCutBefore, 40}, {faultHalf, 20}, {faultCutAfter, 60}, {faultLate, 30}, {faultMidAnswer, 40}, {faultSilence, 3}, {faultDelay, 60},
	{faultBadGateway, 20}, {faultUnknown, 20}, {faultLimited, 10},
}

const (
	faultDelayMax = 20 * time.Millisecond
	// From the break of the client's connection to the request's arrival.
	lateMax = 60 * time.Millisecond
)

// proxy forwards HTTP requests to a bank, and breaks some.
type proxy struct {
	address string
	bank    string

	group sync.WaitGroup
	mu    sync.Mutex
	open  map[net.Conn]struct{}
	ended bool
	count map[fault]int
}

func startProxy(t *testing.T, b *bundle) *proxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{address: listener.Addr().String(), bank: strings.TrimPrefix(b.url, "http://"), open: map[net.Conn]struct{}{}, count: map[fault]int{}}
	p.group.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			if p.hold(conn) {
				p.group.Go(func() { p.serve(conn) })
			}
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		p.mu.Lock()
		p.ended = true
		for conn := range p.open {
			_ = conn.Close() // it may have ended
		}
		p.mu.Unlock()
		p.group.Wait()
	})
	return p
}

// hold registers a connection to be closed at the end.
func (p *proxy) hold(conn net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		_ = conn.Close()
		return false
	}
	p.open[conn] = struct{}{}
	return true
}

func (p *proxy) drop(conn net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.open, conn)
	_ = conn.Close() // it may have ended
}

func (p *proxy) draw() fault {
	n := rand.IntN(1000)
	f := faultNone
	for _, one := range faultShares {
		if n -= one.share; n < 0 {
			f = one.fault
			break
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.count[f]++
	return f
}

// counts returns the number of each fault.
func (p *proxy) counts() map[fault]int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.count)
}

// serve forwards the requests of one connection, each on its own connection to the bank.
func (p *proxy) serve(client net.Conn) {
	defer p.drop(client)
	reader := bufio.NewReader(client)
	for {
		r, err := http.ReadRequest(reader)
		if err != nil {
			return
		}
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return
		}
		r.Body = io.NopCloser(bytes.NewReader(body))
		request, err := httputil.DumpRequest(r, true) // unchanged
		if err != nil {
			return
		}
		if !p.pass(client, request) {
			return
		}
	}
}

// pass handles one request, and reports whether the client's connection stays open.
func (p *proxy) pass(client net.Conn, request []byte) bool {
	f := p.draw()
	switch f {
	case faultCutBefore:
		return p.hangUp(client)
	case faultHalf:
		p.hangUp(client)
		p.half(request)
		return false
	case faultLate:
		p.hangUp(client)
		time.Sleep(rand.N(lateMax)) // the simulated network delay
		p.ask(request)
		return false
	case faultLimited:
		_, err := io.WriteString(client, "HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
		return err == nil
	case faultDelay:
		time.Sleep(rand.N(faultDelayMax))
	}
	answer := p.ask(request)
	switch {
	case answer == nil || f == faultCutAfter:
		return p.hangUp(client)
	case f == faultMidAnswer:
		_, _ = client.Write(answer[:1+rand.IntN(len(answer)-1)])
		return p.hangUp(client)
	case f == faultSilence:
		_, _ = client.Read(make([]byte, 1)) // until the client hangs up
		return false
	case f == faultUnknown:
		answer = []byte("HTTP/1.1 503 Service Unavailable\r\nIdempotency-Status: unknown\r\nRetry-After: 1\r\nContent-Length: 0\r\n\r\n")
	case f == faultBadGateway:
		answer = []byte("HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
	}
	_, err := client.Write(answer)
	return err == nil
}

// hangUp closes a client's connection with a RST or a FIN.
func (p *proxy) hangUp(client net.Conn) bool {
	if tcp, ok := client.(*net.TCPConn); ok && rand.IntN(2) == 0 {
		_ = tcp.SetLinger(0)
	}
	_ = client.Close() // drop closes it again
	return false
}

// ask sends a request to the bank and returns its raw answer, or nil if there is none.
func (p *proxy) ask(request []byte) []byte {
	bank, err := net.Dial("tcp", p.bank)
	if err != nil || !p.hold(bank) {
		return nil
	}
	defer p.drop(bank)
	if _, err := bank.Write(request); err != nil {
		return nil
	}
	response, err := http.ReadResponse(bufio.NewReader(bank), nil)
	if err != nil {
		return nil
	}
	answer, err := httputil.DumpResponse(response, true)
	if err != nil {
		return nil
	}
	return answer
}

func (p *proxy) half(request []byte) {
	bank, err := net.Dial("tcp", p.bank)
	if err != nil || !p.hold(bank) {
		return
	}
	defer p.drop(bank)
	_, _ = bank.Write(request[:len(request)-1-rand.IntN(len(request)/2)])
}
