package promobserve_test

import (
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/paidonce/idempotency/internal/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// scrape returns the text of a scrape by Prometheus.
func scrape(t testing.TB, registry *prometheus.Registry) string {
	t.Helper()
	w := httptest.NewRecorder()
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{ErrorHandling: promhttp.HTTPErrorOnError}).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	text, err := io.ReadAll(w.Result().Body)
	if err != nil || w.Code != http.StatusOK {
		t.Fatalf("scrape: %d, %v: %s", w.Code, err, text)
	}
	return string(text)
}

// wantLines requires each line in a scrape.
func wantLines(t testing.TB, text string, lines ...string) {
	t.Helper()
	for _, line := range lines {
		name, _, _ := strings.Cut(line, " ")
		if !strings.Contains("\n"+text, "\n"+line+"\n") {
			t.Errorf("the scrape has no %s, but %q", line, regexp.MustCompile(`(?m)^`+regexp.QuoteMeta(name)+` .*$`).FindString(text))
		}
	}
}
