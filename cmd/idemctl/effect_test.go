package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/storage/postgres"
)

type charge struct {
	ID     string `json:"id"`
	Amount int    `json:"amount"`
}

// A parked request is found, settled and answered by the service. A result of a wrong shape is
// refused by the handler, which shows the right one, and is corrected.
func TestEffectCommands(t *testing.T) {
	t.Parallel()
	b := setup(t)
	call := effect.New("charge", effect.Effect[int, charge]{
		Do: func(context.Context, string, int) (charge, error) {
			return charge{}, effect.Park("the service never answers", errors.New("no reply"))
		},
	})
	run := func(ctx context.Context) (*idempotency.Answer, error) {
		paid, err := call.Call(ctx, 1)
		if err != nil {
			return nil, err
		}
		_, err = postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects (name) VALUES ($1)", fmt.Sprint(paid.Amount))
		return &idempotency.Answer{Status: 201, Body: []byte(paid.ID)}, err
	}
	b.Engine.Resumable("topup/1", func(idempotency.Key, []byte) (idempotency.RunFunc, error) { return run, nil })
	do := func(value string) idempotency.Result {
		req := testservice.Request(idempotency.Key{Scope: "acme", Value: value})
		req.Resumable, req.Stored = "topup/1", func() []byte { return nil }
		return b.Engine.Do(t.Context(), req, run)
	}
	for _, value := range []string{"canary-key", "other-key"} {
		if result := do(value); result.Outcome != idempotency.OutcomeUnknown {
			t.Fatalf("%+v", result)
		}
	}
	wantText(t, b.want(t, 0, "effect", "list", "--parked", "--route", "topup/1").stdout, "canary-key")
	wantText(t, b.want(t, 0, "key", "get", "acme", "canary-key").stdout, "open")
	seen := object[openJSON](t, b.want(t, 0, "--json", "effect", "get", "acme", "canary-key"))
	if seen.State != "parked" || len(seen.Effects) != 1 || seen.Effects[0].State != "intended" || seen.Effects[0].Kind != "call" {
		t.Errorf("%+v", seen)
	}
	wantText(t, b.want(t, exitRefused, "key", "delete", "acme", "canary-key", "--reason", "x", "--yes").stderr, "key abandon")
	settle := func(code int, effect, epoch string, more ...string) result {
		t.Helper()
		return b.want(t, code, append([]string{"effect", "settle", "acme", "canary-key", effect, "--reason", "x", epoch}, more...)...)
	}
	epoch := func() string {
		t.Helper()
		return fmt.Sprint("--epoch=", object[openJSON](t, b.want(t, 0, "--json", "effect", "get", "acme", "canary-key")).Epoch)
	}
	first := epoch()
	wantText(t, settle(exitUsage, "charge", first).stderr, "--done '{", "--declined", "--not-sent", "--retry")
	settle(exitUsage, "charge", first, "--retry", "--declined")
	wantText(t, settle(exitUsage, "charge", first, "--done", "ch_1").stderr, "not JSON", `{"id":"ch_1"`)
	settle(exitNotFound, "other", first, "--retry")
	wantText(t, settle(0, "charge", first, "--done", `{"id":"canary-id"}`).stdout, "stated as done")
	wantText(t, b.want(t, 0, "effect", "get", "acme", "canary-key").stdout, "stated", "due")
	wantText(t, settle(exitRefused, "charge", first, "--declined").stderr, "changed", "effect get")
	if result := do("canary-key"); result.Answer != nil {
		t.Errorf("of a wrong shape: %+v", result)
	}
	shown := b.want(t, 0, "effect", "get", "acme", "canary-key").stdout
	wantText(t, shown, "stated", "parked", `{"id":"","amount":0}`, "effect settle --done")
	if strings.Contains(shown, "canary-id") || b.Effects(t) != 0 {
		t.Errorf("posted %d, shown: %s", b.Effects(t), shown)
	}
	settle(0, "charge", epoch(), "--done", `{"id":"ch_1","amount":900}`)
	if result := do("canary-key"); result.Answer == nil || string(result.Answer.Body) != "ch_1" {
		t.Errorf("%+v", result)
	}
	if got := b.Strings(t, "SELECT name FROM effects"); len(got) != 1 || got[0] != "900" {
		t.Errorf("posted %q", got)
	}
	wantText(t, settle(exitNotFound, "charge", "--any-epoch", "--retry").stderr, "key get")
	b.want(t, exitNotFound, "effect", "get", "acme", "canary-key")

	// Each act needs the epoch, or --any-epoch.
	for _, act := range [][]string{{"effect", "settle"}, {"key", "resume"}, {"key", "park"}, {"key", "abandon"}} {
		command := append(slices.Clone(act), "acme", "other-key", "--reason", "x")
		switch act[1] {
		case "settle":
			command = append(command, "charge", "--retry")
		case "abandon":
			command = append(command, "--sent", "charge")
		}
		wantText(t, b.want(t, exitUsage, command...).stderr, "idemctl effect get", "--epoch", "--any-epoch")
		b.want(t, exitUsage, append(command, "--epoch", "0")...)
		b.want(t, exitUsage, append(command, "--epoch", "1", "--any-epoch")...)
		b.want(t, exitRefused, append(command, "--epoch", "1")...)
	}
	b.want(t, 0, "key", "resume", "acme", "other-key", "--reason", "x", "--any-epoch")
	wantText(t, b.want(t, 0, "effect", "list").stdout, "due")
	b.want(t, 0, "key", "park", "acme", "other-key", "--reason", "x", "--any-epoch")
	r := b.want(t, exitRefused, "key", "abandon", "acme", "other-key", "--reason", "x")
	now := fmt.Sprint(object[openJSON](t, b.want(t, 0, "--json", "effect", "get", "acme", "other-key")).Epoch)
	wantText(t, r.stderr, "--epoch "+now+" --sent charge", "intended")
	b.want(t, exitRefused, "key", "abandon", "acme", "other-key", "--reason", "x", "--epoch", now, "--sent", "none")
	b.want(t, 0, "key", "abandon", "acme", "other-key", "--reason", "x", "--epoch", now, "--sent", "charge")
	b.want(t, exitNotFound, "key", "get", "acme", "other-key")
}

// The usage line leaves out the flags of which exactly one is required, and the text below it names
// them.
func TestUsageOfSettle(t *testing.T) {
	t.Parallel()
	help := execute(t, command(t.Context(), "", "effect", "settle", "--help"))
	usage, rest, _ := strings.Cut(help.stdout, "\n")
	if help.code != 0 || !strings.Contains(usage, "--reason=TEXT") || strings.Contains(usage, "--declined") || strings.Contains(usage, "--done") {
		t.Errorf("exit code %d, usage %q", help.code, usage)
	}
	wantText(t, strings.Join(strings.Fields(rest), " "), "one of --done, --declined, --not-sent and --retry", "Required, unless --any-epoch is given")
}
