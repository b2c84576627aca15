package effect_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/storage/encrypted"
)

// list returns the processor's charges, as its list would.
func (p *processor) list() iter.Seq2[effect.Item[charge], error] {
	return func(yield func(effect.Item[charge], error) bool) {
		p.mu.Lock()
		defer p.mu.Unlock()
		for key, amount := range p.charges {
			if !yield(effect.Item[charge]{Key: key, Out: charge{Amount: amount}}, nil) {
				return
			}
		}
	}
}

func window() effect.ReconcileOptions[charge] {
	return effect.ReconcileOptions[charge]{
		From: time.Now().Add(-time.Hour), To: time.Now().Add(time.Hour),
		Same: func(ours, theirs charge) bool { return ours.Amount == theirs.Amount },
	}
}

// reconcile returns the findings as "kind key".
func (s *shop) reconcile(t *testing.T, store idempotency.EffectReader, o effect.ReconcileOptions[charge]) (effect.Report, []string) {
	t.Helper()
	var findings []string
	report, err := s.charge.Reconcile(t.Context(), store, s.list(), o, func(f effect.Finding[charge]) error {
		key := "theirs"
		if f.Ours != nil {
			key = f.Ours.Key.Value
		}
		findings = append(findings, string(f.Kind)+" "+key)
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	slices.Sort(findings)
	return report, findings
}

// pay makes a request with this key.
func (s *shop) pay(key string) idempotency.Result {
	s.key = idempotency.Key{Scope: "acme", Value: key}
	return s.request()
}

// Each difference between the two lists is found. One is a charge whose intent the database has
// lost, because it was restored to an earlier time, or promoted without its last commits.
func TestReconcileFindsEveryDifference(t *testing.T) {
	t.Parallel()
	s := newShop(t, func(_ *processor, e *effect.Effect[card, charge]) { e.KeepsDeclines = true })
	s.pay("good")
	s.pay("other-amount")
	s.Exec(t, `UPDATE idempotency_effects SET output = '{"ID":"ch","Amount":901}' WHERE key = 'other-amount'`)
	s.pay("not-theirs")
	theirs := s.Text(t, "SELECT derived_key::text FROM idempotency_effects WHERE key = 'not-theirs'")
	s.mu.Lock()
	delete(s.charges, theirs)
	s.mu.Unlock()
	s.pay("told-no")
	s.Exec(t, "UPDATE idempotency_effects SET state = 3, output = '' WHERE key = 'told-no'")
	s.does(loses)
	s.pay("open")
	s.does(loses)
	s.pay("open-and-lost") // its reply, and later its intent
	s.pay("recorded-and-lost")
	s.does(refuses)
	s.pay("declined")
	s.Exec(t, "DELETE FROM idempotency_open WHERE key = 'open-and-lost'")
	s.Exec(t, "DELETE FROM idempotency_keys WHERE key IN ('open-and-lost', 'recorded-and-lost')")
	s.mu.Lock()
	s.charges["made-by-hand"] = 5
	s.mu.Unlock()

	want := []string{"declined told-no", "differs other-amount", "missing not-theirs", "unknown theirs", "unknown theirs"}
	report, findings := s.reconcile(t, s.Store, window())
	if !slices.Equal(findings, want) {
		t.Errorf("findings %q, want %q", findings, want)
	}
	if want := (effect.Report{Listed: 7, Foreign: 1, Matched: 1, Open: 1, Findings: 5}); report != want {
		t.Errorf("%+v, want %+v", report, want)
	}

	o := window()
	o.Same = nil
	if _, findings := s.reconcile(t, s.Store, o); slices.Contains(findings, "differs other-amount") {
		t.Errorf("compared without Same: %q", findings)
	}
	o.From, o.To = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	if _, findings := s.reconcile(t, s.Store, o); slices.Contains(findings, "missing not-theirs") {
		t.Errorf("an effect outside of the window: %q", findings)
	}
}

// The comparison goes on across batches, in both directions.
func TestReconcileComparesInBatches(t *testing.T) {
	t.Parallel()
	const n = 2*effect.ReconcileBatch + 1
	s := newShop(t, nil)
	s.Exec(t, `INSERT INTO idempotency_keys (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
		SELECT now(), now() + interval '1 day', 201, 1, gen_random_uuid(), 'acme', 'k' || i, sha256(''), '\x0100', '' FROM generate_series(1, $1::int) AS i`, n)
	s.Exec(t, `INSERT INTO idempotency_effects (sent_first_at, epoch, tries, panics, state, kind, derived_key, scope, key, name, input, output)
		SELECT now(), 1, 1, 0, 2, 1, gen_random_uuid(), 'acme', 'k' || i, 'charge', '{}', '{"ID":"ch","Amount":900}' FROM generate_series(1, $1::int) AS i`, n)
	for _, key := range s.Strings(t, "SELECT upper(derived_key::text) FROM idempotency_effects") { // spelt otherwise
		s.charges[key] = 900
	}
	batches := 0
	o := window()
	o.Progress = func(effect.Report) { batches++ }
	report, findings := s.reconcile(t, s.Store, o)
	if want := (effect.Report{Listed: n, Matched: n}); report != want || len(findings) > 0 || batches != 6 {
		t.Errorf("%+v, %d findings, %d batches", report, len(findings), batches)
	}
	clear(s.charges)
	if report, findings = s.reconcile(t, s.Store, window()); report.Findings != n || len(findings) != n {
		t.Errorf("%+v, %d findings", report, len(findings))
	}
}

func TestReconcileOfAnEncryptedStore(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	store := encrypted.New(s.Store, encrypted.Keys{Current: encrypted.Key{ID: 1, Secret: [encrypted.SecretBytes]byte{1}}})
	s.serve(store, idempotency.Timeouts{})
	s.pay("good")
	if report, findings := s.reconcile(t, store, window()); report.Matched != 1 || len(findings) > 0 {
		t.Errorf("%+v, %q", report, findings)
	}
	other := encrypted.New(s.Store, encrypted.Keys{Current: encrypted.Key{ID: 2, Secret: [encrypted.SecretBytes]byte{2}}})
	if _, err := s.charge.Reconcile(t.Context(), other, s.list(), window(), nil); err == nil || !strings.Contains(err.Error(), "Keys.Older") {
		t.Errorf("without the key: %v", err)
	}
}

func TestReconcileReportsWhyItStopped(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.pay("good")
	clear(s.charges)
	broken := errors.New("the list broke off")
	for name, test := range map[string]struct {
		ctx  func() context.Context
		list iter.Seq2[effect.Item[charge], error]
		o    effect.ReconcileOptions[charge]
		want string
	}{
		"the list":      {t.Context, func(yield func(effect.Item[charge], error) bool) { yield(effect.Item[charge]{}, broken) }, window(), broken.Error()},
		"found":         {t.Context, s.list(), window(), "stop"},
		"no window":     {t.Context, s.list(), effect.ReconcileOptions[charge]{}, "From and To are required"},
		"an empty one":  {t.Context, s.list(), effect.ReconcileOptions[charge]{From: time.Unix(1, 0), To: time.Unix(1, 0)}, "From and To are required"},
		"its own limit": {func() context.Context { ctx, cancel := context.WithCancel(t.Context()); cancel(); return ctx }, s.list(), window(), "canceled"},
	} {
		_, err := s.charge.Reconcile(test.ctx(), s.Store, test.list, test.o, func(effect.Finding[charge]) error { return errors.New("stop") })
		if err == nil || !strings.Contains(fmt.Sprint(err), test.want) {
			t.Errorf("%s: %v, want %q", name, err, test.want)
		}
	}
}

// The other service has forgotten the key, and so it did a repeated call once more: its list has two
// items with one key. The second one is found, however it is spelt, and whatever the state of our
// effect.
func TestReconcileFindsWhatWasDoneTwice(t *testing.T) {
	t.Parallel()
	s := newShop(t, nil)
	s.pay("good")
	s.pay("paid-twice")
	twice := s.Text(t, "SELECT derived_key::text FROM idempotency_effects WHERE key = 'paid-twice'")
	s.does(loses)
	s.pay("open")
	open := s.Text(t, "SELECT derived_key::text FROM idempotency_effects WHERE key = 'open'")
	list := func(yield func(effect.Item[charge], error) bool) {
		for item := range s.list() {
			if !yield(item, nil) {
				return
			}
		}
		_ = yield(effect.Item[charge]{Key: strings.ToUpper(twice), Out: charge{Amount: 900}}, nil) &&
			yield(effect.Item[charge]{Key: open, Out: charge{Amount: 900}}, nil)
	}
	var findings []string
	report, err := s.charge.Reconcile(t.Context(), s.Store, list, window(), func(f effect.Finding[charge]) error {
		findings = append(findings, string(f.Kind)+" "+f.Ours.Key.Value+" "+strings.ToLower(f.Theirs.Key))
		return nil
	})
	if want := []string{"twice paid-twice " + twice, "twice open " + open}; err != nil || !slices.Equal(findings, want) {
		t.Errorf("findings %q, want %q: %v", findings, want, err)
	}
	if want := (effect.Report{Listed: 5, Matched: 2, Open: 1, Findings: 2}); report != want {
		t.Errorf("%+v, want %+v", report, want)
	}
}
