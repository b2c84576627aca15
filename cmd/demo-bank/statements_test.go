//go:build unix

package main

import (
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/events"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/live"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/live/livetest"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/storm"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// actMax limits the wait for the end of an act. It is longer than the page's own limit.
const actMax = 4 * time.Minute

// broken is a bank with a page that breaks consumers.
type broken struct {
	*testing.T
	p      *program
	client *http.Client
	db     *pgxpool.Pool
}

// act presses a button, and returns the state that the page shows at the end of the act.
func (b *broken) act(fields ...string) *live.Statements {
	b.Helper()
	form := url.Values{"act": fields[:1]}
	if len(fields) > 1 {
		form.Set("id", fields[1])
	}
	request, err := http.NewRequestWithContext(b.Context(), http.MethodPost, b.p.url+"/live/statements", strings.NewReader(form.Encode()))
	if err != nil {
		b.Fatal(err)
	}
	request.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	request.Header.Set("Accept", "application/json")
	response, err := b.client.Do(request)
	if err != nil {
		b.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusAccepted {
		b.Fatalf("%s is answered with %d %s %v", fields, response.StatusCode, body, err)
	}
	var shown live.Statements
	if err := json.Unmarshal(body, &shown); err != nil || shown.State != live.StatementsRunning {
		b.Errorf("%s is answered with %s: %v", fields, body, err)
	}
	return b.over()
}

// over waits until no act is under way, and returns the state that the page shows.
func (b *broken) over() *live.Statements {
	b.Helper()
	stream := http.Client{Transport: b.client.Transport, Timeout: actMax}
	response, err := stream.Get(b.p.url + "/live/events")
	if err != nil {
		b.Fatal(err)
	}
	defer response.Body.Close()
	var s livetest.State
	for e, err := range livetest.Events(response.Body) {
		if err == nil {
			err = s.Apply(e)
		}
		if err != nil {
			b.Fatalf("the stream broke: %v; it showed %+v", err, s.Statements)
		}
		if s.Statements != nil && s.Statements.State != live.StatementsRunning {
			break
		}
	}
	if s.Statements == nil || s.Statements.State != live.StatementsEnded || s.Statements.Line == "" {
		b.Fatalf("the page shows %+v; the bank says\n%s", s.Statements, b.p.stderr.String())
	}
	return s.Statements
}

// rows returns the number of payments with a number of copies in a projection that meets the
// condition. It is the test's own count.
func (b *broken) rows(inbox bool, having string) (number int64) {
	b.Helper()
	if err := b.db.QueryRow(b.Context(), `
		SELECT count(*) FROM (SELECT transfer FROM `+events.ShownProjection(inbox, "").Entries+` WHERE amount < 0 GROUP BY transfer HAVING `+having+`) AS payments`).Scan(&number); err != nil {
		b.Fatal(err)
	}
	return number
}

// backends returns the process ids of the consumers' connections.
func (b *broken) backends() []int32 {
	b.Helper()
	rows, err := b.db.Query(b.Context(), `SELECT pid FROM pg_stat_activity WHERE application_name LIKE 'statements-%' AND datname = current_database()`)
	if err != nil {
		b.Fatal(err)
	}
	pids, err := pgx.CollectRows(rows, pgx.RowTo[int32])
	if err != nil {
		b.Fatal(err)
	}
	return pids
}

// TestPageBreaksConsumers presses each button on the page of a bank. After each fault the
// projection with the inbox has each payment once. The projection without an inbox shows each
// fault: Mode 13 (kill, lost COMMIT), Mode 14 (pause), Mode 6 (published twice), Mode 21 (poison).
// A redrive keeps the id (Mode 23). The bank's own books stay right.
func TestPageBreaksConsumers(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "kills and pauses processes")
	database := pgtest.Database(t)
	b := &broken{
		T: t, p: serve(t, "--addr", "127.0.0.1:0", "--database-url", database, "--pool-size", "16"), client: newClient(t),
		db: pgtest.Pool(t, database, map[string]string{"search_path": bank.Schema}),
	}
	if response, body, err := post(b.client, b.p.url, "not-of-the-page", `{"from":"alice","to":"bob","amount":7}`); err != nil || response.StatusCode != http.StatusCreated {
		t.Fatalf("transfer: %v %s %v", response, body, err)
	}
	// exact requires that the projection with the inbox matches the books.
	exact := func(t *testing.T, s *live.Statements, dead int64) {
		t.Helper()
		side := s.Sides[0]
		if side.Missing != 0 || side.Doubled != 0 || side.Mismatches != 0 || side.Dead != dead || side.Projected != s.Payments-dead || int64(len(s.Dead)) != dead {
			t.Errorf("with the inbox the page shows %+v", s)
		}
		if once, twice := b.rows(true, "count(*) = 1"), b.rows(true, "count(*) > 1"); once != s.Payments-dead || twice != 0 {
			t.Errorf("of %d payments %d are projected once, %d more than once", s.Payments, once, twice)
		}
	}
	last := &live.Statements{}
	// doubles requires that the projection without an inbox has at least this number of new
	// doubles.
	doubles := func(t *testing.T, s *live.Statements, more int64) {
		t.Helper()
		side, before := s.Sides[1], last.Sides[1]
		if side.Doubled < before.Doubled+more || side.Mismatches == 0 || side.Missing != before.Missing {
			t.Errorf("without an inbox the page shows %+v after %+v", side, before)
		}
		if twice := b.rows(false, "count(*) > 1"); twice < side.Doubled {
			t.Errorf("%d payments are doubled, the page shows %+v", twice, side)
		}
	}
	press := func(name string, check func(t *testing.T, s *live.Statements)) {
		t.Run(name, func(t *testing.T) {
			b.T = t
			defer func() { b.T = nil }()
			s := b.act(name)
			check(t, s)
			last = s
		})
	}
	press("lose", func(t *testing.T, s *live.Statements) {
		exact(t, s, 0)
		doubles(t, s, 1)
		if s.Payments != 16 {
			t.Errorf("%d payments were made", s.Payments)
		}
	})
	press("twice", func(t *testing.T, s *live.Statements) {
		exact(t, s, 0)
		doubles(t, s, 48)
		if s.Payments != 16+48 {
			t.Errorf("%d payments were made", s.Payments)
		}
	})
	var before []int32
	t.Run("processes", func(t *testing.T) { b.T = t; before = b.backends() })
	press("kill", func(t *testing.T, s *live.Statements) {
		exact(t, s, 0)
		doubles(t, s, 1)
		for _, pid := range b.backends() {
			if slices.Contains(before, pid) {
				t.Errorf("backend %d outlived the process", pid)
			}
		}
		if len(before) < live.ConsumersShown {
			t.Errorf("the consumers have %d connections", len(before))
		}
	})
	press("pause", func(t *testing.T, s *live.Statements) {
		exact(t, s, 0)
		doubles(t, s, 1)
	})
	press("poison", func(t *testing.T, s *live.Statements) {
		exact(t, s, 1)
		if side := s.Sides[1]; side.Missing != 1 || side.Dead != 0 {
			t.Errorf("without an inbox the page shows %+v", side)
		}
		if len(s.Dead) != 1 || s.Dead[0].ID == "" || s.Dead[0].Error == "" || !strings.Contains(s.Dead[0].Account, "-poison-") {
			t.Errorf("after the poison the page shows %+v", s)
		}
	})
	t.Run("redrive", func(t *testing.T) {
		b.T = t
		if len(last.Dead) != 1 {
			t.Fatal("there is no dead letter")
		}
		id := last.Dead[0].ID
		s := b.act("redrive", id)
		exact(t, s, 0)
		if side := s.Sides[1]; side.Missing != 1 {
			t.Errorf("what the other side lost came back: %+v", side)
		}
		var recorded bool
		err := b.db.QueryRow(t.Context(), `
			SELECT EXISTS (SELECT FROM `+events.ShownSchema+`.idempotency_keys k JOIN transfers t ON t.message_id::text = k.key
				JOIN `+events.ShownProjection(true, "").Entries+` e ON e.transfer = t.id::text WHERE k.key = $1)`, id).Scan(&recorded)
		if err != nil || !recorded {
			t.Errorf("the redriven message has no record under its id, or no effect: %v", err)
		}
		b.act("redrive", id) // as another viewer may: the message is not parked any more
	})
	b.T = t
	eventually(t, "the bank's own books are settled and ok", func() bool {
		var a bank.Audit
		if err := storm.Get(t.Context(), b.client, b.p.url+"/v1/audit", &a); err != nil {
			t.Fatal(err)
		}
		return a.OK && a.OutboxPending == 0 && a.ProjectionLag != nil && *a.ProjectionLag == 0 && a.MessagesDead == 0 &&
			a.ProjectionMissing+a.ProjectionDoubled+a.ProjectionMismatches == 0
	})
	b.p.kill()
	eventually(t, "the consumers end with the bank", func() bool { return len(b.backends()) == 0 })
}

// TestPageHasNoConsumersWithoutItsBroker: the page shows consumers only with the broker inside.
func TestPageHasNoConsumersWithoutItsBroker(t *testing.T) {
	t.Parallel()
	p := serve(t, "--addr", "127.0.0.1:0", "--database-url", pgtest.Database(t), "--pool-size", "16", "--brokers", "127.0.0.1:1")
	response, err := newClient(t).PostForm(p.url+"/live/statements", url.Values{"act": {"kill"}})
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusConflict || !strings.Contains(string(body), "#act-unavailable") || !strings.Contains(string(body), "--brokers") {
		t.Errorf("the answer is %d %s %v", response.StatusCode, body, err)
	}
}

// TestPageShowsNoConsumersOfTwoBanks: with two brokers inside on one database either relay may
// publish the messages, so a projection would be judged without them.
func TestPageShowsNoConsumersOfTwoBanks(t *testing.T) {
	t.Parallel()
	pgtest.Slow(t, "starts two banks")
	database := pgtest.Database(t)
	p := serve(t, "--addr", "127.0.0.1:0", "--database-url", database, "--pool-size", "16")
	other := serve(t, "--addr", "127.0.0.1:0", "--database-url", database, "--pool-size", "16")
	client := newClient(t)
	response, err := client.PostForm(p.url+"/live/statements", url.Values{"act": {"kill"}})
	if err != nil {
		t.Fatal(err)
	}
	_ = response.Body.Close()
	var line string
	eventually(t, "the page refuses", func() bool {
		events, err := client.Get(p.url + "/live/events")
		if err != nil {
			t.Fatal(err)
		}
		defer events.Body.Close()
		for e, err := range livetest.Events(events.Body) {
			if f, frameErr := e.Frame(); err == nil && frameErr == nil && f.Statements != nil {
				line = f.Statements.Line
				return f.Statements.State == live.StatementsFailed
			}
			break
		}
		return false
	})
	if !strings.Contains(line, "Another bank") {
		t.Errorf("the page says %q", line)
	}
	other.kill()
}
