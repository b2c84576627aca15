//go:build unix

package examples_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/paidonce/idempotency/internal/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// waitMax limits every wait. It is long because the machine may be loaded.
const waitMax = 60 * time.Second

// TestExamples builds each example, runs it as a process and sends the printed requests. It
// requires the promised answers and a clean exit that leaves nothing behind.
func TestExamples(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "builds and runs each example")
	folder := build(t, "quickstart", "orders", "sqlc", "consumer", "webhook", "handlertest")

	t.Run("quickstart", func(t *testing.T) {
		t.Parallel()
		p := start(t, folder, "quickstart", "", 2) // with a PostgreSQL of its own
		p.sendTwice("/transfers", `{"amount":1250,"balance":8750,"to":"bob"}`)

		transfer := func(key, to string, amount int) *answer {
			return p.post("/transfers", key, fmt.Sprintf(`{"to":%q,"amount":%d}`, to, amount), "Account", "alice")
		}
		p.want(transfer("too-much", "bob", 20000), 402, "executed", "not enough")
		p.want(transfer("too-much", "bob", 20000), 402, "replayed", "not enough")
		p.want(transfer("too-much", "bob", 1), 422, "mismatch", "key-reused")
		p.want(transfer("nobody", "nobody", 1), 404, "executed", "no such account")
		p.want(p.post("/transfers", "k", `{"to":"bob","amount":1}`), 401, "not-executed", "scope")
		// The declined ones were undone.
		p.want(transfer("last", "bob", 8750), 201, "executed", `"balance":0`)
		p.stop(syscall.SIGINT)
	})

	t.Run("orders", func(t *testing.T) {
		t.Parallel()
		p := start(t, folder, "orders", pgtest.Database(t), 7)
		p.sendTwice("/orders", `{"charge":"ch_1","order":"[0-9]{17,19}","total":900}`)
		p.want(p.curl(2), 402, "executed", "declined")
		p.want(p.curl(3), 503, "unknown", `"accepted":true`)
		p.settled(func() *answer { return p.curl(4) }, 201, `"charge":"ch_3"`)
		p.want(p.curl(5), 200, "", `{"charge":"ch_3","amount":900,"state":"charged","asked":2}`)
		p.want(p.curl(6), 200, "", `{"sku":"tea","price":450,"quantity":996}`)

		order := func(token, key, body string) *answer {
			return p.post("/orders", key, body, "Authorization", "Bearer "+token)
		}
		const tea, cup = `{"sku":"tea","quantity":1,"card":"good"}`, `{"sku":"cup","quantity":1,"card":"flaky"}`
		// Refused by authenticate, before the key is read.
		p.want(order("stolen", "k1", tea), 401, "", "token")
		mine := order("token-of-acme", "k1", tea)
		p.want(mine, 201, "executed", "")
		p.want(order("new-token-of-acme", "k1", tea), 201, "replayed", mine.body)
		p.want(order("token-of-globex", "k1", tea), 201, "executed", "") // not acme's key

		// The card is charged and the answer lost. The last cup is reserved, so another customer
		// can't buy it, and the order ends.
		p.want(order("token-of-acme", "k2", cup), 503, "unknown", "")
		p.want(order("token-of-globex", "k3", strings.Replace(cup, "flaky", "good", 1)), 409, "executed", "not enough in stock")
		p.settled(func() *answer { return order("token-of-acme", "k2", cup) }, 201, `"charge":"ch_6"`)
		p.want(order("token-of-acme", "k2", cup), 201, "replayed", `"total":1200`)
		p.want(p.curl(5), 200, "", `{"charge":"ch_6","amount":1200,"state":"charged","asked":2}`)
		p.stop(syscall.SIGTERM)
	})

	t.Run("sqlc", func(t *testing.T) {
		t.Parallel()
		p := start(t, folder, "sqlc", pgtest.Database(t), 4)
		p.sendTwice("/transfers", `{"id":1,"payer":"alice","payee":"bob","amount":1250}`)
		p.want(p.post("/transfers", "k", `{"to":"bob","amount":20000}`, "Account", "alice"), 402, "executed", "not enough")
		p.want(p.curl(2), 200, "", `[{"id":1,"payer":"alice","payee":"bob","amount":1250}]`)
		p.want(p.curl(3), 201, "executed", `{"name":"alice","balance":9250}`)
		p.want(p.curl(3), 201, "replayed", `{"name":"alice","balance":9250}`)
		p.want(p.post("/deposits", "k", `{"amount":1}`, "Account", "nobody"), 404, "executed", "no such account")
		p.stop(syscall.SIGTERM)
	})

	t.Run("consumer", func(t *testing.T) {
		t.Parallel()
		p := start(t, folder, "consumer", pgtest.Database(t), 3)
		p.sendTwice("/transfers", `{"from":"alice","to":"bob","amount":1250}`)
		for deadline := time.Now().Add(waitMax); p.curl(2).body == "[]\n" && time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		}
		p.want(p.curl(2), 200, "", "[-1250]\n")
		p.stop(syscall.SIGTERM)
	})

	t.Run("webhook", func(t *testing.T) {
		t.Parallel()
		p := start(t, folder, "webhook", pgtest.Database(t), 3)
		p.want(p.curl(0), 204, "executed", "")
		p.want(p.curl(1), 204, "replayed", "")
		p.want(p.curl(2), 401, "", "signature")
		p.stop(syscall.SIGTERM)
	})

	t.Run("handlertest", func(t *testing.T) {
		t.Parallel()
		p := start(t, folder, "handlertest", "", 2)
		p.sendTwice("/transfers", `{"amount":1250,"balance":8750,"to":"bob"}`)
		p.stop(syscall.SIGINT)
	})
}

// TestHelpersAreTheSame: each example must be complete, so each has its own copy of the helpers.
func TestHelpersAreTheSame(t *testing.T) {
	t.Parallel()
	for _, copied := range []string{"orders/database.go", "sqlc/database.go", "consumer/database.go", "webhook/database.go", "gorm/database.go", "grpc/database.go", "river/database.go", "orders/serve.go", "consumer/serve.go", "webhook/serve.go", "sqlc/serve.go", "gorm/serve.go", "handlertest/serve.go", "grpc/serve.go", "river/serve.go"} {
		original, err := os.ReadFile(filepath.Join("quickstart", filepath.Base(copied)))
		if err != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(copied)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(content, original) {
			t.Errorf("%s differs from quickstart's: copy the better one to the others", copied)
		}
	}
}

// build builds the examples and returns the folder. They have the race detector if the tests have
// it.
func build(t *testing.T, names ...string) string {
	t.Helper()
	folder := t.TempDir()
	arguments := []string{"build", "-o", folder}
	if info, ok := debug.ReadBuildInfo(); ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"}) {
		arguments = append(arguments, "-race")
	}
	for _, name := range names {
		arguments = append(arguments, "./"+name)
	}
	if output, err := exec.CommandContext(t.Context(), "go", arguments...).CombinedOutput(); err != nil {
		t.Fatalf("go %v: %v\n%s", arguments, err, output)
	}
	return folder
}

// program is a running example.
type program struct {
	t       *testing.T
	cmd     *exec.Cmd
	client  *http.Client
	url     string
	curls   []string // the printed lines to try
	stderr  bytes.Buffer
	unknown int           // answers with an unknown outcome: a line on stderr for each that ran, and no others
	ended   chan struct{} // closed after Wait returned
}

// start starts an example and waits until it has printed all its lines to try. The test's end kills
// it.
func start(t *testing.T, folder, name, database string, curls int) *program {
	t.Helper()
	cmd := exec.Command(filepath.Join(folder, name), "-listen", "127.0.0.1:0")
	cmd.Env = slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, "DATABASE_URL=") })
	if database != "" {
		cmd.Env = append(cmd.Env, "DATABASE_URL="+database)
	}
	transport := &http.Transport{}
	t.Cleanup(transport.CloseIdleConnections)
	p := &program{t: t, cmd: cmd, client: &http.Client{Transport: transport, Timeout: waitMax}, ended: make(chan struct{})}
	cmd.Stderr = &p.stderr
	output, into, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout = into
	err = cmd.Start()
	_ = into.Close()
	if err != nil {
		t.Fatal(err)
	}
	said := make(chan string, 100)
	go func() { // until the program ends and closes its stdout
		defer close(said)
		defer output.Close()
		for lines := bufio.NewScanner(output); lines.Scan(); {
			said <- lines.Text()
		}
	}()
	go func() {
		defer close(p.ended)
		_ = cmd.Wait() // stop reads the code
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		<-p.ended
	})
	p.listen(name, curls, said)
	return p
}

// listen reads the program's lines until it serves.
func (p *program) listen(name string, curls int, said <-chan string) {
	p.t.Helper()
	for patience := time.After(waitMax); len(p.curls) < curls; {
		select {
		case line, ok := <-said:
			if !ok {
				<-p.ended
				p.t.Fatalf("it ended with %v:\n%s", p.cmd.ProcessState, p.stderr.String())
			}
			if url, ok := strings.CutPrefix(line, name+" is at "); ok {
				p.url = url
			}
			if line = strings.TrimSpace(line); strings.HasPrefix(line, "curl ") {
				p.curls = append(p.curls, line)
			}
		case <-patience:
			p.t.Fatalf("it did not print %d lines to try in time: %q", curls, p.curls)
		}
	}
}

// answer is an answer to a request.
type answer struct {
	status  int
	outcome string
	body    string
}

// curl sends the request of a printed line.
func (p *program) curl(n int) *answer {
	p.t.Helper()
	if n >= len(p.curls) {
		p.t.Fatalf("it printed %d lines, and not line %d: %q", len(p.curls), n, p.curls)
	}
	url, method, body, header := "", http.MethodGet, "", http.Header{}
	words := shellWords(p.curls[n])
	for i := 1; i < len(words); i++ {
		switch words[i] {
		case "-i":
		case "-H":
			i++
			name, value, _ := strings.Cut(words[i], ": ")
			header.Add(name, value)
		case "-d":
			i++
			method, body = http.MethodPost, words[i]
			header.Set("Content-Type", "application/x-www-form-urlencoded") // as curl does
		default:
			url = words[i]
		}
	}
	return p.send(method, url, body, header)
}

// post sends a request with a key.
func (p *program) post(path, key, body string, header ...string) *answer {
	p.t.Helper()
	h := http.Header{"Idempotency-Key": {key}}
	for i := 0; i+1 < len(header); i += 2 {
		h.Set(header[i], header[i+1])
	}
	return p.send(http.MethodPost, p.url+path, body, h)
}

func (p *program) send(method, url, body string, header http.Header) *answer {
	p.t.Helper()
	request, err := http.NewRequestWithContext(p.t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		p.t.Fatal(err)
	}
	request.Header = header
	response, err := p.client.Do(request)
	if err != nil {
		p.t.Fatal(err)
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return &answer{status: response.StatusCode, outcome: response.Header.Get("Idempotency-Status"), body: string(content)}
}

func (p *program) want(got *answer, status int, outcome, contains string) {
	p.t.Helper()
	if outcome == "unknown" {
		p.unknown++
	}
	if got.status != status || got.outcome != outcome || !strings.Contains(got.body, contains) {
		p.t.Errorf("answer is %d %q: %s\nwant %d %q with %s", got.status, got.outcome, got.body, status, outcome, contains)
	}
}

// settled sends a request until its answer is final, whichever run has ended it.
func (p *program) settled(send func() *answer, status int, contains string) {
	p.t.Helper()
	for deadline := time.Now().Add(waitMax); ; time.Sleep(50 * time.Millisecond) {
		got := send()
		switch {
		case got.outcome == "unknown" && time.Now().Before(deadline):
			p.unknown++
		case got.outcome != "in-progress" || time.Now().After(deadline):
			p.want(got, status, got.outcome, contains)
			return
		}
	}
}

// sendTwice sends the first two lines that it printed: the same line, executed and then replayed.
// The body is a regular expression.
func (p *program) sendTwice(path, body string) {
	p.t.Helper()
	first := p.curl(0)
	p.want(first, http.StatusCreated, "executed", "")
	if !regexp.MustCompile("^" + body + "\n$").MatchString(first.body) {
		p.t.Errorf("%s answers %q, want %q", path, first.body, body)
	}
	second := p.curl(1)
	p.want(second, http.StatusCreated, "replayed", "")
	if second.body != first.body {
		p.t.Errorf("the replay is %q, the first answer was %q", second.body, first.body)
	}
}

// stop sends a signal. The program must exit with 0 and end its PostgreSQL.
func (p *program) stop(signal syscall.Signal) {
	p.t.Helper()
	children := descendants(p.cmd.Process.Pid)
	if err := p.cmd.Process.Signal(signal); err != nil {
		p.t.Fatal(err)
	}
	select {
	case <-p.ended:
	case <-time.After(waitMax):
		p.t.Fatalf("it did not end at %v", signal)
	}
	lines, unknown := strings.Count(p.stderr.String(), "\n"), strings.Count(p.stderr.String(), " outcome=unknown ")
	if code := p.cmd.ProcessState.ExitCode(); code != 0 || lines != unknown || unknown > p.unknown || (unknown == 0) != (p.unknown == 0) {
		p.t.Errorf("exit code is %d, and it says on stderr: %s", code, p.stderr.String())
	}
	for _, pid := range children {
		if err := syscall.Kill(pid, 0); err == nil {
			p.t.Errorf("process %d is left", pid)
		}
	}
	p.t.Logf("%v ended it, and its %d processes", signal, len(children))
}

// descendants returns a process's descendants, as far as /proc shows them.
func descendants(pid int) (all []int) {
	parents := map[int]int{}
	files, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, file := range files {
		content, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		child, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		_, rest, _ := strings.Cut(string(content), ") ")
		if fields := strings.Fields(rest); err == nil && len(fields) > 1 {
			parents[child], _ = strconv.Atoi(fields[1])
		}
	}
	known := []int{pid}
	for i := 0; i < len(known); i++ {
		for child, parent := range parents {
			if parent == known[i] {
				known = append(known, child)
			}
		}
	}
	return known[1:]
}

// shellWords splits a line like a shell that knows only single quotes.
func shellWords(line string) (words []string) {
	word, quoted, begun := "", false, false
	for _, c := range line {
		switch {
		case c == '\'':
			quoted, begun = !quoted, true
		case c == ' ' && !quoted:
			if begun {
				words = append(words, word)
			}
			word, begun = "", false
		default:
			word, begun = word+string(c), true
		}
	}
	if begun {
		words = append(words, word)
	}
	return words
}
