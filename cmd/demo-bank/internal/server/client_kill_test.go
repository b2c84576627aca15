package server

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paidonce/idempotency/client"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// childVariable makes the test binary a client: "<bank's URL> <database of intents> <round>".
const childVariable = "PAIDONCE_CLIENTPROOF_CHILD"

const (
	rounds     = 12
	childPlays = 8   // concurrent operations
	linesMin   = 10  // a child is killed after this many printed lines
	linesMax   = 150 // at most
)

type operationName struct{}

// child resumes the intents of earlier children, and pays until it is killed. It prints "saved" and
// an operation when the intent is saved, right before the first attempt; then "paid", and
// "resumed".
func child() int {
	arguments := strings.Fields(os.Getenv(childVariable))
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "child:", err)
		return 2
	}
	// One write per line. The parent reads until the kill.
	say := func(words ...string) { _, _ = os.Stdout.WriteString(strings.Join(words, " ") + "\n") }
	ctx := context.Background()
	intents, _, err := openIntents(ctx, arguments[1])
	if err != nil {
		return fail(err)
	}
	o := options(intents)
	o.Unbudgeted = true
	o.Trace = func(ctx context.Context, e client.Event) {
		if name, ok := ctx.Value(operationName{}).(string); ok && e.Kind == client.EventStarted && e.Attempt == 1 {
			say("saved", name)
		}
	}
	transport := client.New(newBase(), o)
	report, err := transport.Resume(ctx, nil)
	if err != nil {
		return fail(err)
	}
	say("resumed", strconv.Itoa(report.Settled))
	payer := &payer{http: &http.Client{Transport: transport}, url: arguments[0]}
	var next atomic.Int64
	var group sync.WaitGroup
	for range childPlays {
		group.Go(func() {
			for {
				i := int(next.Add(1))
				name := fmt.Sprintf("r%s-%06d", arguments[2], i)
				if _, err := payer.pay(context.WithValue(ctx, operationName{}, name), transferBody(i, name)); err != nil {
					fmt.Fprintln(os.Stderr, "child:", err)
					os.Exit(2)
				}
				say("paid", name)
			}
		})
	}
	group.Wait()
	return 0
}

// TestKilledClientGoesOnWithTheSameKeys: a client is killed with -9 during its work, again and
// again, behind a proxy that loses requests and replies. Each payment that it ever intended is made
// once.
func TestKilledClientGoesOnWithTheSameKeys(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "kills and restarts a client")
	b := setupShedding(t)
	p := startProxy(t, b)
	database := pgtest.Database(t)
	saved, paid, resumed := map[string]bool{}, map[string]bool{}, 0
	for round := range rounds {
		resumed += runChild(t, fmt.Sprintf("http://%s %s %02d", p.address, database, round), saved, paid)
	}

	// The last client is not killed.
	intents, pool, err := openIntents(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	o := options(intents)
	o.Unbudgeted = true
	transport := client.New(newBase(), o)
	defer transport.CloseIdleConnections()
	for {
		report, err := transport.Resume(t.Context(), func(_ context.Context, r *client.Resumed) error {
			if r.Intent.Header.Get("Authorization") != "" {
				t.Error("an intent keeps a credential")
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		resumed += report.Settled
		if report.Kept == 0 {
			break
		}
	}

	t.Logf("%d rounds: %d saved, %d paid before the kill, %d resumed", rounds, len(saved), len(paid), resumed)
	for name := range saved {
		if n := b.count(`SELECT count(*) FROM transfers WHERE reference = $1`, name); n != 1 {
			t.Errorf("%s was saved, and is %d times in the books", name, n)
		}
	}
	if n := b.count(`SELECT count(*) FROM (SELECT FROM transfers WHERE reference LIKE 'r%' GROUP BY reference HAVING count(*) > 1) AS doubles`); n > 0 {
		t.Errorf("%d are more than once in the books", n)
	}
	if audit := b.audit(); !audit.OK {
		t.Errorf("audit is %+v", audit)
	}
	if resumed == 0 || len(paid) == 0 || len(saved) <= len(paid) {
		t.Error("no client was killed in the middle of its work")
	}
}

// runChild starts a child and kills it after a number of lines. It returns the number of intents
// that it resumed.
func runChild(t *testing.T, arguments string, saved, paid map[string]bool) (resumed int) {
	t.Helper()
	command := exec.Command(os.Args[0])
	command.Env = append(os.Environ(), childVariable+"="+arguments)
	command.Stderr = os.Stderr
	stdout, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}
	watchdog := time.AfterFunc(startTimeout, func() { _ = command.Process.Kill() })
	defer watchdog.Stop()
	left := linesMin + rand.IntN(linesMax-linesMin)
	// To the end: lines from before the kill count.
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		what, name, _ := strings.Cut(lines.Text(), " ")
		switch what {
		case "saved":
			saved[name] = true
		case "paid":
			paid[name] = true
		case "resumed":
			resumed, _ = strconv.Atoi(name)
		}
		if left--; left == 0 {
			if err := command.Process.Kill(); err != nil { // kill -9
				t.Error(err)
			}
		}
	}
	if err := command.Wait(); err == nil || left > 0 {
		t.Fatalf("a child ended by itself: %v", err)
	}
	return resumed
}
