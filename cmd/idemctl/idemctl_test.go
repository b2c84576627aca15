package main

import (
	"bufio"
	"context"
	"encoding/json"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode"

	"github.com/alecthomas/kong"
	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

func TestMigrate(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.do(t, "k")
	if r := b.want(t, exitRefused, "migrate", "down", "--to", "2"); !strings.Contains(r.stderr, "--yes") {
		t.Errorf("without --yes it says %q", r.stderr)
	}
	b.want(t, exitUsage, "migrate", "down", "--yes")
	for _, step := range []struct {
		args []string
		want versionJSON
		says string
	}{
		{[]string{"status"}, versionJSON{5, 5, 2, false}, ""},
		{[]string{"down", "--to", "2", "--yes"}, versionJSON{2, 5, 2, false}, "services work"},
		{[]string{"up"}, versionJSON{5, 5, 2, false}, ""},
		{[]string{"down", "--to", "0", "--yes"}, versionJSON{0, 5, 2, false}, "services can't work"},
		{[]string{"status"}, versionJSON{0, 5, 2, false}, ""},
		{[]string{"up"}, versionJSON{5, 5, 2, false}, ""},
	} {
		if step.want.Version == 0 && step.args[0] == "down" {
			if n := b.Count(t, "SELECT count(*) FROM idempotency_keys"); n != 1 {
				t.Errorf("%d records before they are given up", n)
			}
		}
		if got := object[versionJSON](t, b.want(t, 0, append([]string{"--json", "migrate"}, step.args...)...)); got != step.want {
			t.Errorf("%v: %+v, want %+v", step.args, got, step.want)
		}
		if step.args[0] == "down" {
			wantText(t, b.want(t, 0, "migrate", "status").stdout, step.says)
		}
	}
	wantText(t, b.want(t, 0, "--schema", "payments", "migrate", "up").stdout, "version 5 of 5")
	if n := b.Count(t, "SELECT count(*) FROM pg_tables WHERE schemaname = 'payments'"); n != 9 {
		t.Errorf("%d tables in the other schema, want 9", n)
	}
	b.want(t, exitUsage, "--schema", "Payments!", "migrate", "up")
	b.Exec(t, "UPDATE idempotency_migrations SET dirty = true")
	wantText(t, b.want(t, 0, "migrate", "status").stdout, "failed in the middle")
	b.want(t, exitFailed, "migrate", "up")
}

type getJSON struct {
	Scope, Key, State string
	Record            *recordJSON
	Holder            *holderJSON
	Timeline          []eventJSON
}

func TestKeyGet(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.want(t, exitNotFound, "key", "get", "acme", "canary-key")
	wantText(t, r.stdout, "absent")
	if strings.Contains(r.stderr, "canary") {
		t.Errorf("an error shows the key: %s", r.stderr)
	}
	finish := b.running(t, "canary-key")
	defer finish()
	got := object[getJSON](t, b.want(t, 0, "--json", "key", "get", "acme", "canary-key"))
	if got.State != "in-progress" || got.Record != nil || got.Holder == nil || got.Holder.PID == 0 || got.Holder.State != "idle in transaction" || len(got.Timeline) != 1 || got.Timeline[0].Kind != "running" {
		t.Errorf("while it runs: %+v, holder %+v", got, got.Holder)
	}
	wantText(t, b.want(t, 0, "key", "get", "acme", "canary-key").stdout, "in-progress", "held by", "idle in transaction")
	finish()

	b.do(t, "k")
	got = object[getJSON](t, b.want(t, 0, "--json", "key", "get", "acme", "k", "--body"))
	if got.State != "recorded" || got.Scope != "acme" || got.Key != "k" || got.Holder != nil || len(got.Timeline) != 2 {
		t.Fatalf("%+v", got)
	}
	if rec := got.Record; rec.Status != 201 || rec.TraceID != "trace-k" || string(rec.Body) != "paid\n\x1b[31m" || rec.BodyBytes != 10 || rec.Headers["Content-Type"][0] != "text/plain" ||
		rec.FingerprintVersion != 1 || len(rec.Fingerprint) != 64 || rec.Expired || len(rec.Attempt) != 36 || time.Since(rec.CreatedAt).Abs() > time.Minute {
		t.Errorf("%+v", rec)
	}
	plain := b.want(t, 0, "key", "get", "acme", "k").stdout
	wantText(t, plain, "recorded", "201", "trace-k", "Content-Type: text/plain", "body         10 bytes")
	if strings.Contains(plain, "paid") {
		t.Error("the body is shown unasked")
	}
	body := b.want(t, 0, "key", "get", "acme", "k", "--body").stdout
	wantText(t, body, "paid", `\x1b[31m`)
	if strings.Contains(body, "\x1b") {
		t.Error("what the service answered reaches the terminal as it is")
	}
}

// A key need not be an argument, which other users of the machine can see.
func TestKeyFromStandardInput(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.do(t, "canary-key")
	for name, test := range map[string]struct {
		args  []string
		stdin string
		code  int
	}{
		"key":           {[]string{"acme", "-"}, "canary-key\n", 0},
		"both":          {[]string{"-", "-"}, "acme\ncanary-key\n", 0},
		"without a \\n": {[]string{"acme", "-"}, "canary-key", 0},
		"with a \\r":    {[]string{"acme", "-"}, "canary-key\r\n", 0},
		"nothing":       {[]string{"acme", "-"}, "", exitUsage},
		"one for two":   {[]string{"-", "-"}, "acme\n", exitUsage},
		"endless":       {[]string{"acme", "-"}, strings.Repeat("canary", 100_000), exitUsage},
		"not a key":     {[]string{"acme", "-"}, "canary key\n", exitUsage},
	} {
		cmd := command(t.Context(), b.URL, append([]string{"key", "get"}, test.args...)...)
		cmd.Stdin = strings.NewReader(test.stdin)
		if r := execute(t, cmd); r.code != test.code || strings.Contains(r.stderr, "canary") {
			t.Errorf("%s: exit code %d, want %d: %s", name, r.code, test.code, r.stderr)
		}
	}
}

func TestKeyList(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, value := range []string{"a1", "a2", "a3", "b1"} {
		b.do(t, value)
	}
	b.Exec(t, "UPDATE idempotency_keys SET expires_at = now() - interval '1 minute', status = 422 WHERE key = 'a2'")
	attempt := object[getJSON](t, b.want(t, 0, "--json", "key", "get", "acme", "a3")).Record.Attempt
	for want, args := range map[string][]string{
		"a1 a2 a3 b1": nil,
		"b1 a3 a2 a1": {"--desc"},
		"a1 a2 a3":    {"--scope", "acme", "--key-prefix", "a"},
		"":            {"--scope", "other"},
		"a2":          {"--status", "4"},
		"a1 a3 b1":    {"--live"},
		" a2":         {"--expired"},
		" a1":         {"--trace-id", "trace-a1"},
		" a3":         {"--attempt", attempt},
		"  ":          {"--until", "1h"},
		" a1 a2 a3 b1": {
			"--since", "1h"},
		"  a1 a2 a3 b1": {"--since", "2006-01-02T15:04:05Z", "--all"},
		"a1 a2":         {"--rows", "2"},
	} {
		r := b.want(t, 0, append([]string{"--json", "key", "list"}, args...)...)
		var keys []string
		all := objects[struct {
			Key  string
			Page *struct {
				Records      int
				RowsExamined int `json:"rows_examined"`
				Next         string
			}
		}](t, r)
		for _, one := range all[:len(all)-1] {
			keys = append(keys, one.Key)
		}
		if got := strings.Join(keys, " "); got != strings.TrimSpace(want) {
			t.Errorf("%v: %q, want %q", args, got, want)
		}
		if page := all[len(all)-1].Page; page == nil || page.Records != len(keys) || (page.Next != "") != (len(args) == 2 && args[0] == "--rows") {
			t.Errorf("%v: page %+v", args, page)
		} else if page.Next != "" {
			wantText(t, b.want(t, 0, "key", "list", "--after", page.Next).stdout, "a3", "b1", "2 records, 2 rows examined; that is all")
		}
	}
	recent := b.want(t, 0, "key", "list", "--recent", "--rows", "1").stdout
	wantText(t, recent, "b1", "1 record, ")
	for _, args := range [][]string{
		{"--live", "--expired"}, {"--status", "7"}, {"--rows", "1001"}, {"--since", "canary"}, {"--attempt", "canary"}, {"--after", "canary"},
		{"--recent", "--scope", "acme"}, {"canary"}, {"--canary"}, {"--rows", "canary"},
	} {
		if r := b.want(t, exitUsage, append([]string{"key", "list"}, args...)...); strings.Contains(strings.ReplaceAll(r.stderr, "--canary", ""), "canary") {
			t.Errorf("%v: an error shows an argument: %s", args, r.stderr)
		}
	}
}

func TestDeleteAndExpire(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.do(t, "k")
	b.want(t, exitUsage, "key", "delete", "acme", "k", "--yes")
	r := b.want(t, exitRefused, "key", "delete", "acme", "k", "--reason", "ticket 7")
	wantText(t, r.stderr, "--yes", "pay twice")
	b.want(t, exitUsage, "key", "delete", "acme", "k", "--reason", " ", "--yes")
	if b.do(t, "k") != idempotency.OutcomeReplayed {
		t.Fatal("it was deleted without a yes")
	}
	attempt := object[getJSON](t, b.want(t, 0, "--json", "key", "get", "acme", "k")).Record.Attempt
	b.want(t, exitRefused, "key", "delete", "acme", "k", "--reason", "r", "--yes", "--attempt", "00000000-0000-4000-8000-000000000001")
	done := object[struct {
		Done, Actor, Reason string
		Record              recordJSON
	}](t, b.want(t, 0, "--json", "key", "delete", "acme", "k", "--reason", "ticket 7", "--actor", "alice", "--yes", "--attempt", attempt))
	if done.Done != "deleted" || done.Actor != "alice" || done.Reason != "ticket 7" || done.Record.Attempt != attempt {
		t.Errorf("%+v", done)
	}
	if r := b.want(t, exitNotFound, "key", "delete", "acme", "k", "--reason", "again", "--yes"); strings.Contains(r.stderr, "acme") {
		t.Errorf("an error shows the scope: %s", r.stderr)
	}
	r = b.want(t, exitNotFound, "key", "get", "acme", "k")
	wantText(t, r.stdout, "absent", "act-delete", "by alice", "ticket 7", attempt)
	if b.do(t, "k") != idempotency.OutcomeExecuted {
		t.Error("a retry did not run again")
	}

	b.want(t, 0, "key", "expire", "acme", "k", "--reason", "ticket 8", "--yes")
	wantText(t, b.want(t, 0, "key", "get", "acme", "k").stdout, "expired", "act-expire", "ticket 8")
	if n := b.Count(t, "SELECT count(*) FROM idempotency_audit WHERE action = 'expire' AND actor <> '' AND actor <> 'alice'"); n != 1 {
		t.Error("who it was is not in the audit table")
	}
	wantText(t, b.want(t, 0, "gc").stdout, "deleted 1 record, ")
	b.want(t, exitNotFound, "key", "get", "acme", "k")

	finish := b.running(t, "k")
	defer finish()
	for _, action := range []string{"delete", "expire"} {
		b.want(t, exitRefused, "key", action, "acme", "k", "--reason", "r", "--yes")
	}
}

func TestWatch(t *testing.T) {
	t.Parallel()
	b := setup(t)
	finish := b.running(t, "k")
	defer finish()
	ctx, cancel := context.WithTimeout(t.Context(), waitMax)
	defer cancel()
	cmd := command(ctx, b.URL, "--json", "key", "watch", "acme", "k", "--interval", "100ms", "--until", "expired")
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var seen []string
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		var line struct{ Kind, State string }
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			t.Fatalf("%v in %s", err, lines.Text())
		}
		seen = append(seen, strings.TrimSpace(line.Kind+" "+line.State))
		switch seen[len(seen)-1] {
		case "running":
			finish()
		case "expires":
			b.Exec(t, "UPDATE idempotency_keys SET expires_at = now() - interval '1 second'")
		}
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	// For a moment the attempt is seen as committed while it still ends.
	if got := strings.Join(seen, ", "); got != "state in-progress, running, state recorded, recorded, expires, state expired, expired" {
		t.Errorf("seen: %s", got)
	}
	b.want(t, exitRefused, "key", "watch", "acme", "k", "--for", "150ms", "--interval", "100ms", "--until", "absent")
	b.want(t, 0, "key", "watch", "acme", "k", "--for", "150ms", "--interval", "100ms")
	b.want(t, exitUsage, "key", "watch", "acme", "k", "--interval", "99ms")
	b.want(t, exitUsage, "key", "watch", "acme", "k", "--until", "soon")
}

func TestStatsAndTop(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.do(t, "a")
	b.do(t, "b")
	b.Exec(t, "UPDATE idempotency_keys SET expires_at = now() - interval '1 hour' WHERE key = 'b'")
	finish := b.running(t, "c")
	defer finish()
	s := object[statsJSON](t, b.want(t, 0, "--json", "stats"))
	if s.Live != (countJSON{1, false}) || s.Expired != (countJSON{1, false}) || s.InFlight != 1 || len(s.Holders) != 1 || s.Holders[0].State != "idle in transaction" ||
		s.OldestExpiredMS < time.Hour.Milliseconds() || s.TableBytes == 0 || s.IndexBytes == 0 || s.AuditBytes == 0 || s.EventsBytes == 0 || s.OldestCreated == nil {
		t.Errorf("%+v", s)
	}
	wantText(t, b.want(t, 0, "stats").stdout, "live            1\n", "in flight       1\n", "idle in transaction")
	lines := objects[statsJSON](t, b.want(t, 0, "--json", "top", "--count", "2", "--interval", "500ms"))
	if len(lines) != 2 || lines[0].InsertedPerSecond != nil || lines[1].InsertedPerSecond == nil || lines[1].InFlight != 1 {
		t.Errorf("%+v", lines)
	}
	r := b.want(t, 0, "top", "--count", "1")
	if strings.Contains(r.stdout, "\x1b") || strings.Count(r.stdout, "\n") != 1 || !strings.Contains(r.stdout, "in flight 1") {
		t.Errorf("where there is no terminal top prints %q", r.stdout)
	}
	b.want(t, exitUsage, "top", "--interval", "499ms")
}

func TestDoctor(t *testing.T) {
	t.Parallel()
	b := setup(t)
	type report struct {
		Verdict  string
		Findings []findingJSON
	}
	// The tests' server runs without fsync.
	got := object[report](t, b.want(t, exitDoctor, "--json", "doctor"))
	if got.Verdict != "fail" {
		t.Errorf("verdict %q", got.Verdict)
	}
	named := map[string]bool{}
	for _, f := range got.Findings {
		named[f.Check] = true
		if f.Level != "ok" && f.Check != "durability" || f.Level != "ok" && f.Remedy == "" {
			t.Errorf("%+v", f)
		}
	}
	for _, check := range operator.Checks() {
		if !named[check] {
			t.Errorf("%s is not reported", check)
		}
	}
	wantText(t, b.want(t, exitDoctor, "doctor").stdout, "fail  durability", "-> ", "verdict", "none in between")
	b.Exec(t, "DROP TABLE idempotency_keys")
	wantText(t, b.want(t, exitDoctor, "doctor").stdout, "fail  schema", "run the migrations")
}

// No output contains a password, whatever goes wrong.
func TestPasswordIsNeverPrinted(t *testing.T) {
	t.Parallel()
	b := setup(t)
	config := b.Pool.Config().ConnConfig
	const secret = "canary%zz" // an invalid escape: the URL can't be parsed
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody := closed.Addr().String()
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		database string
		code     int
	}{
		"an address that can't be read": {"postgres://u:" + secret + "@127.0.0.1/x", exitFailed},
		"words that can't be read":      {"host=x password='canary", exitFailed},
		"a bad setting":                 {"postgres://u:canary@127.0.0.1/x?sslmode=canary", exitFailed},
		"nobody there":                  {"postgres://u:canary@" + nobody + "/x", exitFailed},
		"wrong password":                {strings.Replace(b.role(t), "canary-password", "canary-wrong", 1), exitFailed},
		"no such database":              {strings.Replace(b.role(t), config.Database, "nowhere", 1), exitFailed},
	} {
		for _, args := range [][]string{{"stats"}, {"--json", "doctor"}, {"migrate", "up"}} {
			code := test.code
			if args[len(args)-1] == "doctor" && !strings.Contains(name, "can't be read") && name != "a bad setting" {
				code = exitDoctor
			}
			ctx, cancel := context.WithTimeout(t.Context(), waitMax)
			r := execute(t, command(ctx, test.database, args...))
			cancel()
			if r.code != code {
				t.Errorf("%s, %v: exit code %d, want %d: %s%s", name, args, r.code, code, r.stdout, r.stderr)
			}
			if strings.Contains(r.stdout+r.stderr, "canary") || r.stdout+r.stderr == "" {
				t.Errorf("%s, %v: %s%s", name, args, r.stdout, r.stderr)
			}
			if args[0] == "stats" && (name == "nobody there" || name == "no such database") {
				wantText(t, r.stderr, "see ") // the remedy
			}
		}
	}
	r := execute(t, command(t.Context(), "", "--database-url", "postgres://u:canary@"+nobody+"/x", "stats", "--nope"))
	if r.code != exitUsage || strings.Contains(r.stderr, "canary") {
		t.Errorf("exit code %d: %s", r.code, r.stderr)
	}
}

// If neither the flag nor DATABASE_URL names a database, libpq's variables do.
func TestVariablesOfLibpq(t *testing.T) {
	t.Parallel()
	b := setup(t)
	config, err := pgx.ParseConfig(b.role(t, "SELECT ON idempotency_keys"))
	if err != nil {
		t.Fatal(err)
	}
	cmd := command(t.Context(), "", "--json", "stats")
	cmd.Env = append(cmd.Env, "PGHOST="+config.Host, "PGPORT="+strconv.Itoa(int(config.Port)), "PGUSER="+config.User, "PGPASSWORD="+config.Password, "PGDATABASE="+config.Database)
	if r := execute(t, cmd); r.code != 0 || object[statsJSON](t, r).TableBytes != 0 {
		t.Errorf("exit code %d: %s%s", r.code, r.stdout, r.stderr)
	}
}

// The documented role can do everything except migrate. A role that may only read gets an error
// that names the missing privilege.
func TestLeastPrivilege(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.do(t, "k")
	full := b.role(t, "SELECT, DELETE, UPDATE (expires_at) ON idempotency_keys", "SELECT, INSERT ON idempotency_audit", "SELECT, DELETE ON idempotency_events",
		"SELECT, UPDATE, DELETE ON idempotency_open, idempotency_effects", "SELECT, UPDATE, DELETE ON message_outbox, message_parked", "SELECT ON message_offsets",
		"SELECT ON idempotency_migrations", "pg_monitor")
	looks := b.role(t, "SELECT ON idempotency_keys", "SELECT ON idempotency_audit", "SELECT ON idempotency_events", "SELECT ON idempotency_migrations")
	for i, test := range []struct {
		args              []string
		fullCode, looking int
	}{
		{[]string{"migrate", "status"}, 0, 0},
		{[]string{"key", "get", "acme", "k"}, 0, 0},
		{[]string{"key", "list"}, 0, 0},
		{[]string{"key", "list", "--recent"}, 0, 0},
		{[]string{"stats"}, 0, 0},
		{[]string{"top", "--count", "1"}, 0, 0},
		{[]string{"doctor"}, exitDoctor, exitDoctor}, // fsync is off
		{[]string{"gc"}, 0, exitFailed},
		{[]string{"key", "expire", "acme", "k", "--reason", "r", "--yes"}, 0, exitFailed},
		{[]string{"key", "delete", "acme", "k", "--reason", "r", "--yes"}, 0, exitFailed},
	} {
		for j, database := range []string{looks, full} {
			want := []int{test.looking, test.fullCode}[j]
			r := execute(t, command(t.Context(), database, test.args...))
			if r.code != want {
				t.Errorf("%v as %s: exit code %d, want %d: %s%s", test.args, []string{"one who looks", "an operator"}[j], r.code, want, r.stdout, r.stderr)
			}
			if want == exitFailed {
				wantText(t, r.stderr, "42501")
			}
			if i == 6 && j == 0 {
				wantText(t, r.stdout, "GRANT DELETE ON", "GRANT UPDATE (expires_at)", "GRANT SELECT, UPDATE, DELETE ON public.idempotency_open", "GRANT pg_monitor")
			}
			if i == 6 && j == 1 && strings.Contains(r.stdout, "this role can't") {
				t.Errorf("an operator lacks a right: %s", r.stdout)
			}
		}
	}
	if n := b.Count(t, "SELECT count(*) FROM idempotency_audit"); n != 2 {
		t.Errorf("%d acts in the audit table", n)
	}
}

func TestExitCodesOfBadCommands(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{nil, {"canary"}, {"key"}, {"key", "get", "canary"}, {"key", "get", "a", "b", "canary"}, {"key", "get", "", "k"}, {"key", "get", "canary\x01", "k k"}} {
		r := execute(t, command(t.Context(), "postgres://nobody@127.0.0.1:1/x", args...))
		if r.code != exitUsage || strings.Contains(r.stderr, "canary") || r.stdout != "" {
			t.Errorf("%q: exit code %d, %s%s", args, r.code, r.stdout, r.stderr)
		}
	}
	if r := execute(t, command(t.Context(), "", "--help")); r.code != 0 || !strings.Contains(r.stdout, "Exit codes: 0 done, "+strconv.Itoa(exitFailed)+" failed") {
		t.Errorf("--help: exit code %d, %s", r.code, r.stdout)
	}
}

// TestArgumentsAreTakenOutOfMessages: whole arguments are removed, and the words beside them stay.
func TestArgumentsAreTakenOutOfMessages(t *testing.T) {
	t.Parallel()
	model := &kong.Application{Node: &kong.Node{Name: "idemctl"}}
	for _, test := range []struct{ message, want string }{
		{"missing flags: --reason=TEXT", "missing flags: --reason=TEXT"},
		{"unexpected argument a", "unexpected argument ..."},
		{`--until must be one of "absent" but got "canary"`, `--until must be one of "absent" but got "..."`},
		{"xcanaryx", "x...x"},
	} {
		if got := withoutArguments(test.message, []string{"a", "canary"}, model); got != test.want {
			t.Errorf("%q became %q, want %q", test.message, got, test.want)
		}
	}
}

// hostile is text that a terminal would obey: it moves the cursor, sets the title, reverses the
// writing direction.
const hostile = "ac\u009b2J\u009d0;title\u009c\u202eme\x7f"

// A scope, a header, a trace, a reason or an application's name can't control the operator's
// terminal, with --json or without.
func TestWhatOthersWroteMovesNoCursor(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.do(t, "k")
	if err := idempotency.ValidateScope(hostile); err != nil {
		t.Fatal(err)
	}
	b.Exec(t, `UPDATE idempotency_keys SET scope = $1, trace_id = $1, headers = decode('01000000010000000158000000010000000a', 'hex') || convert_to($2, 'UTF8')`, hostile, "\u202eabc\u009b1")
	b.Exec(t, `INSERT INTO idempotency_audit (action, actor, reason, scope, key, attempt_id, status, record_created_at, record_expires_at)
		SELECT 'expire', $1, $1, scope, key, attempt_id, status, created_at, expires_at FROM idempotency_keys`, hostile)
	finish := b.running(t, "held")
	defer finish()
	for _, args := range [][]string{
		{"key", "list"}, {"key", "get", hostile, "k"}, {"key", "get", "--body", hostile, "k"}, {"key", "get", "acme", "held"},
		{"key", "watch", hostile, "k", "--for", "1ms"}, {"stats"}, {"top", "--count", "1"}, {"doctor"}, {"migrate", "status"}, {"gc"},
		{"key", "expire", hostile, "k", "--reason", hostile, "--actor", hostile, "--yes"},
		{"key", "get", "\x1b]0;title\x07", "k"}, {"key", "get", hostile, "k", hostile}, {"--schema", "no_such_schema", "key", "get", hostile, "k"},
	} {
		for _, args := range [][]string{args, append([]string{"--json"}, args...)} {
			r := b.idemctl(t, args...)
			for _, r := range r.stdout + r.stderr {
				if r != '\n' && !unicode.IsPrint(r) {
					t.Errorf("%q prints %U", args, r)
				}
			}
			if strings.HasPrefix(strings.Join(args, " "), "--json key get "+hostile+" k") && len(args) == 5 {
				if got := object[struct{ Scope string }](t, r); got.Scope != hostile {
					t.Errorf("the scope reads %q", got.Scope)
				}
			}
		}
	}
}

// A migration that waits prints the session that it waits for, and an application's name can't
// control the terminal there either.
func TestMigrationThatWaitsSaysForWhom(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ctx := t.Context()
	conn, err := b.Pool.Acquire(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	var pid string
	if err := conn.QueryRow(ctx, "SELECT pg_backend_pid()::text FROM set_config('application_name', $1, false)", "a\x1b[2Jreport").Scan(&pid); err != nil {
		t.Fatal(err)
	}
	tx, err := conn.Begin(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(ctx, "LOCK TABLE idempotency_audit IN ACCESS SHARE MODE"); err != nil {
		t.Fatal(err)
	}
	ended := make(chan result, 1)
	go func() { ended <- b.idemctl(t, "migrate", "down", "--to", "2", "--yes") }()
	const waits = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'idemctl' AND wait_event_type = 'Lock' AND datname = current_database()"
	await := func(waiting bool) {
		for deadline := time.Now().Add(waitMax); b.Count(t, waits) > 0 != waiting; {
			if time.Now().After(deadline) {
				t.Fatalf("that it waits: never %v", waiting)
			}
		}
	}
	for range 2 { // the first wait may be too short to time out
		await(true)
		await(false)
	}
	if err := tx.Rollback(ctx); err != nil {
		t.Fatal(err)
	}
	r := <-ended
	if r.code != 0 {
		t.Errorf("exit code %d\n%s", r.code, r.stderr)
	}
	wantText(t, r.stderr, "migration 5 down waits for", "process "+pid, "requests go on")
	if strings.ContainsRune(r.stderr, 0x1b) {
		t.Errorf("it prints control characters: %q", r.stderr)
	}
	if version, err := migrations.Version(ctx, postgres.New(b.Pool, nil), nil); version != 2 || err != nil {
		t.Errorf("version is %d, %v", version, err)
	}
}
