package server

import (
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/storm"
	"github.com/paidonce/idempotency/internal/pgtest"
)

func stormOn(t *testing.T, url string, change ...func(*storm.Config)) *storm.Report {
	t.Helper()
	config := storm.Config{URL: url, Keys: 300, Copies: 4, Clients: 16, Patience: startTimeout}
	for _, f := range change {
		f(&config)
	}
	report, err := storm.Run(t.Context(), config)
	if err != nil {
		t.Fatalf("storm: %v", err)
	}
	return report
}

// TestTwoBanksOpenTheBooksOnce: two banks that start at once on an empty database migrate and seed
// it once.
func TestTwoBanksOpenTheBooksOnce(t *testing.T) {
	t.Parallel()
	database := pgtest.Database(t)
	one, other := launch(t, database), launch(t, database)
	for _, b := range []*bundle{one(), other()} {
		if audit := b.audit(); !audit.OK || audit.Accounts != 1002 || audit.OpeningTotal != "120000000" {
			t.Errorf("audit is %+v", audit)
		}
	}
}

// TestStormFindsAMissingMiddleware shows that the verdict means something: without the middleware
// the same storm breaks the bank, and names the faults.
func TestStormFindsAMissingMiddleware(t *testing.T) {
	t.Parallel()
	b := setup(t, func(c *Config) { c.withoutMiddleware = true })
	report := stormOn(t, b.url, func(c *storm.Config) { c.Keys = 50 })
	if report.OK() || report.Verdict != "broken" {
		t.Fatalf("verdict is %s", report.Verdict)
	}
	for _, want := range []string{"two different answers for one key", "a key has two transfers", "a changed body was not refused as a mismatch", "the audit is not ok"} {
		if !slices.ContainsFunc(report.Broken, func(s string) bool { return strings.HasPrefix(s, want) }) {
			t.Errorf("the verdict does not say %q: %v", want, report.Broken)
		}
	}
}

// TestStormProgramExitsWithTheVerdict: it exits with 0 for the bank, and with 1 for the same bank
// without its middleware.
func TestStormProgramExitsWithTheVerdict(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "starts the storm as a program")
	program := filepath.Join(t.TempDir(), "demo-bank")
	if output, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, "github.com/paidonce/idempotency/cmd/demo-bank").CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, output)
	}
	for without, want := range map[bool]int{false: 0, true: 1} {
		b := setup(t, func(c *Config) { c.withoutMiddleware = without })
		storm := exec.CommandContext(t.Context(), program, "storm", "--url", b.url, "--keys", "100")
		output, _ := storm.CombinedOutput() // the exit code is checked below
		if got := storm.ProcessState.ExitCode(); got != want {
			t.Errorf("without the middleware: %t; exit code %d, want %d:\n%s", without, got, want, output)
		}
	}
}

// TestAStormCanBeRepeated: keys are new each time, even with the same seed, and the books stay
// right.
func TestAStormCanBeRepeated(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for i, change := range []func(*storm.Config){
		func(c *storm.Config) { c.Keys, c.Copies, c.Clients, c.Seed = 20, 1, 1, 7 },
		func(c *storm.Config) { c.Keys, c.Copies, c.Clients, c.Seed = 20, 3, 3, 7 },
	} {
		report := stormOn(t, b.url, change)
		if !report.OK() || report.KeysAcknowledged != 20 || report.Audit.Transfers != int64(20*(i+1)) {
			t.Errorf("storm %d: %+v", i, report)
		}
	}
	if _, err := storm.Run(t.Context(), storm.Config{URL: b.url + "/elsewhere", Keys: 1, Copies: 1, Clients: 1, Patience: time.Second}); err == nil {
		t.Error("a storm on a path without a bank has a verdict")
	}
}

// TestAStormThatMovesNoMoneyShowsNothing: if every transfer is declined, nothing is broken and
// nothing is proven.
func TestAStormThatMovesNoMoneyShowsNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	if _, err := b.db.Exec(t.Context(), "UPDATE accounts SET balance = 0, opening_balance = 0"); err != nil {
		t.Fatal(err)
	}
	if report := stormOn(t, b.url, func(c *storm.Config) { c.Keys = 20 }); report.Verdict != storm.VerdictNone || report.KeysAcknowledged != 0 {
		t.Errorf("verdict is %s with %d acknowledged keys", report.Verdict, report.KeysAcknowledged)
	}
}
