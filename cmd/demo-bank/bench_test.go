//go:build unix

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bench"
)

// TestBenchReports: the report goes to stdout, a file and a picture. Nothing else is left behind.
func TestBenchReports(t *testing.T) {
	if testing.Short() {
		t.Skip("a run takes some seconds")
	}
	t.Parallel()
	dir := temporaryFolder(t)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	report, plot := filepath.Join(dir, "report.json"), filepath.Join(dir, "plot.svg")
	args := []string{
		"--quick", "--seed", "3", "--parts", "designs", "--designs", "bare-batch,ours-batch", "--clients", "1", "--fsync", "off", "--rounds", "3", "--slice", "20ms",
		"--json", "--report", report, "--plot", plot,
	}
	output, err := commandIn(ctx, dir, append([]string{"bench"}, args...)...).Output()
	if err != nil {
		t.Fatalf("it ended with %v: %s", err, output)
	}
	var r bench.Report
	if err := json.Unmarshal(output, &r); err != nil || len(r.Blocks) != 1 || len(r.Blocks[0].Rows) != 2 || r.Seed != 3 {
		t.Errorf("%v, it printed %s", err, output)
	}
	if want := strings.Join(append([]string{"demo-bank", "bench"}, args...), " "); strings.Join(r.Command, " ") != want {
		t.Errorf("it says that it was called as %v, want %s", r.Command, want)
	}
	if written, err := os.ReadFile(report); err != nil || !bytes.Equal(written, output) {
		t.Errorf("the report in the file is not the one on stdout: %v", err)
	}
	picture, err := os.ReadFile(plot)
	if err != nil {
		t.Fatal(err)
	}
	for decoder := xml.NewDecoder(bytes.NewReader(picture)); ; {
		if _, err := decoder.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("the plot: %v", err)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 2 {
		t.Errorf("it left behind %v: %v", left, err)
	}
}

// TestBenchStopsWhenTold: an interrupted run exits with 2, for no result, and leaves nothing
// behind.
func TestBenchStopsWhenTold(t *testing.T) {
	t.Parallel()
	dir := temporaryFolder(t)
	cmd := commandIn(t.Context(), dir, "bench", "--parts", "designs", "--clients", "2")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, "PostgreSQL is there", func() bool {
		sockets, _ := filepath.Glob(filepath.Join(dir, "demo-bank-bench-*", "postgres"))
		return len(sockets) == 1
	})
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 2 || stdout.Len() > 0 || !strings.Contains(stderr.String(), "no verdict: interrupted") {
		t.Errorf("it ended with %v, want exit code 2:\n%s%s", err, stdout.String(), stderr.String())
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("it left behind %v: %v", left, err)
	}
}

// TestBenchRefusesWhatCannotBe: an impossible setting is refused with the flag's name.
func TestBenchRefusesWhatCannotBe(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{
		{"--clients", "0"}, {"--fsync", "maybe"}, {"--keys=-1"}, {"--delay", "1us"}, {"--designs", "x"}, {"--parts", "x"}, {"--rounds", "2"},
		{"--slice", "1ms"}, {"--pool-size", "257"}, {"--expired=-1"}, {"--duration-max", "1s"},
	} {
		output, err := commandIn(t.Context(), t.TempDir(), append([]string{"bench"}, args...)...).CombinedOutput()
		var exit *exec.ExitError
		flag, _, _ := strings.Cut(args[0], "=")
		if !errors.As(err, &exit) || !strings.Contains(string(output), flag+" must be") {
			t.Errorf("%v: %v\n%s", args, err, output)
		}
	}
}
