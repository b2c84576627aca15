package bench

import (
	"slices"
	"testing"
)

func TestSpread(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		values []float64
		want   Spread
	}{
		{[]float64{7}, Spread{7, 7, 7}},
		{[]float64{3, 1}, Spread{1.5, 2, 2.5}},
		{[]float64{5, 1, 4, 2, 3}, Spread{2, 3, 4}},
		{[]float64{4, 1, 3, 2}, Spread{1.75, 2.5, 3.25}},
		{[]float64{1, 1, 1, 100}, Spread{1, 1, 25.75}},
	} {
		before := slices.Clone(test.values)
		if got := spreadOf(test.values); got != test.want {
			t.Errorf("the spread of %v is %v, want %v", test.values, got, test.want)
		}
		if !slices.Equal(before, test.values) {
			t.Errorf("%v was sorted in place", before)
		}
	}
}

// TestRatiosArePaired: round by round, so that a round on a slow machine counts like any other.
func TestRatiosArePaired(t *testing.T) {
	t.Parallel()
	own, base := []float64{50, 100, 10, 0, 4}, []float64{100, 200, 20, 5, 0}
	if got := ratiosOf(own, base); !slices.Equal(got, []float64{0.5, 0.5, 0.5}) {
		t.Errorf("the ratios are %v, want three of 0.5", got)
	}
	if got := ratiosOf(own[:1], base); len(got) != 1 {
		t.Errorf("there are %d ratios of one pair", len(got))
	}
}

func TestOverlap(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		a, b Spread
		want bool
	}{
		{Spread{1, 2, 3}, Spread{3, 4, 5}, true},
		{Spread{1, 2, 3}, Spread{3.1, 4, 5}, false},
		{Spread{1, 5, 9}, Spread{4, 5, 6}, true},
	} {
		if test.a.overlaps(test.b) != test.want || test.b.overlaps(test.a) != test.want {
			t.Errorf("%v and %v: want overlap %t", test.a, test.b, test.want)
		}
	}
}

// TestWhatIsHeldAgainstWhat: each design against its bases, a full table against the empty one.
func TestWhatIsHeldAgainstWhat(t *testing.T) {
	t.Parallel()
	entryOf := func(name string, keys int64, perSecond ...float64) *entry {
		e := &entry{design: designOf(name), keys: keys}
		for _, value := range perSecond {
			e.samples = append(e.samples, Sample{PerSecond: value, cpuUS: 100 / value, histogram: emptyLatency()})
		}
		return e
	}
	pairs := func(b *Block) (names []string) {
		for _, r := range b.Ratios {
			names = append(names, rowName(r.Design, r.Keys, b)+" / "+rowName(r.Base, r.BaseKeys, b))
		}
		return names
	}
	main := &Block{Part: PartDesigns}
	main.sum([]*entry{
		entryOf("bare-batch", 0, 10, 20, 40), entryOf("ours-batch", 0, 9, 16, 20), entryOf("lease", 0, 3, 8, 40), entryOf("get-by-id", 0, 1, 1, 1), entryOf("replay-database", 0, 3, 3, 3),
	}, true)
	if got, want := pairs(main), []string{"ours-batch / bare-batch", "ours-batch / lease", "lease / bare-batch", "replay-database / get-by-id"}; !slices.Equal(got, want) {
		t.Errorf("held against each other: %v, want %v", got, want)
	}
	if got, want := main.Ratios[0].Throughput, (Spread{0.65, 0.8, 0.8500000000000001}); got != want {
		t.Errorf("ours-batch / bare-batch is %v, want %v", got, want)
	}
	if got := main.Ratios[0].CPU.Median; got != 1.25 {
		t.Errorf("and in CPU %v, want 1.25", got)
	}
	keys := &Block{Part: PartKeys, Keys: 7}
	keys.sum([]*entry{
		entryOf("ours-batch", 0, 9, 10, 11), entryOf("replay-database", 0, 9, 10, 11), entryOf("ours-batch", 7, 10, 11, 12), entryOf("replay-database", 7, 1, 2, 3), entryOf(replayOld, 7, 9, 10, 11),
	}, true)
	if got, want := pairs(keys), []string{"ours-batch, full / ours-batch, empty", "replay-database, full / replay-database, empty", "replay-old, full / replay-database, empty"}; !slices.Equal(got, want) {
		t.Errorf("held against each other: %v, want %v", got, want)
	}
	for i, want := range []bool{true, false, true} {
		if keys.Ratios[i].Overlap != want {
			t.Errorf("%s: overlap is %t", keys.Ratios[i].Design, !want)
		}
	}
}
