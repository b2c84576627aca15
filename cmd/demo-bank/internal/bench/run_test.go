package bench

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency/internal/pgtest"
)

// TestRunMeasuresEverything: a run of all parts, each as small as possible. After each setting the
// run itself checks that the replies were true and that no money was made or lost.
func TestRunMeasuresEverything(t *testing.T) {
	if testing.Short() {
		t.Skip("a run takes some seconds")
	}
	t.Parallel()
	var progress bytes.Buffer
	report, err := Run(t.Context(), Config{
		Clients: []int{4}, Fsync: []string{"off"}, Keys: []int64{0, 3000}, Delays: []time.Duration{0},
		Rounds: RoundsMin, Slice: SliceMin, Expired: 2000, Seed: 7, Progress: &progress, waitWindows: 2,
	})
	if err != nil {
		t.Fatal(err)
	}
	report.Command = []string{"demo-bank", "bench"}
	var text bytes.Buffer
	if err := report.WriteText(&text); err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", text.String())
	if len(report.Blocks) != 4 || report.Seed != 7 || len(report.LeftOut) > 0 || report.Versions.PostgreSQL == "" || report.Versions.Go == "" || report.Seconds <= 0 {
		t.Fatalf("the report is %+v", report)
	}
	if report.CPUKnown != (runtime.GOOS == "linux") {
		t.Errorf("CPU is known: %t", report.CPUKnown)
	}
	for _, b := range report.Blocks {
		checkBlock(t, b, report.CPUKnown)
	}
	if keys := report.Blocks[1]; keys.Part != PartKeys || keys.Keys != 3000 || len(keys.Rows) != 5 {
		t.Errorf("the second block is of %s with %d rows", keys.Part, len(keys.Rows))
	}
	if w := report.Wait; w == nil || w.RunsMax < 1 || w.Connections < 1 || w.Connections > waitPoolSize || w.P50MS <= 0 || w.P99MS < float64(waitWork.Milliseconds()) ||
		w.With.Requests == 0 || w.With.P99MS <= 0 || w.Without.Requests == 0 || w.Without.P99MS <= 0 || w.P99.Median <= 0 || w.Answers["201 executed"] != int64(w.Rounds*w.Windows) {
		t.Errorf("of duplicates it says %+v", w)
	}
	if e := report.Expiry; e == nil || e.Keys != 2000 || e.TableBytes == 0 || e.DeleteWAL == 0 || e.DeleteSeconds <= 0 || e.VacuumWAL == 0 || e.VacuumSeconds <= 0 {
		t.Errorf("of expiry it says %+v", e)
	}
	var read Report
	var b bytes.Buffer
	if err := report.WriteJSON(&b); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(b.Bytes(), &read); err != nil || len(read.Blocks) != len(report.Blocks) || len(read.Blocks[0].Samples) != len(requesting())*RoundsMin {
		t.Errorf("its JSON can't be read: %v", err)
	}
	if err := report.WritePlot(&b); err != nil {
		t.Error(err)
	}
	for _, want := range []string{"4 clients, fsync off; 4 connections, 3 rounds", "4 partitions, fsync off; 5 connections, 3 rounds", "msg/s", "consume-slice / consume-bare-slice: throughput", "ours-batch / lease: throughput", "64 duplicates at once", "expiry of 2000 records", "seed 7"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("the text lacks %q", want)
		}
	}
	if !strings.HasPrefix(progress.String(), "bench: 0 s, seed 7, ") {
		t.Errorf("it did not say how far it was: %q", progress.String())
	}
}

// TestStepsOfARun: tables are filled first, and a part that is measured with one fsync setting
// comes once.
func TestStepsOfARun(t *testing.T) {
	t.Parallel()
	var got []string
	for _, s := range newRun((&Config{Keys: []int64{0, 5}, Expired: 9}).full()).steps() {
		got = append(got, s.fsync+": "+s.name)
	}
	if want := []string{
		"off: fill a table with 5 keys",
		"on: 1 client, fsync on", "on: 16 clients, fsync on", "on: 64 clients, fsync on",
		"on: 64 clients, fsync on, a table of 5 keys against an empty one",
		"on: 1 partition, fsync on", "on: 4 partitions, fsync on",
		"on: 1 client, fsync on, 1 ms to PostgreSQL and 1 ms back", "on: 64 clients, fsync on, 1 ms to PostgreSQL and 1 ms back",
		"on: duplicates of a request that runs", "on: expiry of 9 keys",
		"off: 1 client, fsync off", "off: 16 clients, fsync off", "off: 64 clients, fsync off",
		"off: 64 clients, fsync off, a table of 5 keys against an empty one",
		"off: 1 partition, fsync off", "off: 4 partitions, fsync off",
	}; !slices.Equal(got, want) {
		t.Errorf("the steps are %q, want %q", got, want)
	}
}

// TestSlowNetwork: slow both ways, and not slow if no delay is set.
func TestSlowNetwork(t *testing.T) {
	t.Parallel()
	const delay = 20 * time.Millisecond
	c := cluster{server: pgtest.Server(t)}
	if url, err := c.url(0); err != nil || url != c.server.URL() {
		t.Errorf("without a delay the address is another: %v", err)
	}
	url, err := c.url(delay)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.proxy.Close(); err != nil {
			t.Error(err)
		}
	}()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close(context.Background()) }()
	started := time.Now()
	if _, err := conn.Exec(t.Context(), "SELECT 1"); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(started); took < 2*delay {
		t.Errorf("a round trip takes %v, want %v at least", took, 2*delay)
	}
}

// checkBlock requires that no column is empty, and that exact figures are exact.
func checkBlock(t *testing.T, b *Block, cpuKnown bool) {
	t.Helper()
	for _, row := range b.Rows {
		d := designOf(row.Design)
		name := b.title() + ": " + rowName(row.Design, row.Keys, b)
		if row.PerSecond.Lower <= 0 || row.PerSecond.Upper < row.PerSecond.Lower || row.P50MS <= 0 && d.kind != consumes || row.P99MS < row.P50MS || row.Allocations < 10 {
			t.Errorf("%s: %+v", name, row)
		}
		asks := d.kind != plain
		if cpuKnown && (row.GoUS <= 0 || row.CPUUS.Median <= 0 || asks && row.PostgresUS <= 0) && d.kind != plain {
			t.Errorf("%s: processor time is missing: %+v", name, row)
		}
		if fresh := d.kind == fresh; d.kind != consumes && fresh != (row.WALBytes > 500) || d.kind == consumes && (row.WALBytes < 150 || d.keyed && row.WALBytes < 400) {
			t.Errorf("%s: %.0f bytes of WAL", name, row.WALBytes)
		}
		if asks && row.Connections == 0 || d.kind == plain && row.Connections > 0 || row.Connections > int64(b.PoolSize) {
			t.Errorf("%s: %d connections", name, row.Connections)
		}
		if trips, exact := roundTrips[row.Design]; exact && (row.RoundTrips < trips-0.05 || row.RoundTrips > trips+0.5) {
			t.Errorf("%s: %.2f round trips, want %.0f", name, row.RoundTrips, trips)
		}
	}
	for _, r := range b.Ratios {
		if r.Throughput.Median <= 0 || cpuKnown && r.CPU.Median <= 0 {
			t.Errorf("%s: %s / %s is %+v", b.title(), r.Design, r.Base, r)
		}
	}
	if len(b.Samples) != len(b.Rows)*b.Rounds || b.Rounds != RoundsMin {
		t.Errorf("%s: %d samples of %d rows in %d rounds", b.title(), len(b.Samples), len(b.Rows), b.Rounds)
	}
}

// roundTrips are those of the designs that we cannot speed up.
var roundTrips = map[string]float64{
	"bare-naive": 8, "bare-batch": 4, "bare-folded": 2, "insert-first": 6, "lease": 6, "get-by-id": 1, "no-database": 0, "ours-batch": 4, "ours-deferred": 3, "ours-naive": 8,
	"consume-single": 3, "consume-engine": 3, "consume-batch": 1.02, "consume-deferred": 0.02, "consume-slice": 0.03, "consume-bare-single": 4, "consume-bare-slice": 0.04,
}

// TestRunEndsInTime: the report names the parts for which there was no time.
func TestRunEndsInTime(t *testing.T) {
	t.Parallel()
	r := newRun((&Config{Parts: []string{PartDesigns, PartWait}, Clients: []int{1}}).full())
	ctx, cancel := context.WithTimeoutCause(t.Context(), 0, errDuration)
	defer cancel()
	if err := r.parts(ctx); !errors.Is(err, errDuration) {
		t.Fatalf("it ended with %v", err)
	}
	if err := r.close(); err != nil {
		t.Error(err)
	}
	want := []string{"1 client, fsync on", "duplicates of a request that runs", "1 client, fsync off"}
	report := r.report()
	if !slices.Equal(report.LeftOut, want) {
		t.Errorf("it left out %v, want %v", report.LeftOut, want)
	}
	var b bytes.Buffer
	if err := report.WriteText(&b); err != nil || !strings.Contains(b.String(), "left out, the time was over: "+want[1]) {
		t.Errorf("it does not say so: %v\n%s", err, b.String())
	}
}

// TestKeysOfAFullTable: the requested records exist, in the order of time.
func TestKeysOfAFullTable(t *testing.T) {
	t.Parallel()
	c, url := testCluster(t)
	client := testStand(t, url, replayOld)
	f := &filled{keys: 5000, from: 1_700_000_000_000, body: transferBody(nil, 1, 2, 1, 1)}
	path := "/" + schemaOf(0) + "/" + replayOld
	if err := client.post(t.Context(), path, "first", f.body); err != nil {
		t.Fatal(err)
	}
	sql := fmt.Sprintf(sqlFill, tableOf(schemaOf(0)))
	if _, err := c.admin.Exec(t.Context(), sql, "first", f.from, f.keys, 0, f.keys-1, "0"); err != nil {
		t.Fatal(err)
	}
	last := ""
	for i := range f.keys {
		key := f.keyOf(i)
		if key <= last || len(key) != 36 {
			t.Fatalf("key %d is %s, the one before it %s", i, key, last)
		}
		last = key
	}
	var there int64
	if err := c.admin.QueryRow(t.Context(), "SELECT count(*) FROM "+tableOf(schemaOf(0))).Scan(&there); err != nil || there != f.keys+1 {
		t.Errorf("there are %d records: %v", there, err)
	}
	target := &target{path: path, kind: old, oldMax: f.keys, old: func(i int64) record { return record{key: f.keyOf(i), body: f.body} }}
	for range 200 {
		if err := client.send(t.Context(), target); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRunLeavesNothingBehind: even if it is interrupted.
func TestRunLeavesNothingBehind(t *testing.T) {
	dir := pgtest.Folder(t)
	t.Setenv("TMPDIR", dir)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r := newRun((&Config{Quick: true}).full())
	err := r.step(ctx, step{"interrupted", "off", func(context.Context) error {
		cancel()
		_, err := r.child.ask(ctx, order{Stats: true})
		return err
	}})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("it ended with %v", err)
	}
	if err := r.close(); err != nil {
		t.Error(err)
	}
	if left, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(left) > 0 {
		t.Errorf("it left %v: %v", left, err)
	}
	if _, err := os.Stat(r.cluster.dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is there: %v", r.cluster.dir, err)
	}
}
