package rulestest

import (
	"encoding/json"
	"errors"
	"math"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/prometheus/promql/parser"

	"github.com/paidonce/idempotency/observe/internal/fixture"
)

// dashboard has the parts of a Grafana dashboard that the tests read.
type dashboard struct {
	Panels []struct {
		ID          int
		Type        string
		Title       string
		Description string
		GridPos     struct{ H, W, X, Y int }
		FieldConfig struct{ Defaults struct{ Unit string } }
		Targets     []struct{ Expr, LegendFormat string }
	}
	Templating struct {
		List []struct {
			Name  string
			Query json.RawMessage
		}
	}
}

func readDashboard(t *testing.T) dashboard {
	t.Helper()
	file, err := os.ReadFile("../dashboard.json")
	if err != nil {
		t.Fatal(err)
	}
	var d dashboard
	if err := json.Unmarshal(file, &d); err != nil {
		t.Fatal(err)
	}
	return d
}

// filledIn returns an expression as Grafana sends it: with the values of its variables.
func filledIn(expression string) string {
	return strings.NewReplacer("$__rate_interval", "2m", "$job", ".+").Replace(expression)
}

var legendLabel = regexp.MustCompile(`\{\{(\w+)\}\}`)

// When every event happens, each query of the dashboard returns data, with the labels that its
// legend names.
func TestEveryQueryOfTheDashboardReturnsData(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 10*time.Second, patience)
	for n := range 12 {
		w.tick(func() {
			w.usual(n)
			w.Conflict(1)
			w.Mismatch()
			w.LoseKey()
			w.Fail()
			w.Refuse()
			w.LoseReply()
			w.Age(time.Second)
			w.Park()
			if n%2 == 0 {
				w.Complete(min(n+1, 2))
			}
			w.LoseCommit(true)
			w.LoseCommit(false)
			w.consume(errors.New(fixture.Canary))
			if n == 0 {
				w.exec(outboxRow + "now() - interval '1 minute', NULL)")
				w.exec(outboxRow + "now(), 'too large')")
				w.exec(parkedRow + "now() - interval '1 minute', now() - interval '1 minute', 1)")
				w.exec(parkedRow + "now(), NULL, 2)")
				w.exec(parkedRow + "now() - interval '1 minute', NULL, 3)")
				w.exec(offsetsRow + "now() - interval '1 minute', 1)")
			}
			w.tracer.OnWalk(1, time.Second, errors.New(fixture.Canary))
			w.unread = nil
			switch n % 4 {
			case 1:
				w.LoseDatabase()
			case 2:
				w.Unavailable(1)
				w.GiveUp()
				w.unread = errors.New(fixture.Canary)
			case 3:
				w.Expire(time.Minute)
				w.Wait(func() bool {
					if !strings.Contains(w.text(), "\nidempotency_requests_waiting 1\n") {
						return false
					}
					w.scrapeNow()
					return true
				})
			}
		})
	}
	d := readDashboard(t)
	queries := 0
	for _, panel := range d.Panels {
		for _, target := range panel.Targets {
			queries++
			expression := filledIn(target.Expr)
			if _, err := parser.NewParser(parser.Options{}).ParseExpr(expression); err != nil {
				t.Errorf("%s: %v", panel.Title, err)
				continue
			}
			matrix, shown := w.query(expression), false
			for _, series := range matrix {
				for _, point := range series.Floats {
					shown = shown || point.F != 0 && !math.IsNaN(point.F) && !math.IsInf(point.F, 0)
				}
				for _, label := range legendLabel.FindAllStringSubmatch(target.LegendFormat, -1) {
					if !series.Metric.Has(label[1]) && label[1] != "reason" { // it may be empty
						t.Errorf("%s: the legend's %s is no label of %s", panel.Title, label[1], series.Metric)
					}
				}
			}
			// That one would need 16,384 requests.
			if !shown && !strings.Contains(target.Expr, "lost_keys_forgotten") {
				t.Errorf("%s shows nothing: %s", panel.Title, expression)
			}
			if len(matrix) == 0 {
				t.Errorf("%s has no series: %s", panel.Title, expression)
			}
		}
	}
	if queries < 30 {
		t.Errorf("the dashboard has %d queries", queries)
	}
}

// Panels have descriptions, do not overlap, and use only existing variables.
func TestDashboardIsWellFormed(t *testing.T) {
	t.Parallel()
	d := readDashboard(t)
	ids, taken := map[int]bool{}, map[[2]int]string{}
	for _, panel := range d.Panels {
		if ids[panel.ID] || panel.Title == "" {
			t.Errorf("panel %d, %q: its id is taken, or it has no title", panel.ID, panel.Title)
		}
		ids[panel.ID] = true
		if panel.Type != "row" && (panel.Description == "" || panel.FieldConfig.Defaults.Unit == "" || len(panel.Targets) == 0) {
			t.Errorf("%s has no description, unit or query", panel.Title)
		}
		for x := panel.GridPos.X; x < panel.GridPos.X+panel.GridPos.W; x++ {
			for y := panel.GridPos.Y; y < panel.GridPos.Y+panel.GridPos.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" || x >= 24 {
					t.Errorf("%s lies on %q, or outside", panel.Title, other)
				}
				taken[[2]int{x, y}] = panel.Title
			}
		}
		for _, target := range panel.Targets {
			if !strings.Contains(target.Expr, `job=~"$job"`) || target.LegendFormat == "" {
				t.Errorf("%s: %s does not look at the chosen job, or has no legend", panel.Title, target.Expr)
			}
		}
	}
	names := map[string]bool{}
	for _, variable := range d.Templating.List {
		names[variable.Name] = true
	}
	if !names["job"] || !names["datasource"] {
		t.Errorf("the variables are %v", names)
	}
}

// Every metric of the service is on the dashboard or in a rule: none is collected for nothing.
func TestEveryMetricIsLookedAt(t *testing.T) {
	t.Parallel()
	text := ""
	for _, name := range []string{"../dashboard.json", "../rules.yaml"} {
		file, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		text += string(file)
	}
	doc, err := os.ReadFile("../../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, row := range regexp.MustCompile("(?m)^\\| `(idempotency_\\w+)`").FindAllStringSubmatch(string(doc), -1) {
		if !strings.Contains(text, row[1]) {
			t.Errorf("%s is neither on the dashboard nor in a rule", row[1])
		}
	}
}
