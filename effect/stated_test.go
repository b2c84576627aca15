package effect_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/storage/encrypted"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// state settles an effect as a person does.
func (s *shop) state(t *testing.T, name string, as operator.Settlement, output []byte) {
	t.Helper()
	act := operator.OpenAct{Act: operator.Act{Actor: "alice", Reason: "ticket 7"}}
	if _, err := operator.New(s.Store, nil).Settle(t.Context(), s.key, name, as, output, act); err != nil {
		t.Fatal(err)
	}
}

// wantUnsent fails the test unless one call was sent, by the first run, and nothing was posted. No
// run since then counts as a send.
func (s *shop) wantUnsent(t *testing.T) {
	t.Helper()
	if n, found := s.sent(t), s.Strings(t, "SELECT name FROM effects"); n != 1 || s.lookups != 0 || found != nil {
		t.Errorf("sent %d times, looked up %d times, posted %v", n, s.lookups, found)
	}
	if got := s.Text(t, "SELECT state || ' ' || tries || ' ' || COALESCE(doubt_at::text, '-') FROM idempotency_effects"); got != "1 1 -" {
		t.Errorf("state, tries and doubt are %q", got)
	}
}

// A person states a wrong result, again and again: nothing is sent, looked up or posted, and the
// reason shows the fields, and nothing of what was typed. The right one is posted, once.
func TestWrongStatementIsNotPosted(t *testing.T) {
	t.Parallel()
	for name, age := range map[string]time.Duration{"at once": 0, "after the key's lifetime": 2 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newShop(t, withLookup)
			s.does(loses)
			s.wantOpen(t, s.request())
			s.older(t, age)
			for _, wrong := range []string{
				`{"id":"canary","amount":900,"canary":1}`, `{"ID":"canary"}`, `{"Amount":900}`, `{"ID":"canary","Amount":"9004711"}`, `{"ID":"canary","Amount":null}`,
				`{"ID":"canary","Amount":900471199999999999999999}`, `{"ID":"canary","Amount":1,"Amount":900}`, `["canary"]`, `{}`, `null`, `9004711`,
				fmt.Sprintf("%-*s", effect.OutputBytesMax+1, `{"ID":"canary","Amount":900}`),
			} {
				s.state(t, "charge", operator.SettleDone, []byte(wrong))
				result := s.resume(t)
				words := `with exactly the fields and types of {"ID":"","Amount":0}`
				if len(wrong) > effect.OutputBytesMax {
					words = "over 65536 bytes"
				}
				s.wantParked(t, result, words)
				s.wantUnsent(t)
				said := fmt.Sprint(result.Err, s.ends.last(t).Err, s.Text(t, "SELECT parked || last_reason FROM idempotency_open"))
				if strings.Contains(said, "canary") || strings.Contains(said, "9004711") {
					t.Errorf("%s is quoted: %s", wrong, said)
				}
				if end := s.ends.last(t); end.Sent || end.Result != idempotency.EffectResultParked {
					t.Errorf("traced: %+v", end)
				}
			}
			s.state(t, "charge", operator.SettleDone, fmt.Appendf(nil, "%-*s", effect.OutputBytesMax, ` {"Amount":900, "ID":"ch_stated"}`))
			result := s.resume(t)
			s.wantPaid(t, result, 900)
			if string(result.Answer.Body) != "ch_stated" || s.sent(t) != 1 || s.lookups != 0 {
				t.Errorf("answer %q, sent %d times, looked up %d times", result.Answer.Body, s.sent(t), s.lookups)
			}
			if output := s.Text(t, "SELECT convert_from(output, 'UTF8') || state || tries FROM idempotency_effects"); output != `{"ID":"ch_stated","Amount":900}21` {
				t.Errorf("recorded: %s", output)
			}
		})
	}
}

// What a person stated can be taken back by every other settlement, and by the other service.
func TestStatementIsTakenBack(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		first  behavior
		settle func(t *testing.T, s *shop)
		status int
		sent   int
	}{
		"declined": {forgets, func(t *testing.T, s *shop) {
			s.older(t, 10*time.Minute) // no send is under way
			s.state(t, "charge", operator.SettleDeclined, nil)
		}, 402, 1},
		"not sent": {forgets, func(t *testing.T, s *shop) {
			s.older(t, 10*time.Minute)
			s.state(t, "charge", operator.SettleNotSent, nil)
		}, 201, 2},
		"retry": {loses, func(t *testing.T, s *shop) { s.state(t, "charge", operator.SettleRetry, nil) }, 201, 2},
		"webhook": {loses, func(t *testing.T, s *shop) {
			if err := s.webhook(t, true, "ch_1", nil); err != nil {
				t.Fatal(err)
			}
		}, 201, 1},
		"webhook's no": {forgets, func(t *testing.T, s *shop) {
			if err := s.webhook(t, false, "", nil); err != nil {
				t.Fatal(err)
			}
		}, 402, 1},
	} {
		for _, checked := range []bool{false, true} {
			t.Run(fmt.Sprint(name, ", checked ", checked), func(t *testing.T) {
				t.Parallel()
				s := newShop(t, func(_ *processor, e *effect.Effect[card, charge]) { e.KeepsDeclines = true }) // else the webhook's no is only noted
				s.does(c.first)
				s.wantOpen(t, s.request())
				stated := `{"ID":"ch_stated","Amount":700}`
				if checked {
					stated = `{"ID":"ch_stated"}`
				}
				s.state(t, "charge", operator.SettleDone, []byte(stated))
				if checked {
					s.wantParked(t, s.resume(t), "does not fit")
				}
				c.settle(t, s)
				result := s.resume(t)
				if result.Answer == nil || result.Answer.Status != c.status || s.sent(t) != c.sent {
					t.Errorf("%+v, sent %d times", result, s.sent(t))
				}
				if c.status == 201 {
					s.wantPaid(t, result, 900)
				}
			})
		}
	}
}

// A call that is sent once at most is checked in the same way: it neither ends as ErrMaybe nor is it
// sent again.
func TestStatementOfACallThatIsSentOnce(t *testing.T) {
	t.Parallel()
	s := newShop(t, func(_ *processor, e *effect.Effect[card, charge]) { e.AtMostOnce, e.MaybeParks = true, true })
	s.does(loses)
	s.wantParked(t, s.request(), "may have been made")
	s.state(t, "charge", operator.SettleDone, []byte(`{"ID":"ch_1"}`))
	s.wantParked(t, s.resume(t), "does not fit")
	s.wantUnsent(t)
	s.state(t, "charge", operator.SettleDone, []byte(`{"ID":"ch_1","Amount":900}`))
	s.wantPaid(t, s.resume(t), 900)
	s.wantSent(t, 1)
}

func TestStatementOfAnUndo(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	undone, refunded := 0, charge{}
	refund := effect.New("refund", effect.Effect[card, charge]{Do: func(context.Context, string, card) (charge, error) {
		undone++
		return charge{}, errors.New("no reply")
	}})
	s.handle = func(ctx context.Context) (*idempotency.Answer, error) {
		_, err := s.charge.Call(ctx, card{"tok", 900})
		if err == nil {
			refunded, err = refund.Undo(ctx, s.charge, card{"tok", 900})
		}
		return &idempotency.Answer{Status: 409}, err
	}
	s.wantOpen(t, s.request())
	s.state(t, "undo/charge", operator.SettleDone, []byte(`{"ID":"re_1","amount":900}`))
	s.wantParked(t, s.resume(t), `effect undo/charge: the stated result does not fit`)
	s.state(t, "undo/charge", operator.SettleDone, []byte(`{"ID":"re_1","Amount":900}`))
	if result := s.resume(t); result.Answer == nil || result.Answer.Status != 409 || undone != 1 || refunded != (charge{"re_1", 900}) {
		t.Errorf("%+v, undone %d times, %+v", result, undone, refunded)
	}
}

// In an encrypted store a statement is sealed, and opened before the check. One that can't be opened
// is left for later, as any part is, and can be replaced.
func TestStatementInAnEncryptedStore(t *testing.T) {
	t.Parallel()
	s := newShop(t, withLookup)
	store := encrypted.New(s.Store, encrypted.Keys{Current: encrypted.Key{ID: 1, Secret: [encrypted.SecretBytes]byte{1}}})
	s.serve(store, idempotency.Timeouts{})
	s.does(loses)
	s.wantOpen(t, s.request())
	seen, err := operator.New(s.Store, nil).GetOpen(t.Context(), s.key)
	if err != nil {
		t.Fatal(err)
	}
	seal := func(effect, output string) []byte {
		return store.SealOutput([]byte(output), s.key, seen.Attempt, effect)
	}

	s.state(t, "charge", operator.SettleDone, seal("mail", `{"ID":"ch_1","Amount":900}`))
	if result := s.resume(t); result.Answer != nil || !errors.Is(result.Err, idempotency.ErrRecordCorrupt) {
		t.Errorf("of another effect: %+v", result)
	}
	s.wantUnsent(t)
	s.due(t)
	s.state(t, "charge", operator.SettleDone, seal("charge", ""))
	s.wantParked(t, s.resume(t), `{"ID":"","Amount":0}`)
	s.wantUnsent(t)
	s.state(t, "charge", operator.SettleDone, seal("charge", `{"ID":"ch_1"}`))
	s.wantParked(t, s.resume(t), `{"ID":"","Amount":0}`)
	s.wantUnsent(t)
	s.state(t, "charge", operator.SettleDone, seal("charge", `{"ID":"ch_1","Amount":900}`))
	s.wantPaid(t, s.resume(t), 900)
	if n := s.Count(t, "SELECT count(*) FROM idempotency_effects WHERE position('ch_1'::bytea IN output) > 0"); n != 0 || s.sent(t) != 1 {
		t.Errorf("%d outputs are readable, sent %d times", n, s.sent(t))
	}
}

// A run has read a statement and is slow. The person corrects it or takes it back meanwhile: the
// slow run must not record what it read.
func TestSlowRunDoesNotRecordAStatementThatWasTakenBack(t *testing.T) {
	t.Parallel()
	for as, output := range map[operator.Settlement][]byte{
		operator.SettleDone: []byte(`{"ID":"ch_stated","Amount":900}`), operator.SettleRetry: nil, operator.SettleNotSent: nil,
	} {
		t.Run(string(as), func(t *testing.T) {
			t.Parallel()
			s := newShop(t, nil)
			if as == operator.SettleNotSent {
				s.does(forgets)
			} else {
				s.does(loses)
			}
			s.wantOpen(t, s.request())
			s.older(t, 10*time.Minute)
			s.state(t, "charge", operator.SettleDone, []byte(`{"ID":"ch_stated","Amount":700}`))
			slow := newGate()
			s.beforeCall = slow.pass
			one := s.resumeLater(t)
			slow.reached(t)
			s.beforeCall = nil
			s.due(t) // the lease of the slow run has ended
			s.state(t, "charge", as, output)
			slow.open()
			wantNoAnswer(t, <-one)
			s.wantPaid(t, s.resume(t), 900)
		})
	}
}

// A stated result that grows beyond the limit when it is encoded again is refused while it can still
// be replaced.
func TestStatementThatCannotBeRecordedCanBeReplaced(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.does(loses)
	s.wantOpen(t, s.request())
	s.state(t, "charge", operator.SettleDone, fmt.Appendf(nil, `{"ID":"%s","Amount":900}`, strings.Repeat("<", effect.OutputBytesMax/2)))
	s.wantParked(t, s.resume(t), "over 65536 bytes")
	s.wantUnsent(t)
	s.state(t, "charge", operator.SettleDone, []byte(`{"ID":"ch_1","Amount":900}`))
	s.wantPaid(t, s.resume(t), 900)
}
