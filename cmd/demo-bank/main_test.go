//go:build unix

package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/alecthomas/kong"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/server"
	"github.com/paidonce/idempotency/internal/crashpoint"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// asProgram names an environment variable that makes this test binary the program. So the tests can
// start, kill and stop it, and it has the race detector if they have it.
const asProgram = "DEMO_BANK_TEST_AS_PROGRAM"

// waitMax limits every wait. It is long because the machine may be loaded.
const waitMax = 60 * time.Second

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		return
	}
	pgtest.Main(m)
}

// program is a running demo-bank.
type program struct {
	t      *testing.T
	cmd    *exec.Cmd
	url    string
	curls  []string // the printed lines to try
	stderr bytes.Buffer
	said   chan struct{} // closed when it has printed that it serves
	ended  chan struct{} // closed after Wait returned
}

func command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(s string) bool {
		return strings.HasPrefix(s, "DATABASE_URL=") || strings.HasPrefix(s, crashpoint.BankVariable+"=")
	}), asProgram+"=1")
	return cmd
}

// commandIn returns a command with its own folder for temporary files, so that the test sees
// leftovers.
func commandIn(ctx context.Context, temporary string, args ...string) *exec.Cmd {
	cmd := command(ctx, args...)
	cmd.Env = append(cmd.Env, "TMPDIR="+temporary)
	return cmd
}

// serve starts the program and waits until it serves. It is killed when the test ends.
func serve(t *testing.T, args ...string) *program {
	t.Helper()
	return launch(t, args...)()
}

// launch starts the program and returns a function that waits until it serves, so that a test can
// start two at once.
func launch(t *testing.T, args ...string) (await func() *program) {
	t.Helper()
	return start(t, command(context.Background(), args...)).await
}

// start starts the program and does not wait.
func start(t *testing.T, cmd *exec.Cmd) *program {
	t.Helper()
	p := &program{t: t, cmd: cmd, said: make(chan struct{}), ended: make(chan struct{})}
	p.cmd.Stderr = &p.stderr
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.ended)
		told := false
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			line := lines.Text()
			if rest, ok := strings.CutPrefix(line, "demo-bank is at "); ok {
				p.url, _, _ = strings.Cut(rest, " ")
			}
			if line = strings.TrimSpace(line); strings.HasPrefix(line, "curl ") {
				p.curls = append(p.curls, line)
			}
			if strings.Contains(line, "demo-bank storm") && !told { // the last thing it says
				told = true
				close(p.said)
			}
		}
		_ = p.cmd.Wait() // exitCode reads the code
	}()
	t.Cleanup(p.kill)
	return p
}

// await waits until the program serves.
func (p *program) await() *program {
	p.t.Helper()
	select {
	case <-p.said:
	case <-p.ended:
		p.t.Fatalf("%v ended with %v:\n%s", p.cmd.Args[1:], p.cmd.ProcessState, p.stderr.String())
	case <-time.After(waitMax):
		p.t.Fatalf("%v did not serve in time", p.cmd.Args[1:])
	}
	return p
}

// kill kills the program with -9 and waits for its end.
func (p *program) kill() {
	_ = p.cmd.Process.Kill() // it may have ended
	<-p.ended
}

// terminate sends SIGTERM.
func (p *program) terminate() {
	p.t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		p.t.Fatal(err)
	}
}

// exitCode waits for the end and returns the exit code.
func (p *program) exitCode() int {
	p.t.Helper()
	select {
	case <-p.ended:
	case <-time.After(waitMax):
		p.t.Fatal("the program did not end")
	}
	return p.cmd.ProcessState.ExitCode()
}

// fails runs the program to its end. It must exit with 1 and write one line to stderr, which fails
// returns.
func fails(t *testing.T, args ...string) string {
	t.Helper()
	return failsWith(t, 1, args...)
}

func failsWith(t *testing.T, code int, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), waitMax)
	defer cancel()
	return failsAs(t, code, command(ctx, args...))
}

func failsAs(t *testing.T, code int, cmd *exec.Cmd) string {
	t.Helper()
	args := cmd.Args[1:]
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != code {
		t.Errorf("%v ended with %v, want exit code %d:\n%s", args, err, code, stderr.String())
	}
	line := strings.TrimSuffix(stderr.String(), "\n")
	if strings.Contains(line, "\n") || !strings.HasPrefix(line, "demo-bank: ") {
		t.Errorf("%v said more or less than one line:\n%s", args, stderr.String())
	}
	return line
}

// post sends a transfer with the given client.
func post(client *http.Client, url, key, body string) (*http.Response, []byte, error) {
	return postTo(client, url+"/v1/transfers", key, body)
}

func postTo(client *http.Client, url, key, body string) (*http.Response, []byte, error) {
	request, err := http.NewRequest(http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		return nil, nil, err
	}
	request.GetBody = nil // or Go's client repeats it by itself
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("Idempotency-Key", key)
	response, err := client.Do(request)
	if err != nil {
		return nil, nil, err
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	return response, content, err
}

func newClient(t *testing.T) *http.Client {
	transport := &http.Transport{MaxIdleConnsPerHost: 1}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: waitMax}
}

// eventually waits until so returns true.
func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(waitMax); !so(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it never came true: %s", what)
		}
	}
}

// postmaster returns the process id of the PostgreSQL with its data in a folder.
func postmaster(t *testing.T, dir string) int {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*", "postmaster.pid"))
	if err != nil || len(files) != 1 {
		t.Fatalf("postmaster.pid: %v %v", files, err)
	}
	content, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	line, _, _ := strings.Cut(string(content), "\n")
	pid, err := strconv.Atoi(line)
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// gone reports whether a process has ended. A zombie has no command line.
func gone(pid int) bool {
	if syscall.Kill(pid, 0) == syscall.ESRCH {
		return true
	}
	commandLine, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return err == nil && len(commandLine) == 0
}

// TestTheTwoLinesThatItPrints: a newcomer starts the bank without a database, pastes the printed
// lines, and gets one effect and one answer. The money is still there after an orderly stop, and
// after kill -9, which leaves no PostgreSQL behind.
func TestTheTwoLinesThatItPrints(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "starts banks with a PostgreSQL of their own")
	dir := pgtest.Folder(t)
	p := serve(t, "--addr", "127.0.0.1:0", "--data-dir", dir)
	if len(p.curls) != 2 || p.curls[0] != p.curls[1] {
		t.Fatalf("it printed %q: want the same line twice", p.curls)
	}
	path, err := exec.LookPath("sh")
	if err != nil {
		t.Skip("there is no sh to paste into")
	}
	paste := func(line string) (head, body string) {
		output, err := exec.Command(path, "-c", line).Output()
		if err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		head, body, _ = strings.Cut(string(output), "\r\n\r\n")
		return head, body
	}
	firstHead, firstBody := paste(p.curls[0])
	secondHead, secondBody := paste(p.curls[1])
	if !strings.Contains(firstHead, " 201 ") || !strings.Contains(firstHead, "Idempotency-Status: executed") {
		t.Errorf("the first answer is\n%s", firstHead)
	}
	if !strings.Contains(secondHead, " 201 ") || !strings.Contains(secondHead, "Idempotency-Status: replayed") || !strings.Contains(secondHead, "Idempotent-Replayed: true") {
		t.Errorf("the second answer is\n%s", secondHead)
	}
	if firstBody == "" || firstBody != secondBody {
		t.Errorf("the answers differ: %s and %s", firstBody, secondBody)
	}
	p.terminate()
	if code := p.exitCode(); code != 0 {
		t.Errorf("exit code after SIGTERM is %d:\n%s", code, p.stderr.String())
	}

	again := serve(t, "--addr", "127.0.0.1:0", "--data-dir", dir)
	if _, body := paste("curl -i " + again.url + "/v1/accounts/bob"); !strings.Contains(body, `"balance":10001250`) {
		t.Errorf("after a restart bob has %s", body)
	}
	pid := postmaster(t, dir)
	again.kill()
	eventually(t, "PostgreSQL is gone after kill -9", func() bool { return gone(pid) })
}

// TestStopUnderLoad: requests in progress finish, new requests on open connections are refused as
// not executed, new connections are refused, and the exit code is 0.
func TestStopUnderLoad(t *testing.T) {
	t.Parallel()
	database := pgtest.Database(t)
	p := serve(t, "--addr", "127.0.0.1:0", "--database-url", database, "--pool-size", "16")
	db := connect(t, database)

	// A request in flight: it waits for an account that the test has locked.
	tx, err := db.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), `SELECT FROM accounts WHERE id = 'alice' FOR UPDATE`); err != nil {
		t.Fatal(err)
	}
	type ending struct {
		status  int
		outcome string
		err     error
	}
	inFlight := make(chan ending, 1)
	go func() {
		response, _, err := post(newClient(t), p.url, "in-flight", `{"from":"alice","to":"bob","amount":7}`)
		if err != nil {
			inFlight <- ending{err: err}
			return
		}
		inFlight <- ending{status: response.StatusCode, outcome: response.Header.Get("Idempotency-Status")}
	}()
	eventually(t, "the request in flight waits for the lock", func() bool {
		var waiting bool
		err := tx.QueryRow(t.Context(), `SELECT EXISTS (SELECT FROM pg_locks JOIN pg_stat_activity USING (pid) WHERE NOT granted AND datname = current_database())`).Scan(&waiting)
		return err == nil && waiting
	})

	// Load on other accounts, on connections that stay open: each client continues until it is
	// refused.
	const clients = 8
	var group sync.WaitGroup
	var mu sync.Mutex
	acknowledged := 0
	warm := make(chan struct{}, clients)
	for i := range clients {
		client := newClient(t)
		group.Go(func() {
			for n := 0; ; n++ {
				response, body, err := post(client, p.url, fmt.Sprintf("load-%d-%d", i, n), fmt.Sprintf(`{"from":"acct-%04d","to":"bob","amount":1}`, i))
				if n == 0 {
					warm <- struct{}{}
				}
				switch {
				case err != nil:
					t.Errorf("client %d met a connection that was cut instead of a refusal: %v", i, err)
					return
				case response.StatusCode == http.StatusCreated:
					mu.Lock()
					acknowledged++
					mu.Unlock()
					continue
				case response.StatusCode != http.StatusServiceUnavailable || response.Header.Get("Idempotency-Status") != "not-executed" ||
					response.Header.Get("Retry-After") == "" || !response.Close || response.Header.Get("Content-Type") != "application/problem+json":
					t.Errorf("client %d was refused with %d %v %s", i, response.StatusCode, response.Header, body)
				}
				return
			}
		})
	}
	for range clients {
		<-warm
	}
	p.terminate()
	group.Wait()
	if _, err := net.Dial("tcp", strings.TrimPrefix(p.url, "http://")); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("a new connection was not refused: %v", err)
	}
	select {
	case <-p.ended:
		t.Error("the program ended before the request in flight did")
	case got := <-inFlight:
		t.Errorf("the request in flight ended before its time: %+v", got)
	default:
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := <-inFlight; got.err != nil || got.status != http.StatusCreated || got.outcome != "executed" {
		t.Errorf("the request in flight ended with %+v", got)
	}
	if code := p.exitCode(); code != 0 {
		t.Errorf("exit code is %d:\n%s", code, p.stderr.String())
	}
	var transfers int
	if err := db.QueryRow(t.Context(), `SELECT count(*) FROM transfers`).Scan(&transfers); err != nil || transfers != acknowledged+1 {
		t.Errorf("%d transfers were acknowledged, %d are in the books (%v)", acknowledged+1, transfers, err)
	}
}

// TestStartFailsInOneLine: each error at the start is one line with its remedy, and nothing is left
// behind.
func TestStartFailsInOneLine(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "starts many banks")
	dir := pgtest.Folder(t)
	p := serve(t, "--addr", "127.0.0.1:0", "--data-dir", dir)

	other := filepath.Join(pgtest.Folder(t), "data")
	line := fails(t, "--addr", strings.TrimPrefix(p.url, "http://"), "--data-dir", other)
	if !strings.Contains(line, "taken") || !strings.Contains(line, "--addr") {
		t.Errorf("a port that is taken: %s", line)
	}
	if _, err := os.Stat(other); !os.IsNotExist(err) {
		t.Errorf("a bank without a port made its data folder: %v", err)
	}
	if line := fails(t, "--addr", "127.0.0.1:0", "--data-dir", dir); !strings.Contains(line, "held") || !strings.Contains(line, dir) || !strings.Contains(line, "--data-dir") {
		t.Errorf("a data folder that is held: %s", line)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := listener.Addr().String()
	if err := listener.Close(); err != nil {
		t.Fatal(err)
	}
	line = fails(t, "--addr", "127.0.0.1:0", "--database-url", "postgres://someone:canary4711@"+nobody+"/bank?sslmode=disable")
	if !strings.Contains(line, "connection refused") || !strings.Contains(line, "--database-url") || strings.Contains(line, "canary4711") {
		t.Errorf("a database that is not there: %s", line)
	}
	line = fails(t, "--addr", "127.0.0.1:0", "--database-url", "postgres://someone:canary4711@host:notaport/bank")
	if !strings.Contains(line, "URL") || strings.Contains(line, "canary4711") {
		t.Errorf("a database URL that can't be read: %s", line)
	}
	if line := failsWith(t, 2, "storm", "--url", "http://"+nobody, "--patience", "1s"); !strings.Contains(line, "no bank") || !strings.Contains(line, "--url") {
		t.Errorf("a storm without a bank: %s", line)
	}
	for _, senseless := range [][]string{{"storm", "--keys", "0"}, {"--data-dir", ""}, {"--pool-size", "0"}, {"--ttl", "999ms"}} {
		if line := failsWith(t, exitUsage, senseless...); !strings.Contains(line, strings.TrimLeft(senseless[len(senseless)-2], "-")) {
			t.Errorf("%q: %s", senseless, line)
		}
	}
}

// TestAPostgreSQLThatEndsTakesTheBankWithIt: a bank stops if its PostgreSQL ends, because it can't
// keep its promises.
func TestAPostgreSQLThatEndsTakesTheBankWithIt(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "starts a bank with a PostgreSQL of its own")
	dir := pgtest.Folder(t)
	p := serve(t, "--addr", "127.0.0.1:0", "--data-dir", dir)
	if err := syscall.Kill(postmaster(t, dir), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if code := p.exitCode(); code != 1 || !strings.Contains(p.stderr.String(), "demo-bank: the embedded PostgreSQL has ended") {
		t.Errorf("exit code is %d:\n%s", code, p.stderr.String())
	}
}

// TestLimitsOfTheFlags checks both sides of each limit.
func TestLimitsOfTheFlags(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		flag          string
		good, refused []string
	}{
		{"--ttl", []string{"1s", "24h", "8760h"}, []string{"999ms", "0s", "-1s", "x"}},
		{"--reap-interval", []string{"1ms", "1m"}, []string{"999us", "0s", "-1s"}},
		{"--handler-timeout", []string{"10ms", "10s", "54s"}, []string{"9ms", "54s1ms", "0s", "-1s"}},
		{"--wait", []string{"0s", "1ms", "1m"}, []string{"1m1ns", "-1s"}},
		{"--wait=2s --ttl", []string{"3s"}, []string{"2s"}},
		{"--acquire-timeout", []string{"1ms", "3s"}, []string{"999us", "0s", "-1s"}},
		{"--psp-key-lifetime", []string{"50s", "720h"}, []string{"49s", "0s", "-1s"}},
		{"--pool-size", []string{"1", "1000"}, []string{"0", "1001"}},
	} {
		for _, value := range test.good {
			if _, err := parseFlags(strings.Fields(test.flag + "=" + value)...); err != nil {
				t.Errorf("%s %s: %v", test.flag, value, err)
			}
		}
		for _, value := range test.refused {
			if _, err := parseFlags(strings.Fields(test.flag + "=" + value)...); err == nil {
				t.Errorf("%s %s is taken", test.flag, value)
			}
		}
	}
	cli, err := parseFlags()
	if err != nil {
		t.Fatal(err)
	}
	got := cli.Serve
	if got.TTL != 24*time.Hour || got.ReapInterval != time.Minute || got.HandlerTimeout != 10*time.Second ||
		got.Wait != 0 || got.AcquireTimeout != 3*time.Second || got.PoolSize != server.PoolSizeDefault ||
		got.PSP != "" || got.PSPKeyLifetime != 24*time.Hour {
		t.Errorf("the defaults are %+v", got)
	}
}

func parseFlags(args ...string) (*commands, error) {
	var cli commands
	parser, err := kong.New(&cli, defaults)
	if err != nil {
		return nil, err
	}
	_, err = parser.Parse(append([]string{"serve"}, args...))
	return &cli, err
}
