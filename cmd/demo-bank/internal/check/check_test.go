package check

import (
	"slices"
	"testing"
)

func TestVerdictNeedsEveryCheck(t *testing.T) {
	t.Parallel()
	var all []Result
	for _, name := range Names() {
		all = append(all, result(name))
	}
	if v := Judge(all...); !v.OK || len(v.Checks) != len(Names()) || len(v.Missing) != 0 {
		t.Errorf("all checks without a wrong make %+v", v)
	}
	for i, name := range Names() {
		if v := Judge(slices.Concat(all[:i], all[i+1:])...); v.OK || !slices.Equal(v.Missing, []string{name}) {
			t.Errorf("without %s the verdict is %t, missing %q", name, v.OK, v.Missing)
		}
		broken := result(name)
		broken.Seen = 3
		for n := range 4 {
			broken.add("wrong %d", n)
		}
		// Once more under the same name, as from the history and from the books.
		v := Judge(slices.Concat(all, []Result{broken, broken})...)
		if got := v.Checks[i]; v.OK || got.Count != 8 || got.Seen != 6 || len(got.Examples) != ExamplesMax {
			t.Errorf("a wrong of %s makes %t, %+v", name, v.OK, got)
		}
	}
}
