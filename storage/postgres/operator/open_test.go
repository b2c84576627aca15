package operator_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/encrypted"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

var openAct = operator.OpenAct{Act: act}

// openBundle is a service with a resumable route. Its call gets no reply.
type openBundle struct {
	*testBundle
	kind  idempotency.EffectKind
	lapse idempotency.Lapse // of the call
	sent  int
	out   string // the call's recorded output, as the handler got it
}

func setupOpen(t *testing.T) *openBundle {
	b := &openBundle{testBundle: setup(t, nil), kind: idempotency.EffectCall, lapse: idempotency.Lapse{Parked: "no reply", Reason: "no reply"}}
	b.Engine.Resumable("topup/1", func(idempotency.Key, []byte) (idempotency.RunFunc, error) { return b.run, nil })
	return b
}

func (b *openBundle) run(ctx context.Context) (*idempotency.Answer, error) {
	effect, err := testservice.Call(ctx, idempotency.Intent{Name: "charge", Kind: b.kind, Input: []byte("1"), Timeout: time.Second}, b.lapse)
	switch {
	case errors.Is(err, idempotency.ErrUnsettled):
		b.sent++
		return nil, err
	case err != nil:
		return nil, err
	case effect.State == idempotency.EffectDeclined:
		return &idempotency.Answer{Status: 402}, nil
	}
	b.out = string(effect.Output)
	_, err = postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects DEFAULT VALUES")
	return &idempotency.Answer{Status: 201}, err
}

// older makes the sends of all effects an hour older, so that none can be under way.
func (b *openBundle) older(t *testing.T) {
	t.Helper()
	b.Exec(t, "UPDATE idempotency_effects SET sent_first_at = sent_first_at - interval '1 hour', doubt_at = doubt_at - interval '1 hour'")
}

// open makes a request that stays open, parked.
func (b *openBundle) open(t *testing.T, value string) idempotency.Key {
	t.Helper()
	if result := b.again(t, value); result.Outcome != idempotency.OutcomeUnknown {
		t.Fatalf("%+v", result)
	}
	return key(value)
}

func (b *openBundle) again(t *testing.T, value string) idempotency.Result {
	req := testservice.Request(key(value))
	req.Resumable, req.Stored = "topup/1", func() []byte { return []byte("the request") }
	return b.Engine.Do(t.Context(), req, b.run)
}

// complete runs the completer once.
func (b *openBundle) complete(t *testing.T) {
	t.Helper()
	if _, err := idempotency.NewCompleter(b.Engine, nil).Once(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// The operator settles the effect, and the service's handler makes the answer.
func TestSettledEffectIsAnsweredByTheHandler(t *testing.T) {
	t.Parallel()
	for as, want := range map[operator.Settlement]int{operator.SettleDone: 201, operator.SettleDeclined: 402} {
		b := setupOpen(t)
		k := b.open(t, "canary")
		b.older(t)
		seen, err := b.operator.GetOpen(t.Context(), k)
		if err != nil || seen.Parked != "no reply" || seen.Route != "topup/1" || len(seen.Effects) != 1 || len(seen.Unsettled) != 1 || seen.Effects[0].DerivedKey == "" {
			t.Fatalf("%+v, %v", seen, err)
		}
		a := openAct
		a.Epoch, a.Attempt = seen.Epoch, seen.Attempt
		if _, err := b.operator.Settle(t.Context(), k, "charge", as, []byte(`{"id":"ch_1"}`), a); err != nil {
			t.Fatal(err)
		}
		_, err = b.operator.Settle(t.Context(), k, "charge", as, []byte(`{}`), a)
		wantError(t, err, operator.ErrChanged)
		wantRemedy(t, err, "effect get")
		if as == operator.SettleDeclined { // a result, and not a statement
			_, err = b.operator.Settle(t.Context(), k, "charge", as, []byte(`{}`), openAct)
			wantError(t, err, operator.ErrSettled)
			wantRemedy(t, err, "declined since", "never replaced", "key resume")
		}
		b.complete(t)
		if result := b.again(t, "canary"); result.Outcome != idempotency.OutcomeReplayed || result.Answer.Status != want {
			t.Errorf("%s: %+v", as, result)
		}
		if b.sent != 1 || b.Effects(t) != map[bool]int{true: 1}[want == 201] {
			t.Errorf("%s: sent %d, posted %d", as, b.sent, b.Effects(t))
		}
		_, err = b.operator.Settle(t.Context(), k, "charge", as, []byte(`{}`), openAct)
		wantError(t, err, operator.ErrNotOpen)
		wantRemedy(t, err, "key get")
		if got, want := b.audits(t), "settle-"+string(as)+" alice ticket 7 acme canary "+seen.Attempt.String()+" 0"; got != want {
			t.Errorf("audit is %q, want %q", got, want)
		}
		if got := b.Text(t, "SELECT effect || ' ' || (effects->0->>'derived_key') FROM idempotency_audit"); got != "charge "+seen.Effects[0].DerivedKey {
			t.Errorf("the audit has %q", got)
		}
	}
}

// wantRemedy fails the test unless the error has these words.
func wantRemedy(t *testing.T, err error, words ...string) {
	t.Helper()
	for _, word := range words {
		if err == nil || !strings.Contains(err.Error(), word) {
			t.Errorf("%v: it does not say %q", err, word)
		}
	}
}

// Until the next run a stated result is no result: it can be stated again and taken back, and it is
// shown as stated.
func TestStatementStandsUntilTheNextRun(t *testing.T) {
	t.Parallel()
	b := setupOpen(t)
	k := b.open(t, "canary")
	settle := func(as operator.Settlement, output []byte) {
		t.Helper()
		if _, err := b.operator.Settle(t.Context(), k, "charge", as, output, openAct); err != nil {
			t.Fatal(err)
		}
	}
	state := func() string {
		t.Helper()
		seen, err := b.operator.GetOpen(t.Context(), k)
		if err != nil || len(seen.Unsettled) != 1 || !seen.Effects[0].SettledAt.IsZero() || seen.Effects[0].State != idempotency.EffectIntended {
			t.Errorf("%+v, %v", seen, err)
		}
		return seen.Effects[0].StateText()
	}
	for _, as := range []operator.Settlement{operator.SettleRetry, operator.SettleNotSent} {
		settle(operator.SettleDone, []byte("1"))
		settle(operator.SettleDone, []byte("2"))
		b.older(t)
		if got := state(); got != "stated" {
			t.Errorf("stated: %s", got)
		}
		settle(as, nil)
		if got := state(); got != "intended" {
			t.Errorf("after %s: %s", as, got)
		}
	}
	_, err := b.operator.Settle(t.Context(), k, "charge", operator.SettleDone, []byte("ch_1"), openAct)
	wantError(t, err, operator.ErrInvalid)
	wantRemedy(t, err, `{"id":"ch_1","amount":900}`, "quotes")
	settle(operator.SettleDone, []byte("3"))
	b.complete(t)
	if b.out != "3" || b.sent != 1 || b.Effects(t) != 1 {
		t.Errorf("output %q, sent %d, posted %d", b.out, b.sent, b.Effects(t))
	}
	if got := b.Strings(t, "SELECT effects->0->>'stated' FROM idempotency_audit WHERE effects->0 ? 'stated'"); len(got) != 4 {
		t.Errorf("the audit table has %q of what stood before the act", got)
	}
}

func TestNotSentAndRetrySendAgain(t *testing.T) {
	t.Parallel()
	b := setupOpen(t)
	k := b.open(t, "canary")
	b.Exec(t, "UPDATE idempotency_effects SET sent_first_at = now() - interval '2 days', doubt_at = now(), panics = 4")
	if _, err := b.operator.Settle(t.Context(), k, "charge", operator.SettleRetry, nil, openAct); err != nil {
		t.Fatal(err)
	}
	if n := b.Count(t, "SELECT count(*) FROM idempotency_effects WHERE panics = 0 AND sent_first_at < now() - interval '1 day'"); n != 1 {
		t.Error("a retry changed the age of the key")
	}
	b.complete(t)
	b.older(t)
	if _, err := b.operator.Settle(t.Context(), k, "charge", operator.SettleNotSent, nil, openAct); err != nil {
		t.Fatal(err)
	}
	if n := b.Count(t, "SELECT count(*) FROM idempotency_effects WHERE doubt_at IS NULL AND sent_first_at > now() - interval '1 minute'"); n != 1 {
		t.Error("not-sent left a doubt")
	}
	b.complete(t)
	if b.sent != 3 {
		t.Errorf("sent %d", b.sent)
	}
}

// A recorded intent of a call at most once is never sent: not-sent removes it, and retry is
// refused.
func TestEffectThatIsSentOnceAtMostIsNotRetried(t *testing.T) {
	t.Parallel()
	b := setupOpen(t)
	b.kind = idempotency.EffectAtMostOnce
	k := b.open(t, "canary")
	_, err := b.operator.Settle(t.Context(), k, "charge", operator.SettleRetry, nil, openAct)
	wantError(t, err, operator.ErrInvalid)
	b.older(t)
	if _, err := b.operator.Settle(t.Context(), k, "charge", operator.SettleNotSent, nil, openAct); err != nil {
		t.Fatal(err)
	}
	if n := b.Count(t, "SELECT count(*) FROM idempotency_effects"); n != 0 {
		t.Error("the marker is still there")
	}
	b.complete(t)
	if n := b.Count(t, "SELECT count(*) FROM idempotency_effects WHERE tries = 1"); n != 1 || b.sent != 2 {
		t.Errorf("%d markers, sent %d", n, b.sent)
	}
}

// An attempt that runs keeps its request, whoever acts.
func TestActOnAnOpenRequestThatRuns(t *testing.T) {
	t.Parallel()
	b := setupOpen(t)
	k := b.open(t, "canary")
	b.Exec(t, "UPDATE idempotency_open SET owned = true, parked = NULL, next_at = now() + interval '1 minute'")
	for name, do := range map[string]func() error{
		"settle": func() error {
			_, err := b.operator.Settle(t.Context(), k, "charge", operator.SettleDone, []byte("1"), openAct)
			return err
		},
		"resume": func() error { _, err := b.operator.Resume(t.Context(), k, openAct); return err },
		"park":   func() error { _, err := b.operator.Park(t.Context(), k, openAct); return err },
		"abandon": func() error {
			_, err := b.operator.Abandon(t.Context(), k, operator.Abandonment{OpenAct: openAct, Sent: []string{"charge"}})
			return err
		},
	} {
		t.Log(name)
		err := do()
		wantError(t, err, operator.ErrInProgress)
		wantRemedy(t, err, b.Text(t, `SELECT to_char(next_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS"Z"') FROM idempotency_open`))
	}
	if got := b.audits(t); got != "" {
		t.Errorf("audit is %q", got)
	}
}

func TestParkAndResume(t *testing.T) {
	t.Parallel()
	b := setupOpen(t)
	k := b.open(t, "canary")
	if _, err := b.operator.Resume(t.Context(), k, openAct); err != nil {
		t.Fatal(err)
	}
	if _, err := b.operator.Park(t.Context(), k, openAct); err != nil {
		t.Fatal(err)
	}
	b.complete(t)
	if seen, err := b.operator.GetOpen(t.Context(), k); err != nil || seen.Parked == "" || b.sent != 1 {
		t.Fatalf("a parked request ran: %+v, %v", seen, err)
	}
	if _, err := b.operator.Resume(t.Context(), k, openAct); err != nil {
		t.Fatal(err)
	}
	b.complete(t)
	if b.sent != 2 {
		t.Errorf("sent %d", b.sent)
	}
}

// A request that was parked for its age has the whole of ParkAfter again after a person resumed it,
// or settled one of its effects.
func TestResumedRequestIsNotParkedForItsOldAge(t *testing.T) {
	t.Parallel()
	for name, act := range map[string]func(b *openBundle, k idempotency.Key) error{
		"resume": func(b *openBundle, k idempotency.Key) error {
			_, err := b.operator.Resume(context.Background(), k, openAct)
			return err
		},
		"settle": func(b *openBundle, k idempotency.Key) error {
			_, err := b.operator.Settle(context.Background(), k, "charge", operator.SettleRetry, nil, openAct)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setupOpen(t)
			b.lapse = idempotency.Lapse{Pause: time.Millisecond, Reason: "no reply"}
			k := b.open(t, "canary")
			ages := func(column string) {
				b.Exec(t, "UPDATE idempotency_open SET "+column+" = now() - interval '25 hours', next_at = now()")
				b.complete(t)
			}
			parked := func(want bool) {
				t.Helper()
				seen, err := b.operator.GetOpen(t.Context(), k)
				if err != nil || strings.Contains(seen.Parked, "still open after 24h") != want || seen.Parked != "" != want {
					t.Errorf("%+v, %v", seen, err)
				}
			}
			ages("started_at")
			parked(true)
			if err := act(b, k); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				b.Exec(t, "UPDATE idempotency_open SET next_at = now()")
				b.complete(t)
				parked(false)
			}
			if b.sent < 3 {
				t.Errorf("sent %d", b.sent)
			}
			ages("resumed_at")
			parked(true)
		})
	}
}

// Expire, delete and the reaper never take an open request. Abandon takes it only with the names of
// the effects that may have been sent.
func TestOpenRequestIsOnlyAbandonedKnowingly(t *testing.T) {
	t.Parallel()
	b := setupOpen(t)
	k := b.open(t, "canary")
	_, err := b.operator.Expire(t.Context(), k, act)
	wantError(t, err, operator.ErrOpen)
	_, err = b.operator.Delete(t.Context(), k, act)
	wantError(t, err, operator.ErrOpen)
	if !strings.Contains(err.Error(), "abandon") {
		t.Errorf("it names no remedy: %v", err)
	}
	b.Exec(t, "ALTER TABLE idempotency_keys DISABLE TRIGGER idempotency_keys_expire_guard")
	b.Exec(t, "UPDATE idempotency_keys SET expires_at = now() - interval '1 hour'")
	if n, err := b.Store.DeleteExpired(t.Context()); err != nil || n != 0 {
		t.Errorf("the reaper: %d, %v", n, err)
	}
	stats, err := b.operator.Stats(t.Context())
	if err != nil || stats.Live.Rows != 0 || stats.Expired.Rows != 0 || stats.Open != 1 || stats.Parked != 1 || stats.OldestOpen <= 0 {
		t.Errorf("stats: %+v, %v", stats, err)
	}
	if figures, err := b.Store.Statistics(t.Context()); err != nil || figures.Records != 0 || figures.Expired != 0 {
		t.Errorf("statistics: %+v, %v", figures, err)
	}
	_, err = b.operator.Abandon(t.Context(), k, operator.Abandonment{OpenAct: openAct})
	wantError(t, err, operator.ErrUnconfirmed)
	if !strings.Contains(err.Error(), "charge") {
		t.Errorf("it does not show what was sent: %v", err)
	}
	if _, err := b.operator.Abandon(t.Context(), k, operator.Abandonment{OpenAct: openAct, Sent: []string{"charge"}}); err != nil {
		t.Fatal(err)
	}
	if n := b.Count(t, "SELECT (SELECT count(*) FROM idempotency_keys) + (SELECT count(*) FROM idempotency_open) + (SELECT count(*) FROM idempotency_effects)"); n != 0 {
		t.Errorf("%d rows are left", n)
	}
	if got := b.audits(t); !strings.HasPrefix(got, "abandon alice") {
		t.Errorf("audit is %q", got)
	}
	_, err = b.operator.Abandon(t.Context(), k, operator.Abandonment{OpenAct: openAct, Sent: []string{"charge"}})
	wantError(t, err, operator.ErrNotOpen)
	b.open(t, "canary") // the key is new
}

func TestListOpen(t *testing.T) {
	t.Parallel()
	b := setupOpen(t)
	for _, value := range []string{"c", "a", "b"} {
		b.open(t, value)
	}
	if _, err := b.operator.Resume(t.Context(), key("a"), openAct); err != nil {
		t.Fatal(err)
	}
	var got []string
	page := operator.Page{Rows: 2}
	for {
		list, err := b.operator.ListOpen(t.Context(), operator.OpenFilter{Effect: "charge", Route: "topup/1", Scope: "acme"}, page)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range list.Requests {
			got = append(got, r.Key.Value)
		}
		if page.After = list.Next; page.After == "" {
			break
		}
	}
	if strings.Join(got, " ") != "c a b" { // the oldest first
		t.Errorf("the list is %v", got)
	}
	for filter, want := range map[operator.OpenFilter]int{{Parked: true}: 2, {Route: "other"}: 0, {Effect: "other"}: 0, {}: 3} {
		if list, err := b.operator.ListOpen(t.Context(), filter, operator.Page{}); err != nil || len(list.Requests) != want {
			t.Errorf("%+v: %d, %v", filter, len(list.Requests), err)
		}
	}
	_, err := b.operator.ListOpen(t.Context(), operator.OpenFilter{}, operator.Page{After: "x"})
	wantError(t, err, operator.ErrInvalid)
}

// The statements of the last release without open requests, as its programs send them: they read
// the table, and none of them can lose an intent, or leave effects that would answer for a new
// request.
func TestOlderToolsCanNotLoseAnOpenRequest(t *testing.T) {
	t.Parallel()
	const (
		get = "SELECT scope, key, status, fingerprint_version, fingerprint, attempt_id, octet_length(body)::bigint, trace_id, created_at, expires_at, expires_at < statement_timestamp(), headers" +
			` FROM "public"."idempotency_keys" WHERE scope = $1 AND key = $2`
		list = `SELECT scope, key, status, fingerprint_version, fingerprint, attempt_id, octet_length(body)::bigint, trace_id, created_at, expires_at, expires_at < statement_timestamp(),
			count(*) OVER (), statement_timestamp() FROM ONLY "public"."idempotency_keys" WHERE ctid >= $1::tid ORDER BY created_at DESC, scope, key LIMIT $2::int`
		stats = `SELECT count(*) FILTER (WHERE expires_at >= statement_timestamp()), count(*) FILTER (WHERE expires_at < statement_timestamp()),
			min(created_at), min(expires_at) FILTER (WHERE expires_at < statement_timestamp()) FROM ONLY "public"."idempotency_keys"`
		metrics = `SELECT count(*) AS records, count(*) FILTER (WHERE expires_at < statement_timestamp()) AS expired, min(expires_at) AS oldest
			FROM ONLY "public"."idempotency_keys" WHERE ctid >= format('(%s,0)', 0)::tid AND ctid < format('(%s,0)', 1)::tid`
		expire = `UPDATE ONLY "public"."idempotency_keys" SET expires_at = least(expires_at, transaction_timestamp()) WHERE scope = $1 AND key = $2 AND attempt_id = $3::uuid`
		remove = `DELETE FROM ONLY "public"."idempotency_keys" WHERE scope = $1 AND key = $2 AND attempt_id = $3::uuid`
		reap   = `DELETE FROM ONLY "public"."idempotency_keys" WHERE ctid >= $1::tid AND ctid < $2::tid AND expires_at < statement_timestamp()
			AND (SELECT pg_try_advisory_xact_lock($3) AND set_config('lock_timeout', '20', true) IS NOT NULL)`
	)
	b := setupOpen(t)
	try := func(sql string, arguments ...any) (rows int64, err error) {
		tag, err := b.Pool.Exec(t.Context(), sql, append([]any{pgx.QueryExecModeExec}, arguments...)...)
		return tag.RowsAffected(), err
	}
	must := func(want int64, sql string, arguments ...any) {
		t.Helper()
		if rows, err := try(sql, arguments...); err != nil || rows != want {
			t.Errorf("%s: %d rows, %v; want %d", sql, rows, err, want)
		}
	}
	refused := func(sql string, arguments ...any) {
		t.Helper()
		var pgErr *pgconn.PgError
		if _, err := try(sql, arguments...); !errors.As(err, &pgErr) || pgErr.Code != "23001" || !strings.Contains(pgErr.Message, "idemctl effect list") || strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: %v; want a refusal with its remedy", sql, err)
		}
	}
	row := func(k idempotency.Key) []any {
		return []any{k.Scope, k.Value, b.Text(t, "SELECT attempt_id::text FROM idempotency_keys WHERE scope = $1 AND key = $2", k.Scope, k.Value)}
	}
	steps := func(k idempotency.Key) int {
		return b.Count(t, "SELECT count(*) FROM idempotency_effects WHERE scope = $1 AND key = $2", k.Scope, k.Value)
	}
	settle := func(k idempotency.Key) {
		t.Helper()
		if _, err := b.operator.Settle(t.Context(), k, "charge", operator.SettleDone, []byte("1"), openAct); err != nil {
			t.Fatal(err)
		}
		b.complete(t)
	}
	plain := key("plain")
	if result := b.Engine.Do(t.Context(), testservice.Request(plain), func(context.Context) (*idempotency.Answer, error) { return &idempotency.Answer{Status: 201}, nil }); result.Outcome != idempotency.OutcomeExecuted {
		t.Fatalf("%+v", result)
	}
	ended, open := b.open(t, "ended"), b.open(t, "canary")
	settle(ended)

	must(1, get, open.Scope, open.Value)
	must(3, list, "(0,0)", 10)
	must(1, stats)
	must(1, metrics)
	refused(expire, row(open)...)
	refused(remove, row(open)...)
	refused("DELETE FROM idempotency_keys")
	refused("TRUNCATE idempotency_keys")
	must(1, expire, row(plain)...)
	must(1, expire, row(ended)...)
	must(2, reap, "(0,0)", "(1000,0)", int64(1)) // the open request does not stop it
	if steps(ended) != 0 || steps(open) != 1 {
		t.Errorf("%d effects of a record that is gone, %d of an open request", steps(ended), steps(open))
	}

	// The key is new, and the old effect does not answer: the new request makes its own.
	sent := b.sent
	b.open(t, "ended")
	if b.sent != sent+1 {
		t.Error("the effects of a deleted request answered for a new one")
	}
	settle(ended)
	must(1, remove, row(ended)...)
	if steps(ended) != 0 {
		t.Error("its delete left the effects")
	}

	settle(open)
	if result := b.again(t, "canary"); result.Outcome != idempotency.OutcomeReplayed {
		t.Errorf("%+v", result)
	}
	must(0, "TRUNCATE idempotency_keys")
	if steps(open) != 0 {
		t.Error("TRUNCATE left the effects")
	}
}

func TestDownMigrationRefusesOpenRequests(t *testing.T) {
	t.Parallel()
	b := setupOpen(t)
	k := b.open(t, "canary")
	if err := migrations.DownTo(t.Context(), b.Store, 3, nil); err == nil {
		t.Fatal("the tables of an open request were dropped")
	}
	if version, err := migrations.Version(t.Context(), b.Store, nil); err != nil || version != 4 {
		t.Fatalf("version %d, %v", version, err)
	}
	if _, err := b.operator.Abandon(t.Context(), k, operator.Abandonment{OpenAct: openAct, Sent: []string{"charge"}}); err != nil {
		t.Fatal(err)
	}
	if err := migrations.DownTo(t.Context(), b.Store, 3, nil); err != nil {
		t.Fatal(err)
	}
	if got := b.audits(t); !strings.HasPrefix(got, "abandon") {
		t.Errorf("audit is %q", got)
	}
	if err := migrations.Up(t.Context(), b.Store, nil); err != nil {
		t.Fatal(err)
	}
}

func TestTimelineOfAnOpenRequest(t *testing.T) {
	t.Parallel()
	b := setupOpen(t)
	k := b.open(t, "canary")
	kinds := func() string {
		events, err := b.operator.Timeline(t.Context(), k)
		if err != nil {
			t.Fatal(err)
		}
		var kinds []string
		for _, e := range events {
			kinds = append(kinds, strings.TrimSpace(string(e.Kind)+" "+e.Effect))
		}
		return strings.Join(kinds, ", ")
	}
	if got, want := kinds(), "intent charge, parked"; got != want {
		t.Errorf("parked: %s, want %s", got, want)
	}
	b.Exec(t, `INSERT INTO idempotency_effects (sent_first_at, settled_at, epoch, tries, panics, state, kind, derived_key, scope, key, name, input)
		SELECT sent_first_at - interval '1 second', sent_first_at - interval '1 second', epoch, 1, 0, 2, 4, gen_random_uuid(), scope, key, 'hold', '' FROM idempotency_effects`)
	if got, want := kinds(), "result hold, intent charge, parked"; got != want {
		t.Errorf("with a phase: %s, want %s", got, want)
	}
	b.Exec(t, "DELETE FROM idempotency_effects WHERE kind = 4")
	if _, err := b.operator.Settle(t.Context(), k, "charge", operator.SettleRetry, nil, openAct); err != nil {
		t.Fatal(err)
	}
	if got, want := kinds(), "intent charge, next, act-settle-retry charge"; got != want {
		t.Errorf("retried: %s, want %s", got, want)
	}
	b.complete(t)
	if _, err := b.operator.Settle(t.Context(), k, "charge", operator.SettleDone, []byte("1"), openAct); err != nil {
		t.Fatal(err)
	}
	b.complete(t)
	// The record has the time of the first intent: its row is the same.
	if got := kinds(); !strings.Contains(got, "sent-again charge, act-settle-done charge, result charge, recorded") || !strings.HasSuffix(got, "expires") || strings.Contains(got, "next") {
		t.Errorf("ended: %s", got)
	}
}

func TestDoctorNamesOpenRequests(t *testing.T) {
	t.Parallel()
	b := setupOpen(t)
	if _, text := levels(b.operator.Doctor(t.Context())); !strings.Contains(text, "ok open: open requests: none") {
		t.Errorf("without any:\n%s", text)
	}
	b.open(t, "canary")
	if _, text := levels(b.operator.Doctor(t.Context())); !strings.Contains(text, "warn open: 1 requests of route topup/1 wait for a person -> idemctl effect list --parked") {
		t.Errorf("parked:\n%s", text)
	}
	b.Exec(t, "UPDATE idempotency_open SET parked = NULL, next_at = now() - interval '11 minutes'")
	if _, text := levels(b.operator.Doctor(t.Context())); !strings.Contains(text, "warn open: requests of route topup/1 have been due for 11m") {
		t.Errorf("nobody serves it:\n%s", text)
	}
	b.Exec(t, "UPDATE idempotency_open SET next_at = now()")
	if _, text := levels(b.operator.Doctor(t.Context())); !strings.Contains(text, "ok open: open requests: 1 of route topup/1") {
		t.Errorf("due just now:\n%s", text)
	}
	looker := b.role(t, "SELECT ON idempotency_keys", "SELECT ON idempotency_migrations")
	if _, text := levels(looker.Doctor(t.Context())); !strings.Contains(text, "GRANT SELECT ON public.idempotency_open, public.idempotency_effects") {
		t.Errorf("without the right:\n%s", text)
	}
}

// The rights of the package's documentation suffice for acts on open requests.
func TestLeastPrivilegeForOpenRequests(t *testing.T) {
	t.Parallel()
	b := setupOpen(t)
	k := b.open(t, "canary")
	looker := b.role(t, "SELECT ON idempotency_keys", "SELECT ON idempotency_open, idempotency_effects", "SELECT ON idempotency_audit", "SELECT ON idempotency_events")
	if _, err := looker.GetOpen(t.Context(), k); err != nil {
		t.Error(err)
	}
	if _, err := looker.Resume(t.Context(), k, openAct); err == nil || !strings.Contains(err.Error(), "42501") {
		t.Errorf("who looks may resume: %v", err)
	}
	o := b.role(t, "SELECT, DELETE ON idempotency_keys", "SELECT, UPDATE, DELETE ON idempotency_open, idempotency_effects", "SELECT, INSERT ON idempotency_audit")
	for name, do := range map[string]func() error{
		"resume": func() error { _, err := o.Resume(t.Context(), k, openAct); return err },
		"park":   func() error { _, err := o.Park(t.Context(), k, openAct); return err },
		"retry": func() error {
			_, err := o.Settle(t.Context(), k, "charge", operator.SettleRetry, nil, openAct)
			return err
		},
	} {
		if err := do(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := o.Settle(t.Context(), k, "charge", operator.SettleDone, []byte("1"), openAct); err != nil {
		t.Error(err)
	}
	if _, err := o.Abandon(t.Context(), k, operator.Abandonment{OpenAct: openAct, Sent: []string{"charge"}}); err != nil {
		t.Error(err)
	}
}

// Only a program with the keys can settle the effects of a service that encrypts.
func TestSettleOfAnEncryptedEffect(t *testing.T) {
	t.Parallel()
	b := setupOpen(t)
	store := encrypted.New(b.Store, encrypted.Keys{Current: encrypted.Key{ID: 1, Secret: [32]byte{7}}})
	b.Engine = idempotency.NewEngine(store, nil)
	b.Engine.Resumable("topup/1", func(idempotency.Key, []byte) (idempotency.RunFunc, error) { return b.run, nil })
	k := b.open(t, "canary")
	_, err := b.operator.Settle(t.Context(), k, "charge", operator.SettleDone, []byte(`"ch_1"`), openAct)
	wantError(t, err, operator.ErrEncrypted)
	b.older(t)
	_, err = b.operator.Settle(t.Context(), k, "charge", operator.SettleDeclined, nil, openAct)
	wantError(t, err, operator.ErrEncrypted)
	seen, err := b.operator.GetOpen(t.Context(), k)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.operator.Settle(t.Context(), k, "charge", operator.SettleDone, store.SealOutput([]byte(`"ch_1"`), k, seen.Attempt, "charge"), openAct); err != nil {
		t.Fatal(err)
	}
	b.complete(t)
	if b.out != `"ch_1"` {
		t.Errorf("the handler got %q", b.out)
	}
}

// The send of an owner may outlive its lease: it begins in the first half, and takes its Timeout.
// Until it has ended, an operator can't know that the other service never gets the request, or has
// refused it for good: the next run would send again what is still being sent, or answer a refusal.
func TestNoIsNotStatedWhileASendMayBeUnderWay(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		kind idempotency.EffectKind
		as   operator.Settlement
		sent string // the column with the time of the last send
	}{
		"not sent, once at most": {idempotency.EffectAtMostOnce, operator.SettleNotSent, "sent_first_at"},
		"not sent":               {idempotency.EffectCall, operator.SettleNotSent, "sent_first_at"},
		"declined":               {idempotency.EffectCall, operator.SettleDeclined, "sent_first_at"},
		"declined, sent again":   {idempotency.EffectCall, operator.SettleDeclined, "doubt_at"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setupOpen(t)
			b.kind = c.kind
			k := b.open(t, "canary")
			lease := b.Count(t, "SELECT lease_ms FROM idempotency_open")
			ago := func(ms int) {
				b.Exec(t, "UPDATE idempotency_effects SET sent_first_at = now() - interval '1 day'")
				b.Exec(t, "UPDATE idempotency_effects SET "+c.sent+" = now() - $1::int * interval '1 millisecond'", ms)
			}
			ago(lease) // the lease is over
			_, err := b.operator.Settle(t.Context(), k, "charge", c.as, nil, openAct)
			wantError(t, err, operator.ErrInProgress)
			if err != nil && !strings.Contains(err.Error(), "may still be sent until 20") {
				t.Errorf("the error is %v", err)
			}
			if seen, err := b.operator.GetOpen(t.Context(), k); err != nil || seen.Parked == "" || len(seen.Unsettled) != 1 {
				t.Errorf("it was changed: %+v, %v", seen, err)
			}
			ago(lease + lease/2)
			if _, err := b.operator.Settle(t.Context(), k, "charge", c.as, nil, openAct); err != nil {
				t.Error(err)
			}
		})
	}
}
