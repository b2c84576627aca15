//go:build unix

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/chaos"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// temporaryFolder returns a folder that PostgreSQL's account may enter, with a short name.
func temporaryFolder(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "chaos")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestChaosFindsNothingInAGoodBank: with kills at every crash point, crashes of PostgreSQL and
// every kind of fault of a COMMIT, every promise holds. Nothing is left behind.
func TestChaosFindsNothingInAGoodBank(t *testing.T) {
	if testing.Short() || os.Getenv("PAIDONCE_CHAOS") == "apart" {
		t.Skip("a run takes half a minute, or runs apart")
	}
	dir := temporaryFolder(t)
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute)
	defer cancel()
	file := filepath.Join(dir, "report.json")
	cmd := commandIn(ctx, dir, "chaos", "--seed", "11", "--operations", "1500", "--clients", "16", "--duration-max", "5m", "--json", "--report", file)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var report chaos.Report
	if jsonErr := json.Unmarshal(stdout.Bytes(), &report); jsonErr != nil {
		t.Fatalf("%v, %v:\n%s%s", err, jsonErr, stdout.String(), stderr.String())
	}
	var text bytes.Buffer
	if err := report.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", text.String())
	if err != nil || !report.OK() || report.Verdict != "ok" || report.Seed != 11 || report.Requests < 1500 {
		t.Errorf("chaos ended with %v: %v", err, report.Broken)
	}
	if written, err := os.ReadFile(file); err != nil || !bytes.Equal(written, stdout.Bytes()) {
		t.Errorf("the report in the file is not the one on stdout: %v", err)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 {
		t.Errorf("it left behind %v: %v", left, err)
	}
	if !strings.HasPrefix(stderr.String(), "chaos: ") {
		t.Errorf("it did not say how far it was: %q", stderr.String())
	}
}

// TestChaosInTimeOrBroken: a run that exceeds its maximum duration fails, says so, and keeps its
// data if --keep is set.
func TestChaosInTimeOrBroken(t *testing.T) {
	if testing.Short() {
		t.Skip("a run takes ten seconds at least")
	}
	dir := temporaryFolder(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := commandIn(ctx, dir, "chaos", "--duration-max", "10s", "--clients", "4", "--keep")
	var log strings.Builder
	cmd.Stderr = &log
	output, err := cmd.Output()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Fatalf("it ended with %v, want exit code 1:\n%s%s", err, log.String(), output)
	}
	if !strings.Contains(string(output), "longer than --duration-max") || !strings.HasSuffix(string(output), "verdict: broken\n") {
		t.Errorf("it does not say why:\n%s", output)
	}
	kept, err := filepath.Glob(filepath.Join(dir, "demo-bank-chaos-*", "chaos.log"))
	if err != nil || len(kept) != 1 || !strings.Contains(string(output), "kept: "+filepath.Dir(kept[0])) {
		t.Errorf("it kept %v: %v\n%s", kept, err, output)
	}
}

// TestChaosPrintsItsSchedule: the same seed prints the same schedule, and nothing is run.
func TestChaosPrintsItsSchedule(t *testing.T) {
	t.Parallel()
	dir := temporaryFolder(t)
	schedule := func(args ...string) string {
		output, err := commandIn(t.Context(), dir, append(append([]string{"chaos"}, args...), "--print-schedule")...).Output()
		if err != nil {
			t.Fatal(err)
		}
		return string(output)
	}
	one := schedule("--seed", "5")
	drawn := schedule()
	if one != schedule("--seed", "5") || one == schedule("--seed", "6") || drawn == schedule() {
		t.Error("the schedule is not the seed's alone, or no seed is drawn")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 || !strings.Contains(one, "postgres-immediate") {
		t.Errorf("it left behind %v (%v), and printed\n%s", left, err, one)
	}
}

// TestChaosStopsWhenTold: an interrupted run exits with 2, for no verdict, and leaves nothing
// behind.
func TestChaosStopsWhenTold(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "runs a bank under chaos")
	dir := temporaryFolder(t)
	cmd := commandIn(t.Context(), dir, "chaos", "--clients", "2")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the banks are there", func() bool {
		logs, _ := filepath.Glob(filepath.Join(dir, "demo-bank-chaos-*", "bank-*.log"))
		return len(logs) == 2
	})
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 2 {
		t.Errorf("it ended with %v, want exit code 2:\n%s", err, stderr.String())
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("it left behind %v: %v", left, err)
	}
}
