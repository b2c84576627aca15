package admin

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// figuresAgeMax is the maximum age of the figures on a page. Any number of readers cause at most
// one query in that time.
const figuresAgeMax = 2 * time.Second

// figures keeps the newest figures. The zero value has none. It is safe for concurrent use.
type figures struct {
	mu     sync.Mutex
	newest *figuresAnswer
}

// figuresAnswer is the answer of one query; done is closed when it is there.
type figuresAnswer struct {
	done  chan struct{}
	stats operator.Stats
	err   error
	at    time.Time
}

func (a *figuresAnswer) old() bool {
	select {
	case <-a.done:
		return time.Since(a.at) >= figuresAgeMax
	default:
		return false // under way
	}
}

// get returns the newest figures. Concurrent callers share one query and its answer, even if it
// failed.
func (f *figures) get(ctx context.Context, o *operator.Operator) (operator.Stats, error) {
	f.mu.Lock()
	answer := f.newest
	if answer == nil || answer.old() {
		answer = &figuresAnswer{done: make(chan struct{}), err: errFigures}
		f.newest = answer
		f.mu.Unlock()
		defer close(answer.done)
		// The operator bounds the call. Other readers wait for its answer, so this reader's context
		// must not end it.
		answer.stats, answer.err = o.Stats(context.WithoutCancel(ctx))
		answer.at = time.Now()
		return answer.stats, answer.err
	}
	f.mu.Unlock()
	select {
	case <-answer.done:
		return answer.stats, answer.err
	case <-ctx.Done():
		return operator.Stats{}, ctx.Err()
	}
}

// errFigures remains if the query panicked.
var errFigures = errors.New("figures could not be had")

// stats shows the figures of the whole table.
func (h *Handler) stats(p *page) error {
	stats, err := h.figures.get(p.ctx(), h.operator)
	if err != nil {
		return err
	}
	return h.render(p, "stats", "Figures", stats)
}

// liveFigures is the answer of live: the figures as pages show them, so that one place formats
// them.
type liveFigures struct {
	Live    string `json:"live"`
	Running string `json:"running"`
	Expired string `json:"expired"`
	Size    string `json:"size"`
	At      string `json:"at"`
}

// live answers with the figures, which pages refresh.
func (h *Handler) live(p *page) error {
	stats, err := h.figures.get(p.ctx(), h.operator)
	if err != nil {
		return err
	}
	text, err := json.Marshal(liveFigures{
		Live: formatCount(stats.Live), Running: formatNumber(int64(stats.InFlight)), Expired: formatCount(stats.Expired),
		Size: formatBytes(stats.TableBytes + stats.IndexBytes + stats.ToastBytes), At: formatClock(stats.Now),
	})
	if err != nil {
		return err
	}
	p.w.Header().Set("Content-Type", "application/json")
	_, _ = p.w.Write(text) // the browser may be gone
	return nil
}

// doctorPage is the data of doctor.html.
type doctorPage struct {
	Troubles, Fine []operator.Finding
	Took           time.Duration
}

// doctor shows the findings about the database, the worst first.
func (h *Handler) doctor(p *page) error {
	started := time.Now()
	var view doctorPage
	for _, finding := range h.operator.Doctor(p.ctx()) {
		if finding.Level == operator.LevelOK {
			view.Fine = append(view.Fine, finding)
		} else {
			view.Troubles = append(view.Troubles, finding)
		}
	}
	slices.SortStableFunc(view.Troubles, func(a, b operator.Finding) int { return cmp.Compare(severity(b), severity(a)) })
	view.Took = time.Since(started)
	return h.render(p, "doctor", "Doctor", view)
}

func severity(f operator.Finding) int {
	if f.Level == operator.LevelFail {
		return 1
	}
	return 0
}
