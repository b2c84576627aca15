package chaos

import (
	"bytes"
	"cmp"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestSameSeedSameSchedule: only the seed decides a run's schedule, and another seed gives another.
func TestSameSeedSameSchedule(t *testing.T) {
	t.Parallel()
	print := func(config Config) string {
		var b bytes.Buffer
		if err := WriteSchedule(&b, config); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	for n, profile := range append(Profiles(), Profiles()...) {
		config := Config{Profile: profile, Seed: 7, Effects: n >= len(Profiles())}
		first := print(config)
		if stops := strings.Count(first, "  stop\n"); (stops > 0) != config.Effects {
			t.Errorf("%s: %d stops are printed", profile, stops)
		}
		if again := print(config); again != first {
			t.Errorf("%s: the same seed has two schedules", profile)
		}
		config.Clients, config.DurationMax, config.Keep = 3, time.Hour, true
		if again := print(config); again != first {
			t.Errorf("%s: the schedule depends on what it must not", profile)
		}
		config.Seed = 8
		if other := print(config); other == strings.Replace(first, "seed 7", "seed 8", 1) {
			t.Errorf("%s: another seed has the same schedule", profile)
		}
		full := config.full()
		p := full.profile()
		if a, b := newSchedule(p, 7, 2).hash(), newSchedule(p, 8, 2).hash(); a == b || a != newSchedule(p, 7, 2).hash() {
			t.Errorf("%s: the hash does not name the schedule", profile)
		}
		if a, b := newSchedule(p, 7, 2).hash(), newSchedule(p, 7, 1).hash(); a == b {
			t.Errorf("%s: the hash does not know the banks", profile)
		}
	}
	if err := WriteSchedule(&bytes.Buffer{}, Config{Profile: "none"}); err == nil {
		t.Error("a profile that does not exist has a schedule")
	}
}

// TestScheduleReachesEverything: every kind of fault of a profile is in its schedule, in order,
// within the run, and often enough for the profile's minimums.
func TestScheduleReachesEverything(t *testing.T) {
	t.Parallel()
	for n, name := range append(Profiles(), Profiles()...) {
		effects := n >= len(Profiles())
		for _, operations := range []int{OperationsMin, profiles[name].operations, 3 * profiles[name].operations} {
			for seed := range uint64(20) {
				p := (&Config{Profile: name, Operations: operations, Effects: effects}).profile()
				s := newSchedule(p, seed, 2)
				if stops := len(s.stops); (stops >= len(stopKinds)) != effects {
					t.Errorf("%s of %d: %d stops", name, operations, stops)
				}
				events := make(map[eventKind]int)
				points := make(map[string]int)
				banks := make(map[int]int)
				for _, e := range s.events {
					events[e.kind]++
					points[e.point]++
					banks[e.bank]++
					if e.due < 0 || e.due > int64(operations) || e.point != "" && e.nth < 1 {
						t.Fatalf("%s of %d: %+v", name, operations, e)
					}
				}
				commits := make(map[commitKind]int)
				for _, f := range s.commits {
					commits[f.kind]++
				}
				if !slices.IsSortedFunc(s.events, func(a, b event) int { return cmp.Compare(a.due, b.due) }) ||
					!slices.IsSortedFunc(s.commits, func(a, b commitFault) int { return cmp.Compare(a.commit, b.commit) }) {
					t.Errorf("%s of %d: the schedule is not in order", name, operations)
				}
				for kind := range p.events {
					if events[kind] == 0 {
						t.Errorf("%s of %d: there is no %s", name, operations, kind)
					}
				}
				for _, kind := range []eventKind{loseRequests, loseReplies, errorsAfter, errorsBefore, slowProcessor, lateProcessor, sameErrors,
					processorDown, forgetsKeys, forgetsNo, lookupLags, crashProcessor} {
					if (events[kind] > 0) != effects {
						t.Errorf("%s of %d: %d of %s", name, operations, events[kind], kind)
					}
				}
				for kind := range p.weights {
					if commits[kind] == 0 {
						t.Errorf("%s of %d: no COMMIT meets %s", name, operations, kind)
					}
				}
				for _, point := range p.points {
					if points[point] == 0 {
						t.Errorf("%s of %d: nobody dies at %s", name, operations, point)
					}
				}
				if len(banks) != 2 {
					t.Errorf("%s of %d: one bank is spared", name, operations)
				}
				crashes := events[crashPostmaster] + events[crashBackend] + events[crashCommitting]
				if kills := 2*events[killBank] + commits[killCommitting]; kills < p.killsMin || crashes < p.crashesMin || len(s.commits) < p.commitsMin {
					t.Errorf("%s of %d: %d kills, %d crashes, %d COMMITs are fewer than it promises", name, operations, kills, crashes, len(s.commits))
				}
			}
		}
	}
	if p := profiles["smoke"]; p.killsMin < 20 || p.crashesMin < 5 || p.commitsMin < 300 {
		t.Errorf("the smoke profile promises too little: %+v", p)
	}
	if p := profiles["release"]; p.killsMin < 200 || p.crashesMin < 100 || p.commitsMin < 10_000 || p.operations < 1_000_000 {
		t.Errorf("the release profile promises too little: %+v", p)
	}
}

func TestConfigIsChecked(t *testing.T) {
	t.Parallel()
	for name, edge := range map[string]struct {
		set       func(*Config, int)
		good, bad []int
	}{
		"operations": {func(c *Config, n int) { c.Operations = n }, []int{0, OperationsMin, OperationsMax}, []int{-1, OperationsMin - 1, OperationsMax + 1}},
		"clients":    {func(c *Config, n int) { c.Clients = n }, []int{0, 1, ClientsMax}, []int{-1, ClientsMax + 1}},
		"banks":      {func(c *Config, n int) { c.Banks = n }, []int{0, 1, BanksMax}, []int{-1, BanksMax + 1}},
		"duration":   {func(c *Config, n int) { c.DurationMax = time.Duration(n) }, []int{0, int(DurationMaxMin), int(DurationMaxMax)}, []int{-1, int(DurationMaxMin) - 1, int(DurationMaxMax) + 1}},
	} {
		for _, n := range edge.good {
			config := Config{}
			edge.set(&config, n)
			if err := config.Validate(); err != nil {
				t.Errorf("%s %d is refused: %v", name, n, err)
			}
		}
		for _, n := range edge.bad {
			config := Config{}
			edge.set(&config, n)
			if err := config.Validate(); err == nil {
				t.Errorf("%s %d is taken", name, n)
			}
		}
	}
	for _, profile := range append(slices.Collect(maps.Keys(profiles)), "") {
		if err := (&Config{Profile: profile}).Validate(); err != nil {
			t.Errorf("the profile %q is refused: %v", profile, err)
		}
	}
	if err := (&Config{Profile: "Smoke"}).Validate(); err == nil {
		t.Error("a profile that does not exist is taken")
	}
	if _, err := Run(t.Context(), Config{Clients: -1}); err == nil {
		t.Error("an impossible config runs")
	}
}
