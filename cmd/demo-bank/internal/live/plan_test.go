package live

import (
	"fmt"
	"net/url"
	"os"
	"reflect"
	"regexp"
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

// TestLimitsOfAStorm checks both sides of each limit.
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

// TestTheFormHasTheLimits: the page's form has the bank's limits, faults and modes.
func TestTheFormHasTheLimits(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("assets/page.html")
	if err != nil {
		t.Fatal(err)
	}
	for name, limit := range map[string][2]int{"keys": {1, KeysMax}, "copies": {1, CopiesMax}, "clients": {1, ClientsMax}, "share": {0, SharePercentMax}} {
		input := regexp.MustCompile(`<input name="` + name + `"[^>]*>`).FindString(string(page))
		if want := fmt.Sprintf(`min="%d" max="%d"`, limit[0], limit[1]); !strings.Contains(input, want) {
			t.Errorf("the field %s is %q, want %s", name, input, want)
		}
	}
	var faults, modes []string
	for _, found := range regexp.MustCompile(`name="fault" value="([^"]*)"`).FindAllStringSubmatch(string(page), -1) {
		faults = append(faults, found[1])
	}
	for _, found := range regexp.MustCompile(`<option value="([^"]*)"`).FindAllStringSubmatch(string(page), -1) {
		modes = append(modes, found[1])
	}
	if len(faults) != len(Faults()) {
		t.Errorf("the form has %d faults, want %d", len(faults), len(Faults()))
	}
	if len(modes) != 3 {
		t.Errorf("the form has the modes %q", modes)
	}
	for _, mode := range modes {
		if _, err := parsePlan(form("mode", mode, "fault", strings.Join(faults, " "))); err != nil {
			t.Errorf("mode %s with all of the form's faults: %v", mode, err)
		}
	}
}
