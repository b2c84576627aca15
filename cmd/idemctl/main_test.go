package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/internal/testservice"
)

// asProgram names an environment variable that makes this test binary the program. So the program
// has the race detector if the tests have it.
const asProgram = "IDEMCTL_TEST_AS_PROGRAM"

// waitMax limits every wait. It is long because the machine may be loaded.
const waitMax = 60 * time.Second

func TestMain(m *testing.M) {
	if os.Getenv(asProgram) != "" {
		main()
		return
	}
	pgtest.Main(m)
}

// testBundle is a service on a database, which the program reads.
type testBundle struct{ *testservice.Service }

func setup(t testing.TB) *testBundle {
	t.Helper()
	return &testBundle{testservice.New(t, nil)}
}

// role makes a role with exactly these privileges, and returns its database URL.
func (b *testBundle) role(t testing.TB, grants ...string) (database string) {
	t.Helper()
	_, database = b.Role(t, grants...)
	return database
}

func key(value string) idempotency.Key { return idempotency.Key{Scope: "acme", Value: value} }

// do makes the service answer a request.
func (b *testBundle) do(t testing.TB, value string) idempotency.Outcome {
	t.Helper()
	return b.Do(t, key(value), &idempotency.Answer{
		Status: 201, Header: map[string][]string{"Content-Type": {"text/plain"}}, Body: []byte("paid\n\x1b[31m"),
	}).Outcome
}

// running starts a request. Its handler runs until the returned function is called.
func (b *testBundle) running(t testing.TB, value string) (finish func()) {
	t.Helper()
	end := b.Running(t, key(value))
	return func() {
		if result := end(); result.Outcome != idempotency.OutcomeExecuted {
			t.Errorf("it ended as %s, %v", result.Outcome, result.Err)
		}
	}
}

// result is the result of the program.
type result struct {
	code           int
	stdout, stderr string
	took           time.Duration
}

// command returns the program, ready to start.
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
	return execute(t, command(ctx, b.URL, args...))
}

// want requires that the program exits with code, and returns the result.
func (b *testBundle) want(t testing.TB, code int, args ...string) result {
	t.Helper()
	r := b.idemctl(t, args...)
	if r.code != code {
		t.Errorf("%v: exit code %d, want %d\n%s%s", args, r.code, code, r.stdout, r.stderr)
	}
	return r
}

// objects decodes the JSON objects that the program printed.
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

// object decodes the only JSON object that the program printed.
func object[T any](t testing.TB, r result) T {
	t.Helper()
	all := objects[T](t, r)
	if len(all) != 1 {
		t.Fatalf("%d objects in %q, %q", len(all), r.stdout, r.stderr)
	}
	return all[0]
}

// wantText requires that the output contains every text.
func wantText(t testing.TB, got string, want ...string) {
	t.Helper()
	for _, text := range want {
		if !strings.Contains(got, text) {
			t.Errorf("there is no %q in\n%s", text, got)
		}
	}
}
