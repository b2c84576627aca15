package bench

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	hdr "github.com/HdrHistogram/hdrhistogram-go"
	"github.com/google/uuid"

	"github.com/paidonce/idempotency/internal/deadline"
)

const (
	waitDuplicates = 64
	waitPoolSize   = 16

	waitOthers      = 8 // clients with requests unrelated to the duplicates
	waitOthersPause = 20 * time.Millisecond
	// The time for which the others are measured, with duplicates and without.
	waitWindow = waitWork + 100*time.Millisecond

	// waitWindows is the number of windows of each kind in a round, waitWindowsQuick that in a
	// quick run. A window has about 120 requests of others: the 99th percentile of a single window
	// is a single request.
	waitWindows      = 10
	waitWindowsQuick = 2
)

// Wait is the result of simultaneous duplicates of a request that takes long, on a route where they
// wait for each other, and of other requests that were sent meanwhile.
type Wait struct {
	Fsync      string  `json:"fsync"`
	Rounds     int     `json:"rounds"`
	Windows    int     `json:"windows"` // of a round: with duplicates, and as many without
	Duplicates int     `json:"duplicates"`
	WorkMS     float64 `json:"work_ms"` // the time that the handler takes before it pays
	PoolSize   int     `json:"pool_size"`

	RunsMax     int64            `json:"runs_max"`        // of the handler, for one key
	Connections int              `json:"connections_max"` // held by the duplicates at once
	Answers     map[string]int64 `json:"answers"`         // of the duplicates, by status, outcome
	P50MS       float64          `json:"p50_ms"`          // of the duplicates
	P99MS       float64          `json:"p99_ms"`

	With    Others `json:"with"`
	Without Others `json:"without"`
	// Of the others: with duplicates against without, round by round.
	P99 Spread `json:"p99_ratio"`
}

// Others are the requests unrelated to the duplicates.
type Others struct {
	Requests int64   `json:"requests"`
	P50MS    float64 `json:"p50_ms"`
	P99MS    float64 `json:"p99_ms"`
}

// measureWait sends simultaneous duplicates in half of the windows.
func (r *run) measureWait(ctx context.Context) error {
	if err := r.cluster.reset(ctx); err != nil {
		return err
	}
	b := &Block{PoolSize: waitPoolSize}
	if err := r.set(ctx, b, []string{schemaOf(0)}, []string{routeWait, routeOther}); err != nil {
		return err
	}
	clients := r.clients(waitDuplicates + waitOthers)
	defer closeAll(clients)
	duplicates, others := clients[:waitDuplicates], clients[waitDuplicates:]
	other := &target{path: "/" + schemaOf(0) + "/" + routeOther, kind: fresh}
	warmed, err := drive(ctx, clients, other, runIn, 0) // it opens the conns
	if err != nil {
		return err
	}
	acknowledged := warmed.requests

	w := &Wait{
		Fsync: r.cluster.fsync, Duplicates: waitDuplicates, WorkMS: float64(waitWork) / float64(time.Millisecond), PoolSize: waitPoolSize, Answers: map[string]int64{},
	}
	latency := emptyLatency()
	with, without := emptyLatency(), emptyLatency()
	var p99With, p99Without []float64
	w.Rounds, w.Windows = r.config.Rounds, r.config.waitWindows
	for round := range w.Rounds {
		r.enter("duplicates of a request that runs: round %d of %d", round+1, w.Rounds)
		roundWith, roundWithout := emptyLatency(), emptyLatency()
		windows := slices.Repeat([]bool{true, false}, w.Windows) // with duplicates, without
		r.rng.Shuffle(len(windows), func(i, j int) { windows[i], windows[j] = windows[j], windows[i] })
		for _, withDuplicates := range windows {
			before, err := r.child.ask(ctx, order{Stats: true})
			if err != nil {
				return err
			}
			var executed int64
			quiet, err := beside(ctx, others, other, func(ctx context.Context) error {
				if !withDuplicates {
					return nil
				}
				var err error
				executed, err = w.duplicate(ctx, duplicates, latency)
				return err
			})
			if err != nil {
				return err
			}
			after, err := r.child.ask(ctx, order{Stats: true})
			if err != nil {
				return err
			}
			acknowledged += quiet.TotalCount() + executed
			if !withDuplicates {
				roundWithout.Merge(quiet)
				continue
			}
			roundWith.Merge(quiet)
			w.RunsMax = max(w.RunsMax, after.Stats.Runs-before.Stats.Runs)
			w.Connections = max(w.Connections, after.Stats.HeldMax)
		}
		with.Merge(roundWith)
		without.Merge(roundWithout)
		p99With = append(p99With, milliseconds(roundWith, 99))
		p99Without = append(p99Without, milliseconds(roundWithout, 99))
	}
	w.P50MS, w.P99MS = milliseconds(latency, 50), milliseconds(latency, 99)
	w.With = Others{with.TotalCount(), milliseconds(with, 50), milliseconds(with, 99)}
	w.Without = Others{without.TotalCount(), milliseconds(without, 50), milliseconds(without, 99)}
	w.P99 = spreadOf(ratiosOf(p99With, p99Without))
	if err := r.cluster.check(ctx, acknowledged); err != nil {
		return err
	}
	r.wait = w
	return nil
}

// duplicate sends one request from all clients at once, and returns the number that got executed.
func (w *Wait) duplicate(ctx context.Context, clients []*client, latency *hdr.Histogram) (executed int64, err error) {
	key, err := uuid.NewV7()
	if err != nil {
		return 0, err
	}
	body := clients[0].transfer(nil)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var mu sync.Mutex
	var group sync.WaitGroup
	start := make(chan struct{})
	for _, c := range clients {
		group.Go(func() {
			<-start
			started := time.Now()
			err := c.post(ctx, "/"+schemaOf(0)+"/"+routeWait, key.String(), body)
			took := time.Since(started)
			if err != nil {
				c.close()
				cancel(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			// An error is impossible: the value is within the range.
			_ = latency.RecordValue(max(1, min(took, latencyMax).Microseconds()))
			w.Answers[strings.TrimSpace(fmt.Sprintf("%d %s", c.reply.status, c.reply.outcome))]++
			if c.reply.status == http.StatusCreated && c.reply.outcome == "executed" {
				executed++
			}
		})
	}
	close(start)
	group.Wait()
	return executed, context.Cause(ctx)
}

// beside runs do while each client sends a request at regular intervals, until do has returned and
// at least for one window. It returns the latencies of the clients' requests.
func beside(ctx context.Context, clients []*client, t *target, do func(context.Context) error) (*hdr.Histogram, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var over atomic.Bool
	var group sync.WaitGroup
	started := time.Now()
	for i, c := range clients {
		group.Go(func() {
			c.latency.Reset()
			next := started.Add(waitOthersPause * time.Duration(i) / time.Duration(len(clients)))
			for ; !over.Load() && ctx.Err() == nil; next = next.Add(waitOthersPause) {
				if deadline.Sleep(ctx, time.Until(next)) != nil {
					return
				}
				sent := time.Now()
				if err := c.send(ctx, t); err != nil {
					cancel(err)
					return
				}
				// An error is impossible: the value is within the range.
				_ = c.latency.RecordValue(max(1, min(time.Since(sent), latencyMax).Microseconds()))
			}
		})
	}
	if err := do(ctx); err != nil {
		cancel(err)
	}
	// The error that ended it is returned below.
	_ = deadline.Sleep(ctx, waitWindow-time.Since(started))
	over.Store(true)
	group.Wait()
	all := emptyLatency()
	for _, c := range clients {
		all.Merge(c.latency)
	}
	return all, context.Cause(ctx)
}

func (w *Wait) write(b io.Writer) {
	if w == nil {
		return
	}
	fmt.Fprintf(b, "\n%d duplicates at once of a request that takes %.0f ms, fsync %s; %d connections, %d rounds of %d\n", w.Duplicates, w.WorkMS, w.Fsync, w.PoolSize, w.Rounds, w.Windows)
	fmt.Fprintf(b, "the handler ran %d times for a key at most; the duplicates held %d connections at once at most\n", w.RunsMax, w.Connections)
	fmt.Fprintf(b, "duplicates: p50 %.1f ms, p99 %.1f ms; answers:", w.P50MS, w.P99MS)
	for i, name := range sortedKeys(w.Answers) {
		if i > 0 {
			fmt.Fprint(b, ",")
		}
		fmt.Fprintf(b, " %d x %s", w.Answers[name], name)
	}
	fmt.Fprintf(b, "\nothers meanwhile: p50 %.2f ms, p99 %.2f ms; without duplicates: p50 %.2f ms, p99 %.2f ms; p99 x %s\n",
		w.With.P50MS, w.With.P99MS, w.Without.P50MS, w.Without.P99MS, spaced(w.P99.text()))
}
