package admin_test

import (
	"encoding/json"
	"fmt"
	"html"
	"net/http"
	"strings"
	"testing"

	"github.com/paidonce/idempotency/admin"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// The doctor's findings are shown with their remedies.
func TestDoctor(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.Exec(t, "ALTER TABLE idempotency_keys DROP CONSTRAINT idempotency_keys_pkey")
	page := b.as("alice", admin.PermissionView).page(t, "doctor")
	findings := operator.New(b.Store, nil).Doctor(t.Context())
	if len(findings) < len(operator.Checks()) {
		t.Fatalf("%d findings", len(findings))
	}
	broken := 0
	for _, finding := range findings {
		if !strings.Contains(page, finding.Check) || finding.Level == operator.LevelFail && !strings.Contains(page, html.EscapeString(finding.Remedy)) {
			t.Errorf("%v is not shown", finding)
		}
		if finding.Check == "index" && finding.Level == operator.LevelFail {
			broken++
		}
	}
	if broken == 0 || !strings.Contains(page, ">broken</span>") {
		t.Error("a table without its primary key is not broken")
	}
}

// The figures have the format of the page, and cause one query however many readers there are.
func TestLiveFigures(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.fill(t, 1234)
	c := b.as("alice", admin.PermissionView)
	response := c.get("live")
	body := text(t, response, http.StatusOK)
	var figures map[string]string
	if err := json.Unmarshal([]byte(body), &figures); err != nil || response.Header.Get("Content-Type") != "application/json" {
		t.Fatalf("%s: %v", body, err)
	}
	live := b.Strings(t, "SELECT to_char(count(*) FILTER (WHERE expires_at >= now()), 'FM9,999') FROM idempotency_keys")[0]
	if figures["live"] != live || figures["running"] != "0" || figures["expired"] == "0" {
		t.Errorf("the figures are %v, want %s live", figures, live)
	}
	page := c.page(t, "stats")
	for name, value := range figures {
		if !strings.Contains(page, fmt.Sprintf(`data-figure="%s">%s<`, name, value)) {
			t.Errorf("the page does not show %s as %s", name, value)
		}
	}
}
