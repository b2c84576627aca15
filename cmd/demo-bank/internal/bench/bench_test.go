package bench

import (
	"slices"
	"testing"
	"time"
)

// TestLimits: both sides of each limit.
func TestLimits(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct{ good, refused []Config }{
		"clients": {[]Config{{Clients: []int{1, ClientsMax}}}, []Config{{Clients: []int{0}}, {Clients: []int{ClientsMax + 1}}, {Clients: []int{2, 2}}}},
		"fsync":   {[]Config{{Fsync: []string{"off"}}, {Fsync: []string{"on", "off"}}}, []Config{{Fsync: []string{"yes"}}, {Fsync: []string{"on", "on"}}}},
		"keys":    {[]Config{{Keys: []int64{0, KeysMax}}}, []Config{{Keys: []int64{-1}}, {Keys: []int64{KeysMax + 1}}, {Keys: []int64{5, 5}}}},
		"delay": {
			[]Config{{Delays: []time.Duration{0, DelayMin, DelayMax}}},
			[]Config{{Delays: []time.Duration{DelayMin - 1}}, {Delays: []time.Duration{DelayMax + 1}}, {Delays: []time.Duration{-1}}},
		},
		"designs":      {[]Config{{Designs: Designs()}, {Designs: []string{"lease"}}}, []Config{{Designs: []string{"x"}}, {Designs: []string{replayOld}}, {Designs: []string{"lease", "lease"}}}},
		"parts":        {[]Config{{Parts: Parts()}}, []Config{{Parts: []string{"x"}}, {Parts: []string{PartWait, PartWait}}}},
		"rounds":       {[]Config{{Rounds: RoundsMin}, {Rounds: RoundsMax}}, []Config{{Rounds: RoundsMin - 1}, {Rounds: RoundsMax + 1}, {Rounds: -1}}},
		"slice":        {[]Config{{Slice: SliceMin}, {Slice: SliceMax}}, []Config{{Slice: SliceMin - 1}, {Slice: SliceMax + 1}}},
		"pool":         {[]Config{{PoolSize: 1}, {PoolSize: ClientsMax}}, []Config{{PoolSize: -1}, {PoolSize: ClientsMax + 1}}},
		"expired":      {[]Config{{Expired: 1}, {Expired: KeysMax}}, []Config{{Expired: -1}, {Expired: KeysMax + 1}}},
		"duration-max": {[]Config{{DurationMax: DurationMaxMin}, {DurationMax: DurationMaxMax}}, []Config{{DurationMax: DurationMaxMin - 1}, {DurationMax: DurationMaxMax + 1}}},
	} {
		for _, config := range test.good {
			if err := config.Validate(); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		for _, config := range test.refused {
			if config.Validate() == nil {
				t.Errorf("%s: %+v is taken", name, config)
			}
		}
	}
}

// TestQuickIsLess: less of everything, but explicit values stay.
func TestQuickIsLess(t *testing.T) {
	t.Parallel()
	normal, quick := (&Config{}).full(), (&Config{Quick: true, Rounds: 77, Keys: []int64{5}}).full()
	if quick.Rounds != 77 || !slices.Equal(quick.Keys, []int64{5}) {
		t.Errorf("--quick won over other flags: %+v", quick)
	}
	if quick = (&Config{Quick: true}).full(); len(quick.Clients) >= len(normal.Clients) || quick.Rounds >= normal.Rounds || quick.Slice >= normal.Slice ||
		quick.Expired >= normal.Expired || quick.DurationMax >= normal.DurationMax || slices.Max(quick.Keys) != 0 || slices.Max(quick.Delays) != 0 {
		t.Errorf("quick is %+v, normal %+v", quick, normal)
	}
	for _, config := range []Config{normal, quick} {
		if err := config.Validate(); err != nil {
			t.Error(err)
		}
	}
}
