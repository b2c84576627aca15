package chaos

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/check"
)

// TestGivesUpOnlyWhereAllWasNotExecuted: a client may give up a key if every request that was ever
// sent for it was answered, each with not-executed. After that no client sends it.
func TestGivesUpOnlyWhereAllWasNotExecuted(t *testing.T) {
	t.Parallel()
	for name, one := range map[string]struct {
		results []result
		may     bool
	}{
		"not-executed":                {[]result{resultNotExecuted}, true},
		"twice":                       {[]result{resultNotExecuted, resultNotExecuted}, true},
		"no bank, then not-executed":  {[]result{resultUnsent, resultNotExecuted}, true},
		"a lost reply before":         {[]result{resultLost, resultNotExecuted}, false},
		"a lost reply between":        {[]result{resultNotExecuted, resultLost, resultNotExecuted}, false},
		"unknown or in progress":      {[]result{resultAgain, resultNotExecuted}, false},
		"answered":                    {[]result{resultAnswered, resultNotExecuted}, false},
		"another body was a mismatch": {[]result{resultMismatch, resultNotExecuted}, false},
	} {
		k := &key{}
		for _, what := range one.results {
			if !k.begin() {
				t.Fatalf("%s: it can't be sent", name)
			}
			k.end(what)
		}
		if got := k.giveUp(); got != one.may || k.abandoned() != one.may {
			t.Errorf("%s: it may be given up: %t", name, got)
		}
		if k.begin() == one.may {
			t.Errorf("%s: it is sent: %t", name, one.may)
		}
	}
	k := &key{}
	k.begin()
	k.begin()
	k.end(resultNotExecuted)
	if k.giveUp() {
		t.Error("it was given up while a copy was on its way")
	}
	k.end(resultNotExecuted)
	if !k.open() || !k.giveUp() || k.open() {
		t.Error("it could not be given up when the copy was back")
	}
}

// TestKeysAreTheSeeds: the seed chooses the request, the tenant and the number of copies; only the
// text is new.
func TestKeysAreTheSeeds(t *testing.T) {
	t.Parallel()
	shares := profiles["smoke"].shares
	one, again, other := newRing(5, shares, "aaaaaaaa"), newRing(5, shares, "bbbbbbbb"), newRing(6, shares, "aaaaaaaa")
	differ, twins := 0, 0
	asks := make(map[asked]int)
	seen := make(map[check.Key]bool)
	for i := range 4000 {
		a, b, c := one.next(), again.next(), other.next()
		asks[a.asks]++
		if string(a.body(false)) != string(bytes.ReplaceAll(b.body(false), []byte("bbbbbbbb"), []byte("aaaaaaaa"))) ||
			a.path() != b.path() || a.tenant != b.tenant || a.together != b.together || a.changed != b.changed {
			t.Fatalf("key %d is not the seed's choice", i)
		}
		if string(a.body(false)) == string(a.body(true)) {
			t.Fatalf("key %d: its changed body is its own", i)
		}
		if string(a.body(false)) != string(c.body(false)) {
			differ++
		}
		name := check.Key{Scope: tenants[a.tenant].scope, Key: a.text}
		if seen[name] {
			t.Fatalf("key %d is there twice", i)
		}
		seen[name] = true
		if a.named() != i {
			twins++
		}
		// As the bank sends it to PostgreSQL: somewhere among other bytes.
		found := one.find(fmt.Appendf(nil, "\x00\x00\x00\x1a%s\x00\x00\x00\x04", a.text))
		if found == nil || found.text != a.text {
			t.Fatalf("key %d is not found in a message", i)
		}
		one.markExempt(found)
		if !a.exempt {
			t.Fatalf("key %d is not exempt after a fault hit its COMMIT", i)
		}
	}
	if differ < 3900 || twins == 0 || len(asks) != 5 {
		t.Errorf("%d keys differ from another seed's, %d are of two tenants, asked is %v", differ, twins, asks)
	}
	for _, messages := range []string{"", "nothing", "chaos-aaaaaaaa-", "chaos-aaaaaaaa-0000", "chaos-aaaaaaaa-xxxxxxxx", "chaos-aaaaaaaa-99999999", "chaos-cccccccc-00000001"} {
		if one.find([]byte(messages)) != nil {
			t.Errorf("there is a key in %q", messages)
		}
	}
}

// TestAPlantedAnswerMustNotComeBack: to the history, a replay of the expired record is a request
// that took no effect. After a fresh answer it is a finding.
func TestAPlantedAnswerMustNotComeBack(t *testing.T) {
	t.Parallel()
	k := &key{text: "chaos-x-00000000", asks: askReused}
	other := &key{text: "chaos-x-00000001"}
	op := func(k *key, sent, returned time.Duration, outcome string, answer [32]byte) check.Operation {
		return check.Operation{Scope: "public", Key: k.text, Sent: sent, Returned: returned, Outcome: outcome, Answer: answer}
	}
	fresh := [32]byte{1}
	for name, one := range map[string]struct {
		ops          []check.Operation
		cured, wrong int
	}{
		"planted, then fresh": {[]check.Operation{op(k, 1, 2, "replayed", plantedAnswer), op(k, 3, 0, "", [32]byte{}), op(k, 4, 5, "executed", fresh), op(k, 6, 7, "replayed", fresh)}, 1, 0},
		"at the same time":    {[]check.Operation{op(k, 1, 9, "replayed", plantedAnswer), op(k, 2, 5, "executed", fresh)}, 1, 0},
		"it came back":        {[]check.Operation{op(k, 4, 5, "executed", fresh), op(k, 6, 7, "replayed", plantedAnswer)}, 1, 1},
		"another key's":       {[]check.Operation{op(other, 1, 2, "replayed", plantedAnswer)}, 0, 0},
	} {
		r := &run{keys: &ring{keys: []*key{k, other}}}
		ops, cured := r.withoutPlanted(one.ops), 0
		for _, op := range ops {
			if op.Outcome == "not-executed" && op.Answer == [32]byte{} {
				cured++
			}
		}
		if len(ops) != len(one.ops) || cured != one.cured || r.findings.count != one.wrong || r.tally.plantedReplays != int64(one.cured) {
			t.Errorf("%s: of %d operations %d took no effect, %d wrong; want %d and %d", name, len(ops), cured, r.findings.count, one.cured, one.wrong)
		}
	}
}
