package live

import (
	"net/url"
	"reflect"
	"strconv"
	"strings"
	"testing"
)

func form(change ...string) url.Values {
	f := url.Values{"mode": {"both"}, "keys": {"10"}, "copies": {"1"}, "clients": {"2"}, "share": {"30"}, "fault": {"slow", "killed"}}
	for i := 0; i < len(change); i += 2 {
		f[change[i]] = strings.Fields(change[i+1])
	}
	return f
}

// TestLimitsOfAStorm: on both sides of each.
func TestLimitsOfAStorm(t *testing.T) {
	t.Parallel()
	plan, err := parsePlan(form())
	if want := (Plan{ModeBoth, 10, 1, 2, 30, []Fault{FaultSlow, FaultKilled}}); err != nil || !reflect.DeepEqual(plan, want) {
		t.Errorf("the plan is %+v, %v", plan, err)
	}
	for name, limit := range map[string][2]int{"keys": {1, KeysMax}, "copies": {1, CopiesMax}, "clients": {1, ClientsMax}, "share": {0, SharePercentMax}} {
		for _, value := range limit {
			if _, err := parsePlan(form(name, strconv.Itoa(value))); err != nil {
				t.Errorf("%s %d: %v", name, value, err)
			}
		}
		for _, value := range []string{strconv.Itoa(limit[0] - 1), strconv.Itoa(limit[1] + 1), "", "1.5", "1e1", "x", "99999999999999999999", "1 2"} {
			if _, err := parsePlan(form(name, value)); err == nil {
				t.Errorf("%s %q is taken", name, value)
			}
		}
	}
	for name, value := range map[string]string{"mode": "none", "fault": "slow earthquake", "unknown": "1"} {
		if _, err := parsePlan(form(name, value)); err == nil {
			t.Errorf("%s %q is taken", name, value)
		}
	}
	if plan, err := parsePlan(form("fault", "slow slow slow")); err != nil || len(plan.Faults) != 1 {
		t.Errorf("a fault that is named again: %+v, %v", plan, err)
	}
}
