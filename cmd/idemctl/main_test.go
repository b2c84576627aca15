package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/url"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// asProgram, in the environment, makes this test binary the program, built once and with the race detector where the
// tests are.
const asProgram = "IDEMCTL_TEST_AS_PROGRAM"

// waitMax bounds every wait, on a machine that does other things too.
const waitMax = 60 * time.Second

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		return
	}
	pgtest.Main(m)
}

// testBundle is a database with the tables in it, and a service on it.
type testBundle struct {
	url    string
	pool   *pgxpool.Pool
	engine *idempotency.Engine
}

func setup(t testing.TB) *testBundle {
	t.Helper()
	b := &testBundle{url: pgtest.Database(t)}
	b.pool = open(t, b.url, "10s")
	if err := migrations.Up(t.Context(), postgres.New(b.pool, nil), nil); err != nil {
		t.Fatal(err)
	}
	b.engine = idempotency.NewEngine(postgres.New(b.pool, nil), nil)
	return b
}

func open(t testing.TB, database, statementTimeout string) *pgxpool.Pool {
	t.Helper()
	config, err := pgxpool.ParseConfig(database)
	if err != nil {
		t.Fatal(err)
	}
	config.ConnConfig.RuntimeParams["statement_timeout"] = statementTimeout
	postgres.Configure(config, nil)
	pool, err := pgxpool.NewWithConfig(context.Background(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

// role makes a role with the privileges and no others, and returns the database's address as it sees it.
func (b *testBundle) role(t testing.TB, grants ...string) (database string) {
	t.Helper()
	name := "test_" + strings.ReplaceAll(uuid.NewString(), "-", "")
	b.exec(t, "CREATE ROLE "+name+" LOGIN PASSWORD 'canary-password'")
	t.Cleanup(func() {
		for _, sql := range []string{"DROP OWNED BY " + name, "DROP ROLE " + name} {
			if _, err := b.pool.Exec(context.Background(), sql); err != nil {
				t.Errorf("%s: %v", sql, err)
			}
		}
	})
	for _, grant := range grants {
		b.exec(t, "GRANT "+grant+" TO "+name)
	}
	address, err := url.Parse(b.url)
	if err != nil {
		t.Fatal(err)
	}
	address.User = url.UserPassword(name, "canary-password")
	return address.String()
}

func (b *testBundle) exec(t testing.TB, sql string, arguments ...any) {
	t.Helper()
	if _, err := b.pool.Exec(context.Background(), sql, arguments...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

func (b *testBundle) count(t testing.TB, sql string, arguments ...any) (n int) {
	t.Helper()
	if err := b.pool.QueryRow(context.Background(), sql, arguments...).Scan(&n); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return n
}

func request(value string) idempotency.Request {
	return idempotency.Request{
		Key:         idempotency.Key{Scope: "acme", Value: value},
		Fingerprint: idempotency.FingerprintV1("POST", "/transfers", "", "application/json", []byte(value)), TraceID: "trace-" + value,
	}
}

// do has the service answer a request.
func (b *testBundle) do(t testing.TB, value string) idempotency.Outcome {
	t.Helper()
	result := b.engine.Do(context.Background(), request(value), func(context.Context) (*idempotency.Answer, error) {
		return &idempotency.Answer{Status: 201, Header: map[string][]string{"Content-Type": {"text/plain"}}, Body: []byte("paid\n\x1b[31m")}, nil
	})
	if result.Err != nil {
		t.Fatal(result.Err)
	}
	return result.Outcome
}

// running starts a request whose handler runs until the returned function is called.
func (b *testBundle) running(t testing.TB, value string) (finish func()) {
	t.Helper()
	begun, release := make(chan struct{}), make(chan struct{})
	ended := make(chan idempotency.Result, 1)
	go func() {
		ended <- b.engine.Do(context.Background(), request(value), func(context.Context) (*idempotency.Answer, error) {
			close(begun)
			<-release
			return &idempotency.Answer{Status: 201}, nil
		})
	}()
	<-begun
	finish = sync.OnceFunc(func() {
		close(release)
		if result := <-ended; result.Outcome != idempotency.OutcomeExecuted {
			t.Errorf("it ended as %s, %v", result.Outcome, result.Err)
		}
	})
	t.Cleanup(finish) // a pool is closed after that
	return finish
}

// result is what the program did.
type result struct {
	code           int
	stdout, stderr string
	took           time.Duration
}

// command returns the program, ready to be started.
func command(ctx context.Context, database string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Env = append(slices.DeleteFunc(os.Environ(), func(s string) bool {
		return strings.HasPrefix(s, "DATABASE_URL=") || strings.HasPrefix(s, "PG")
	}), asProgram+"=1", "DATABASE_URL="+database)
	return cmd
}

// execute runs the program to its end.
func execute(t testing.TB, cmd *exec.Cmd) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	started := time.Now()
	err := cmd.Run()
	r := result{stdout: stdout.String(), stderr: stderr.String(), took: time.Since(started)}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		r.code = exit.ExitCode()
	case err != nil:
		t.Fatalf("%v: %v", cmd.Args[1:], err)
	}
	return r
}

// idemctl runs the program to its end on the bundle's database.
func (b *testBundle) idemctl(t testing.TB, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), waitMax)
	defer cancel()
	return execute(t, command(ctx, b.url, args...))
}

// want has the program end with a code, and returns what it did.
func (b *testBundle) want(t testing.TB, code int, args ...string) result {
	t.Helper()
	r := b.idemctl(t, args...)
	if r.code != code {
		t.Errorf("%v: exit code %d, want %d\n%s%s", args, r.code, code, r.stdout, r.stderr)
	}
	return r
}

// objects returns what the program printed as JSON.
func objects[T any](t testing.TB, r result) (all []T) {
	t.Helper()
	for decoder := json.NewDecoder(strings.NewReader(r.stdout)); decoder.More(); {
		var one T
		if err := decoder.Decode(&one); err != nil {
			t.Fatalf("%v in %s", err, r.stdout)
		}
		all = append(all, one)
	}
	return all
}

// object returns the one object that the program printed.
func object[T any](t testing.TB, r result) T {
	t.Helper()
	all := objects[T](t, r)
	if len(all) != 1 {
		t.Fatalf("%d objects in %q, %q", len(all), r.stdout, r.stderr)
	}
	return all[0]
}

// wantText has the output hold every one of the texts.
func wantText(t testing.TB, got string, want ...string) {
	t.Helper()
	for _, text := range want {
		if !strings.Contains(got, text) {
			t.Errorf("there is no %q in\n%s", text, got)
		}
	}
}
