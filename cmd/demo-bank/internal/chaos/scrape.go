package chaos

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	scrapeInterval = 250 * time.Millisecond
	scrapeTimeout  = 2 * time.Second
)

// scraped holds the metrics of a bank that the run uses: values by name, including labels.
type scraped map[string]float64

// The names of the bank's metrics. Prometheus writes labels in the order of their names.
const (
	metricGoroutines      = "go_goroutines"
	metricFileDescriptors = "process_open_fds"
	metricConnections     = "idempotency_pool_connections"
	metricStepFailures    = "idempotency_step_failures_total"
	metricSteps           = "idempotency_step_duration_seconds_count"
	metricReaped          = "idempotency_records_deleted_total"
)

// parseMetrics reads the metrics that the run uses from Prometheus' text.
func parseMetrics(r io.Reader) (scraped, error) {
	values := make(scraped)
	for text := bufio.NewScanner(r); ; {
		if !text.Scan() {
			return values, text.Err()
		}
		name, value, found := strings.Cut(text.Text(), " ")
		bare, _, _ := strings.Cut(name, "{")
		switch bare {
		case metricGoroutines, metricFileDescriptors, metricConnections, metricStepFailures, metricSteps, metricReaped:
		default:
			continue
		}
		number, err := strconv.ParseFloat(value, 64)
		if !found || err != nil {
			return nil, fmt.Errorf("metric %s has no value", name)
		}
		values[name] = number
	}
}

// scrapes sums the metrics of a slot's lives. The last scrape of a life is a moment old when the
// life ends. It is safe for concurrent use.
type scrapes struct {
	mu   sync.Mutex
	past scraped // of the lives that have ended
	last scraped // of the current life
}

func (s *scrapes) note(values scraped) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.last = values
}

// endLife adds the current life's values to those of the past.
func (s *scrapes) endLife() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.past == nil {
		s.past = make(scraped)
	}
	for name, value := range s.last {
		s.past[name] += value
	}
	s.last = nil
}

// sum adds up the values of all lives of the metric with this name and these labels.
func (s *scrapes) sum(name string, labels ...string) (total float64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, values := range []scraped{s.past, s.last} {
	next:
		for full, value := range values {
			bare, rest, _ := strings.Cut(full, "{")
			if bare != name {
				continue
			}
			for _, label := range labels {
				if !strings.Contains(rest, label) {
					continue next
				}
			}
			total += value
		}
	}
	return total
}

// label formats a label as Prometheus does.
func label(name, value string) string { return name + `="` + value + `"` }

var errNoLife = errors.New("the bank is between two lives")

// scrape gets a bank's metrics. If the life ends meanwhile, they are not counted.
func (s *slot) scrape(ctx context.Context, client *http.Client) (scraped, error) {
	l := s.current()
	if l == nil {
		return nil, errNoLife
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+s.address+"/metrics", nil)
	if err != nil {
		return nil, err
	}
	response, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	// The body was read to its end, or is of no use.
	defer func() { _ = response.Body.Close() }()
	values, err := parseMetrics(response.Body)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.life == l {
		s.scrapes.note(values)
	}
	return values, nil
}

// newScraper returns a client that keeps no conn, so that it does not show in the bank's resources.
func newScraper() *http.Client {
	return &http.Client{Timeout: scrapeTimeout, Transport: &http.Transport{DisableKeepAlives: true}}
}

// sum adds up a metric of all banks' lives.
func (b *banks) sum(name string, labels ...string) int64 {
	var total float64
	for _, s := range b.slots {
		total += s.scrapes.sum(name, labels...)
	}
	return int64(total)
}
