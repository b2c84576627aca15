package main

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/testservice"
)

// A parked request is found, settled and answered by the service.
func TestEffectCommands(t *testing.T) {
	t.Parallel()
	b := setup(t)
	run := func(ctx context.Context) (*idempotency.Answer, error) {
		effects, err := idempotency.EffectsFrom(ctx)
		if err != nil {
			return nil, err
		}
		effect, _, _, err := effects.Begin(idempotency.Intent{Name: "charge", Kind: idempotency.EffectCall, Input: []byte("1"), Timeout: time.Second})
		if err != nil {
			return nil, err
		}
		if effect.State == idempotency.EffectDone {
			return &idempotency.Answer{Status: 201, Body: effect.Output}, nil
		}
		effects.Lapse(idempotency.Lapse{Parked: "no reply", Reason: "no reply"})
		return nil, idempotency.ErrUnsettled
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
	b.want(t, exitUsage, "effect", "settle", "acme", "canary-key", "charge", "--reason", "x")
	b.want(t, exitUsage, "effect", "settle", "acme", "canary-key", "charge", "--reason", "x", "--retry", "--declined")
	b.want(t, exitUsage, "effect", "settle", "acme", "canary-key", "charge", "--reason", "x", "--done", "ch_1")
	b.want(t, exitNotFound, "effect", "settle", "acme", "canary-key", "other", "--reason", "x", "--retry")
	b.want(t, 0, "effect", "settle", "acme", "canary-key", "charge", "--reason", "x", "--done", `{"id":"ch_1"}`)
	wantText(t, b.want(t, exitRefused, "effect", "settle", "acme", "canary-key", "charge", "--reason", "x", "--declined").stderr, "settled")
	if result := do("canary-key"); result.Answer == nil || string(result.Answer.Body) != `{"id":"ch_1"}` {
		t.Errorf("%+v", result)
	}
	b.want(t, exitNotFound, "effect", "get", "acme", "canary-key")

	b.want(t, 0, "key", "resume", "acme", "other-key", "--reason", "x")
	wantText(t, b.want(t, 0, "effect", "list").stdout, "due")
	b.want(t, 0, "key", "park", "acme", "other-key", "--reason", "x")
	r := b.want(t, exitRefused, "key", "abandon", "acme", "other-key", "--reason", "x")
	if !strings.Contains(r.stderr, "--sent charge") || !strings.Contains(r.stderr, "intended") {
		t.Errorf("it shows %q", r.stderr)
	}
	b.want(t, exitRefused, "key", "abandon", "acme", "other-key", "--reason", "x", "--sent", "none")
	b.want(t, 0, "key", "abandon", "acme", "other-key", "--reason", "x", "--sent", "charge")
	b.want(t, exitNotFound, "key", "get", "acme", "other-key")
}
