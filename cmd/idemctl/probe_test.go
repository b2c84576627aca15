package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
)

// probed is the JSON of probe.
type probed struct {
	Verdict string
	Rules   []struct{ ID, Level, Verdict, Source, Detail string }
}

// ids returns the ids of the binding rules with a verdict.
func (p *probed) ids(verdict string) (ids []string) {
	for _, r := range p.Rules {
		if r.Level == "binding" && r.Verdict == verdict {
			ids = append(ids, r.ID)
		}
	}
	return ids
}

// program is a service of this repository that runs as a process.
type program struct {
	url string
	cmd *exec.Cmd
}

// serving starts a program and waits until it prints its address. The test's end kills it.
func serving(t *testing.T, database, path string, args ...string) *program {
	t.Helper()
	cmd := exec.Command(path, args...)
	cmd.Env = slices.DeleteFunc(os.Environ(), func(s string) bool { return strings.HasPrefix(s, "DATABASE_URL=") })
	if database != "" {
		cmd.Env = append(cmd.Env, "DATABASE_URL="+database)
	}
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, into, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stdout = into
	err = cmd.Start()
	_ = into.Close()
	if err != nil {
		t.Fatal(err)
	}
	found, ended := make(chan string, 1), make(chan struct{})
	go func() {
		defer close(ended)
		defer stdout.Close()
		address := regexp.MustCompile(` is at (http://\S+)`)
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			if match := address.FindStringSubmatch(lines.Text()); match != nil {
				select {
				case found <- match[1]:
				default: // a later line
				}
			}
		}
		_ = cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		<-ended
	})
	select {
	case url := <-found:
		return &program{url, cmd}
	case <-ended:
		t.Fatalf("%s ended: %s", filepath.Base(path), stderr.String())
	case <-time.After(2 * waitMax):
		t.Fatalf("%s did not serve in time", filepath.Base(path))
	}
	return nil
}

// The bank and the examples that take a key honour it, by their own profile and by the draft's.
// examples/webhook takes no key from its callers.
func TestProbeOfOurServices(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "builds and runs the bank and the examples")
	folder := t.TempDir()
	args := []string{"build", "-C", "../..", "-o", folder, "./cmd/demo-bank"}
	for _, name := range []string{"quickstart", "sqlc", "consumer", "orders", "handlertest", "river"} {
		args = append(args, "./examples/"+name)
	}
	if output, err := exec.CommandContext(t.Context(), "go", args...).CombinedOutput(); err != nil {
		t.Fatalf("go %v: %v\n%s", args, err, output)
	}
	const transfer = `{"to":"bob","amount":{{int}}}`
	alice, carol := []string{"--header", "Account: alice"}, []string{"--scope-header", "Account: carol"}
	for name, test := range map[string]struct {
		program string
		serve   []string
		memory  bool   // it needs no database
		sql     string // gives the second caller an account
		path    string
		effects string // path of the effects URL
		args    []string
	}{
		"bank, transfers": {
			program: "demo-bank", serve: []string{"--addr", "127.0.0.1:0"}, path: "/v1/transfers", effects: "/v1/audit",
			args: []string{"--effects-path", "/transfers", "--body", `{"from":"alice","to":"bob","amount":{{int}}}`, "--scope-header", "Authorization: Bearer demo-acme"},
		},
		"bank, top-ups": {
			program: "demo-bank", serve: []string{"--addr", "127.0.0.1:0"}, path: "/v1/topups", effects: "/v1/audit",
			args: []string{"--effects-path", "/charges", "--body", `{"account":"alice","amount":{{int}},"card":"tok"}`, "--scope-header", "Authorization: Bearer demo-acme"},
		},
		"quickstart": {
			program: "quickstart", path: "/transfers", sql: "INSERT INTO quickstart.accounts VALUES ('carol', 10000)",
			args: slices.Concat(alice, carol, []string{"--body", transfer}),
		},
		"sqlc": {
			program: "sqlc", path: "/transfers", effects: "/transfers", sql: "INSERT INTO ledger.accounts VALUES ('carol', 10000)",
			args: slices.Concat(alice, carol, []string{"--body", transfer}),
		},
		"consumer": {
			program: "consumer", path: "/transfers", effects: "/statements/alice",
			args: slices.Concat(alice, carol, []string{"--body", transfer}),
		},
		"orders": {
			program: "orders", path: "/orders",
			args: []string{"--header", "Authorization: Bearer token-of-acme", "--scope-header", "Authorization: Bearer token-of-globex", "--body", `{"sku":"tea","quantity":1,"card":"good"}`},
		},
		"handlertest": {
			program: "handlertest", memory: true, path: "/transfers",
			args: slices.Concat(alice, []string{"--scope-header", "Account: bob", "--body", transfer}),
		},
		"river": {
			program: "river", path: "/transfers", sql: "INSERT INTO river_example.accounts VALUES ('carol', 10000)",
			args: slices.Concat(alice, carol, []string{"--body", transfer}),
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			database := ""
			if !test.memory {
				database = pgtest.Database(t)
			}
			serve := test.serve
			if serve == nil {
				serve = []string{"-listen", "127.0.0.1:0"}
			}
			p := serving(t, database, filepath.Join(folder, test.program), serve...)
			if test.sql != "" {
				conn, err := pgx.Connect(t.Context(), database)
				if err != nil {
					t.Fatal(err)
				}
				_, err = conn.Exec(t.Context(), test.sql)
				_ = conn.Close(t.Context())
				if err != nil {
					t.Fatal(err)
				}
			}
			args := append([]string{"probe", "--json", p.url + test.path}, test.args...)
			if test.effects != "" {
				args = append(args, "--effects-url", p.url+test.effects)
			}
			for _, profile := range []string{"paidonce", "ietf"} {
				r := probeOf(t, append(args, "--profile", profile)...)
				report := object[probed](t, r)
				if r.code != 0 || report.Verdict != "ok" || len(report.ids("pass")) < 20 {
					t.Errorf("%s: exit code %d, %s\n%s", profile, r.code, r.stdout, r.stderr)
				}
			}
		})
	}
}

// probeMax is the maximum time of an examination, and of the program's start.
const probeMax = 2*time.Minute + waitMax

// probeOf runs the program to its end.
func probeOf(t *testing.T, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), probeMax)
	defer cancel()
	return execute(t, command(ctx, "postgres://nobody@127.0.0.1:1/x", args...)) // it needs no database
}

// protected returns the URL of a payment API.
func protected(t *testing.T, opts *middleware.Options) string {
	t.Helper()
	idem := middleware.New(memory.New(nil), func(r *http.Request) (string, error) { return r.Header.Get("X-Api-Key"), nil }, opts)
	var payments atomic.Int64
	server := httptest.NewServer(idem.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		w.WriteHeader(http.StatusCreated)
		_, _ = fmt.Fprintf(w, `{"id":%d}`, payments.Add(1))
	})))
	t.Cleanup(server.Close)
	return server.URL
}

func TestProbeExitCodes(t *testing.T) {
	t.Parallel()
	right, lax := protected(t, nil), protected(t, &middleware.Options{Optional: true})
	folder := t.TempDir()
	body, junit := filepath.Join(folder, "body"), filepath.Join(folder, "junit.xml")
	if err := os.WriteFile(body, []byte(`{"amount":{{int}}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	key := []string{"--header", "X-Api-Key: canary-key", "--scope-header", "X-Api-Key: canary-other"}
	for name, test := range map[string]struct {
		args          []string
		code          int
		verdict, says string
	}{
		"ok":              {append(key, "--body-file", body, "--profile", "paidonce", "--junit", junit, right), 0, "ok", ""},
		"broken":          {append(key, "--body", `{"amount":1}`, lax), 1, "broken", "key-missing"},
		"Stripe's":        {append(key, "--body", "amount={{int}}", "--profile", "stripe-v1", lax), 0, "ok", ""},
		"not judged":      {[]string{"--header", "X-Api-Key: canary-key", right}, 2, "incomplete", "--scope-header"},
		"nobody there":    {[]string{"http://127.0.0.1:1/"}, 2, "incomplete", "can't be reached"},
		"another host":    {[]string{"http://192.0.2.1/"}, 2, "", "--yes-this-is-a-test-system"},
		"effects there":   {[]string{"--effects-url", "http://192.0.2.1/", right}, 2, "", "--yes-this-is-a-test-system"},
		"no URL":          {nil, 2, "", "url"},
		"not a URL":       {[]string{"canary"}, 2, "", "http://"},
		"not a header":    {[]string{"--header", "canary", right}, 2, "", "Name: value"},
		"not a profile":   {[]string{"--profile", "canary", right}, 2, "", "must be one of"},
		"two bodies":      {[]string{"--body", "a", "--body-file", body, right}, 2, "", "together"},
		"no body file":    {[]string{"--body-file", body + "canary", right}, 2, "", "can't be opened"},
		"no JUnit file":   {append(key, "--junit", folder+"/none/canary", "http://127.0.0.1:1/"), 2, "incomplete", "JUnit"},
		"not a pointer":   {[]string{"--effects-url", right, "--effects-path", "canary", right}, 2, "", "JSON pointer"},
		"key as a header": {[]string{"--header", "Idempotency-Key: canary", right}, 2, "", "by the examination"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := probeOf(t, append([]string{"probe", "--json"}, test.args...)...)
			if r.code != test.code {
				t.Errorf("exit code %d, want %d\n%s%s", r.code, test.code, r.stdout, r.stderr)
			}
			if test.verdict == "" && r.stdout != "" || test.verdict != "" && object[probed](t, r).Verdict != test.verdict {
				t.Errorf("want the verdict %q:\n%s", test.verdict, r.stdout)
			}
			wantText(t, r.stdout+r.stderr, test.says)
			if strings.Contains(strings.ReplaceAll(r.stdout+r.stderr, "none/canary", ""), "canary") {
				t.Errorf("the output shows a secret:\n%s%s", r.stdout, r.stderr)
			}
			if name == "ok" {
				text, err := os.ReadFile(junit)
				if err != nil || !strings.Contains(string(text), `<testcase classname="idempotency.binding" name="key-scoped">`) {
					t.Errorf("the JUnit report: %v\n%s", err, text)
				}
			}
		})
	}
}

// Ctrl-C ends an examination with a report of the verdicts so far.
func TestProbeIsInterrupted(t *testing.T) {
	t.Parallel()
	seen := make(chan struct{}, 1000)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		seen <- struct{}{}
		w.WriteHeader(http.StatusCreated)
	}))
	t.Cleanup(server.Close)
	ctx, cancel := context.WithTimeout(t.Context(), probeMax)
	defer cancel()
	cmd := command(ctx, "", "probe", "--json", server.URL)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		select {
		case <-seen:
		case <-time.After(waitMax):
			t.Error("no request came")
		}
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait() // the code says it
	r := result{code: cmd.ProcessState.ExitCode(), stdout: stdout.String(), stderr: stderr.String()}
	if r.code != 2 || object[probed](t, r).Verdict != "incomplete" || !strings.Contains(r.stdout, "it was interrupted") {
		t.Errorf("exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	wantText(t, r.stderr, "probe: ")
}

func TestProbeBodyBytesMax(t *testing.T) {
	t.Parallel()
	for size, fits := range map[int]bool{bodyBytesMax: true, bodyBytesMax + 1: false} {
		text, err := (&probeCommand{BodyFile: "-"}).readBody(&app{stdin: strings.NewReader(strings.Repeat("x", size))})
		if (err == nil) != fits || fits && len(text) != size {
			t.Errorf("%d bytes: %d, %v", size, len(text), err)
		}
	}
}
