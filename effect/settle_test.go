package effect_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/storage/encrypted"
	"github.com/paidonce/idempotency/storage/postgres"
)

// webhook settles the charge as a webhook of the processor does.
func (s *shop) webhook(t *testing.T, done bool, id string, seal func([]byte, idempotency.Key, idempotency.AttemptID, string) []byte) error {
	t.Helper()
	key := s.Text(t, "SELECT derived_key::text FROM idempotency_effects")
	settlement, err := s.charge.Settled(key, charge{id, 900})
	if err != nil {
		t.Fatal(err)
	}
	if !done {
		settlement = s.charge.SettledDeclined(key, map[string]string{"code": "fraud"})
	}
	settlement.Seal = seal
	return pgx.BeginFunc(t.Context(), s.Pool, func(tx pgx.Tx) error { return s.Store.Settle(t.Context(), tx, settlement) })
}

// The reply is lost, and the processor's webhook brings the result: the handler makes its answer
// from it, and nothing is sent again. A repetition of the webhook changes nothing.
func TestWebhookSettlesWhatTheReplyDidNot(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.does(loses)
	s.wantOpen(t, s.request())
	s.Exec(t, "UPDATE idempotency_open SET next_at = now() + interval '1 hour'") // a long pause
	for range 2 {
		if err := s.webhook(t, true, "ch_webhook", nil); err != nil {
			t.Fatal(err)
		}
	}
	if got := s.Strings(t, "SELECT action || ' ' || effect || ' ' || key || ' by ' || actor FROM idempotency_audit"); len(got) != 1 || got[0] != "settle-done charge key-1 by the other service" {
		t.Errorf("the audit table has %q", got)
	}
	result := s.request() // due at once
	s.wantPaid(t, result, 900)
	if s.sent(t) != 1 || string(result.Answer.Body) != "ch_webhook" {
		t.Errorf("%d sent, answer %q", s.sent(t), result.Answer.Body)
	}
	if err := s.webhook(t, true, "ch_other", nil); err != nil {
		t.Errorf("after the end: %v", err)
	}
	if output := s.Text(t, "SELECT convert_from(output, 'UTF8') FROM idempotency_effects"); output != `{"ID":"ch_webhook","Amount":900}` {
		t.Errorf("the output is %s", output)
	}
}

// The webhook comes while the call is still under way: it was first, so it counts, whatever the
// reply says, and the same run goes on with it.
func TestWebhookDuringTheCallCounts(t *testing.T) {
	t.Parallel()
	for name, reply := range map[string]error{"done": nil, "declined": effect.Declined(errors.New("no"), nil), "unknown": errors.New("lost")} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			g := newGate()
			s := newShop(t, sending(func(_ int64, do func() (charge, error)) (charge, error) {
				out, err := do()
				g.pass()
				return out, errors.Join(err, reply)
			}))
			first := later(s.request)
			g.reached(t)
			lease := s.Text(t, "SELECT next_at::text FROM idempotency_open")
			if err := s.webhook(t, true, "ch_webhook", nil); err != nil {
				t.Error(err)
			}
			if after := s.Text(t, "SELECT next_at::text FROM idempotency_open"); after != lease {
				t.Errorf("the owner's lease ended at %s, not at %s", after, lease)
			}
			g.open()
			result := <-first
			if name == "unknown" { // the next run finds it
				s.wantOpen(t, result)
				result = s.resume(t)
			}
			s.wantPaid(t, result, 900)
			if s.sent(t) != 1 || string(result.Answer.Body) != "ch_webhook" {
				t.Errorf("%d sent, answer %q", s.sent(t), result.Answer.Body)
			}
		})
	}
}

// It counts in an encrypted store too.
func TestWebhookDuringAnEncryptedCallCounts(t *testing.T) {
	t.Parallel()
	g := newGate()
	s := newShop(t, waitingWithReplies(g))
	store := encrypted.New(s.Store, encrypted.Keys{Current: encrypted.Key{ID: 1, Secret: [encrypted.SecretBytes]byte{1}}})
	s.serve(store, idempotency.Timeouts{})
	first := later(s.request)
	g.reached(t)
	if err := s.webhook(t, true, "ch_webhook", store.SealOutput); err != nil {
		t.Error(err)
	}
	g.open()
	result := <-first
	s.wantPaid(t, result, 900)
	if result.Answer != nil && string(result.Answer.Body) != "ch_webhook" {
		t.Errorf("answer %q", result.Answer.Body)
	}
}

// A result is never taken back, neither by the processor's webhook nor by anything else.
func TestWebhookNeverDowngrades(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		first bool
		state idempotency.EffectState
	}{"done": {true, idempotency.EffectDone}, "declined": {false, idempotency.EffectDeclined}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newShop(t, func(_ *processor, e *effect.Effect[card, charge]) { e.KeepsDeclines = true })
			s.does(loses)
			s.wantOpen(t, s.request())
			if err := s.webhook(t, c.first, "ch_1", nil); err != nil {
				t.Fatal(err)
			}
			for _, when := range []string{"open", "ended"} {
				if err := s.webhook(t, !c.first, "ch_2", nil); !errors.Is(err, postgres.ErrSettledOtherwise) {
					t.Errorf("%s: %v, want ErrSettledOtherwise", when, err)
				}
				if state := s.Count(t, "SELECT state FROM idempotency_effects"); state != int(c.state) {
					t.Errorf("%s: state %d, want %d", when, state, c.state)
				}
				if result := s.resume(t); when == "open" && (result.Answer == nil || result.Answer.Status != map[bool]int{true: 201, false: 402}[c.first]) {
					t.Errorf("%+v", result)
				}
			}
		})
	}
}

// The decline's detail reaches the handler, as that of a reply does.
func TestWebhooksDeclineHasItsDetail(t *testing.T) {
	t.Parallel()
	s := newShop(t, func(_ *processor, e *effect.Effect[card, charge]) { e.KeepsDeclines = true })
	var detail string
	s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
		_, err := s.charge.Call(ctx, card{"tok", 900})
		var declined *effect.DeclinedError
		if errors.As(err, &declined) {
			detail = string(declined.Detail)
			return &idempotency.Answer{Status: 402}, nil
		}
		return &idempotency.Answer{Status: 500}, nil
	}
	s.does(forgets)
	s.wantOpen(t, s.request())
	if err := s.webhook(t, false, "", nil); err != nil {
		t.Fatal(err)
	}
	if result := s.request(); result.Answer == nil || result.Answer.Status != 402 || detail != `{"code":"fraud"}` {
		t.Errorf("%+v, detail %s", result, detail)
	}
}

// A webhook's result is committed with the rest of its transaction, or not at all, and a parked
// request is run again.
func TestWebhookIsPartOfItsTransaction(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.does(loses)
	s.wantOpen(t, s.request())
	s.older(t, 2*time.Hour)
	s.wantParked(t, s.resume(t), "may have forgotten its key")
	key := s.Text(t, "SELECT derived_key::text FROM idempotency_effects")
	settlement, err := s.charge.Settled(key, charge{"ch_1", 900})
	if err != nil {
		t.Fatal(err)
	}
	undone := errors.New("undone")
	err = pgx.BeginFunc(t.Context(), s.Pool, func(tx pgx.Tx) error {
		return errors.Join(s.Store.Settle(t.Context(), tx, settlement), undone)
	})
	if !errors.Is(err, undone) {
		t.Error(err)
	}
	s.wantParked(t, s.request(), "may have forgotten its key")
	if err := s.webhook(t, true, "ch_1", nil); err != nil {
		t.Fatal(err)
	}
	s.wantPaid(t, s.request(), 900)
}

func TestSettleRefusesWhatItDoesNotKnow(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.does(loses)
	s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
		if _, err := postgres.Phase(ctx, "hold", func(pgx.Tx) (int, error) { return 1, nil }); err != nil {
			return nil, err
		}
		_, err := s.charge.Call(ctx, card{"tok", 900})
		return nil, err
	}
	s.wantOpen(t, s.request())
	ofPhase := s.Text(t, "SELECT derived_key::text FROM idempotency_effects WHERE name = 'hold'")
	for name, c := range map[string]struct {
		settlement idempotency.Settlement
		notFound   bool
	}{
		"no key":       {idempotency.Settlement{State: idempotency.EffectDone}, true},
		"no UUID":      {idempotency.Settlement{State: idempotency.EffectDone, DerivedKey: "order-17"}, true},
		"another key":  {idempotency.Settlement{State: idempotency.EffectDone, DerivedKey: "6f1f3a0e-9f0b-5a86-9d4c-000000000000"}, true},
		"of a phase":   {idempotency.Settlement{State: idempotency.EffectDone, DerivedKey: ofPhase}, true},
		"no state":     {idempotency.Settlement{DerivedKey: ofPhase}, false},
		"state: maybe": {idempotency.Settlement{State: idempotency.EffectMaybe, DerivedKey: ofPhase}, false},
	} {
		err := pgx.BeginFunc(t.Context(), s.Pool, func(tx pgx.Tx) error { return s.Store.Settle(t.Context(), tx, c.settlement) })
		if err == nil || errors.Is(err, postgres.ErrEffectNotFound) != c.notFound {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := s.charge.Settled("k", charge{ID: string(make([]byte, effect.OutputBytesMax))}); err == nil {
		t.Error("an output that is too large was taken")
	}
	// Its JSON is {"ID":"...","Amount":0}, 20 bytes around the ID.
	const around = 20
	if encoded, _ := json.Marshal(charge{}); len(encoded) != around {
		t.Fatalf("the JSON around has %d bytes", len(encoded))
	}
	long := make([]byte, effect.OutputBytesMax-around)
	for i := range long {
		long[i] = 'x'
	}
	if _, err := s.charge.Settled("k", charge{ID: string(long)}); err != nil {
		t.Errorf("an output of %d bytes: %v", effect.OutputBytesMax, err)
	}
}

// An encrypted store's output is sealed, or refused.
func TestWebhookOfAnEncryptedRequest(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	store := encrypted.New(s.Store, encrypted.Keys{Current: encrypted.Key{ID: 1, Secret: [encrypted.SecretBytes]byte{1}}})
	s.serve(store, idempotency.Timeouts{})
	s.does(loses)
	s.wantOpen(t, s.request())
	if err := s.webhook(t, true, "ch_1", nil); err == nil {
		t.Error("an output that nobody could read was recorded")
	}
	if err := s.webhook(t, true, "ch_1", store.SealOutput); err != nil {
		t.Fatal(err)
	}
	result := s.request()
	s.wantPaid(t, result, 900)
	if s.sent(t) != 1 {
		t.Error(fmt.Sprint(s.sent(t), " sent"))
	}
}

// net/http sends the request again by itself, and the processor says by webhook that it declined
// that one. The first may still be under way, so the no is not final, although the database knows
// of one send only.
func TestWebhookOfANoToARequestThatNetHTTPRepeatedIsNotFinal(t *testing.T) {
	t.Parallel()
	s := newShop(t, func(p *processor, _ *effect.Effect[card, charge]) {
		p.client = &http.Client{Transport: &http.Transport{}}
	})
	if warm, err := s.do(t.Context(), "warm", card{"tok", 1}); err != nil || warm.ID == "" {
		t.Fatal(warm, err)
	}
	s.does(stalls, refuses)
	s.cutsTheNext()
	s.wantOpen(t, s.request())
	if err := s.webhook(t, false, "", nil); err != nil {
		t.Error(err)
	}
	if n := s.Count(t, "SELECT count(*) FROM idempotency_effects WHERE state = 1"); n != 1 {
		t.Error("the no is recorded")
	}
	s.arrives()
	if result := s.resume(t); result.Answer == nil || result.Answer.Status != 201 {
		t.Errorf("%+v", result)
	}
}

// A no that is not final changes nothing but the reason that an operator sees. Otherwise a
// processor that sends a webhook for each declined send would be called again without a pause, and
// a request that waits for a person would run.
func TestWebhookOfANoThatIsNotFinalDoesNotHastenTheRequest(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.does(loses)
	s.wantOpen(t, s.request())
	for _, set := range []string{"next_at = now() + interval '1 hour'", "parked = 'by a person'"} {
		s.Exec(t, "UPDATE idempotency_open SET "+set)
		const row = "SELECT row(next_at, owned, parked, epoch, resumed_at)::text FROM idempotency_open"
		before := s.Text(t, row)
		if err := s.webhook(t, false, "", nil); err != nil {
			t.Error(err)
		}
		if after := s.Text(t, row); after != before {
			t.Errorf("it was %s and is %s", before, after)
		}
	}
	if reason := s.Text(t, "SELECT last_reason FROM idempotency_open"); !strings.Contains(reason, "declined from outside") {
		t.Errorf("the reason is %q", reason)
	}
	if n := s.Count(t, "SELECT count(*) FROM idempotency_audit"); n != 0 {
		t.Errorf("%d rows in the audit table", n)
	}
}

// A call that is sent once at most has one no.
func TestWebhookOfANoToACallThatIsSentOnceIsFinal(t *testing.T) {
	t.Parallel()
	s := newShop(t, func(_ *processor, e *effect.Effect[card, charge]) {
		e.AtMostOnce, e.MaybeParks = true, true
	})
	s.does(forgets)
	s.wantParked(t, s.request(), "never sent twice")
	if err := s.webhook(t, false, "", nil); err != nil {
		t.Fatal(err)
	}
	if result := s.request(); result.Answer == nil || result.Answer.Status != 402 || s.sent(t) != 1 {
		t.Errorf("%+v, %d sent", result, s.sent(t))
	}
}
