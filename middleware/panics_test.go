package middleware_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

// trap panics in the hook that is armed, and remembers which hooks did.
type trap struct {
	waiting chan struct{} // gets a value for each request that begins to wait

	mu    sync.Mutex
	armed string
	fired map[string]bool
}

func (h *trap) arm(hook string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.armed = hook
}

func (h *trap) spring(hook string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.armed == hook {
		h.fired[hook] = true
		panic("hook " + hook)
	}
}

func (h *trap) TraceRequestStart(ctx context.Context, _ idempotency.RequestStart) context.Context {
	h.spring("start")
	return ctx
}
func (h *trap) TraceStep(_ context.Context, step idempotency.StepEnd)   { h.spring(string(step.Step)) }
func (h *trap) TraceRequestEnd(context.Context, idempotency.RequestEnd) { h.spring("end") }
func (h *trap) TraceRefused(context.Context, idempotency.Refused)       { h.spring("refused") }
func (h *trap) TraceWaitStart(context.Context) {
	h.waiting <- struct{}{}
	h.spring("wait start")
}

// Each of a service's hooks panics, once before and once after the key has its record: no
// connection, no place in flight and no key stays taken, and nothing is paid twice.
func TestPanicInAHookLeavesNothingBehind(t *testing.T) {
	t.Parallel()
	hooks := []string{
		"route", "trace id", "fingerprint", "start", "claim", "router state", "restore", "handler", "disposition", "reduce",
		"commit", "decline", "rollback", "end", "refused", "authorize", "wait start", "wait",
	}
	for _, wait := range []time.Duration{0, 20 * time.Second} {
		t.Run(fmt.Sprint("wait ", wait), func(t *testing.T) {
			t.Parallel()
			h := &trap{fired: map[string]bool{}, waiting: make(chan struct{}, 1)}
			p := newPanics(t, h, wait)
			for _, hook := range hooks {
				for _, status := range []int{201, 404, 500} {
					p.hook(t, hook, status)
				}
				if waits := strings.HasPrefix(hook, "wait"); h.fired[hook] == (waits && wait == 0) {
					t.Errorf("%s: it panicked: %t", hook, h.fired[hook])
				}
			}
			if effects, records := p.effects(t), p.count(t, "SELECT count(*) FROM idempotency_keys WHERE status = 201"); effects != len(hooks) || records != effects {
				t.Errorf("%d effects and %d records of %d keys", effects, records, len(hooks))
			}
		})
	}
}

// panics is a service with a trap in each hook.
type panics struct {
	*testBundle
	trap           *trap
	idem           *middleware.Middleware
	waits          bool
	held, released chan struct{} // of the handler of a request with the header Hold
	restart        atomic.Bool   // makes the next handler run again
}

func newPanics(t *testing.T, h *trap, wait time.Duration) *panics {
	t.Helper()
	p := &panics{trap: h, waits: wait != 0, held: make(chan struct{}), released: make(chan struct{})}
	options := &middleware.Options{
		Wait:   wait,
		Tracer: h,
		Reduce: func(a idempotency.Answer) idempotency.Answer {
			h.spring("reduce")
			return a
		},
		Disposition: func(answer idempotency.Answer) idempotency.Disposition {
			h.spring("disposition")
			return idempotency.DefaultDisposition(answer)
		},
		AuthorizeReplay: func(*http.Request, *idempotency.Record) error {
			h.spring("authorize")
			return nil
		},
		TraceID: func(*http.Request) string {
			h.spring("trace id")
			return ""
		},
		Route: func(*http.Request) string {
			h.spring("route")
			return ""
		},
		RouterState: func(context.Context, []byte) (middleware.RouterState, error) {
			h.spring("router state")
			return restoring(func(ctx context.Context) context.Context {
				h.spring("restore")
				return ctx
			}), nil
		},
		Fingerprinters: []middleware.Fingerprinter{{Version: 100, Content: func(_ *http.Request, body []byte) []byte {
			h.spring("fingerprint")
			return body
		}}},
	}
	mount := func(idem *middleware.Middleware, handler http.Handler) http.Handler {
		p.idem = idem
		return idem.Handler(handler)
	}
	p.testBundle = setup(t, setupOptions{middleware: options, poolMax: 2, mount: mount}, func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Hold") != "" {
			p.held <- struct{}{}
			<-p.released
		}
		if _, err := postgres.Tx(r.Context()).Exec(r.Context(), "INSERT INTO effects DEFAULT VALUES"); err != nil {
			t.Error(err)
		}
		if p.restart.CompareAndSwap(true, false) {
			_, _ = postgres.Tx(r.Context()).Exec(r.Context(), "DO 'BEGIN RAISE SQLSTATE ''40001''; END'")
			return
		}
		status, err := strconv.Atoi(r.Header.Get("Status"))
		if err != nil {
			t.Error(err)
		}
		w.WriteHeader(status)
	})
	return p
}

// hook sends requests with one key, some of them with the hook armed.
func (p *panics) hook(t *testing.T, hook string, status int) {
	t.Helper()
	key := strings.ReplaceAll(hook, " ", "-") + "-" + strconv.Itoa(status)
	send := func(key string, headers ...string) {
		r := httptest.NewRequest(http.MethodPost, "/", strings.NewReader("x"))
		r.Header.Set("Account", "acme")
		r.Header.Set("Status", strconv.Itoa(status))
		if key != "" {
			r.Header.Set("Idempotency-Key", key)
		}
		if len(headers) == 2 {
			r.Header.Set(headers[0], headers[1])
		}
		defer func() { _ = recover() }() // as net/http does
		p.server.Config.Handler.ServeHTTP(httptest.NewRecorder(), r)
	}
	armed := func(send func()) {
		p.trap.arm(hook)
		defer p.trap.arm("")
		send()
	}
	if strings.HasPrefix(hook, "wait") && p.waits {
		armed(func() {
			var both sync.WaitGroup
			both.Go(func() { send(key, "Hold", "yes") })
			<-p.held
			both.Go(func() { send(key) })
			<-p.trap.waiting
			p.released <- struct{}{}
			both.Wait()
		})
	}
	p.restart.Store(hook == "restore") // it is called before the second run
	armed(func() { send("") })         // which is refused
	armed(func() { send(key) })
	send(key)
	send(key)
	armed(func() { send(key) })
	send(key)
	for begin := time.Now(); p.pool.Stat().AcquiredConns() != 0 || p.idem.InFlight() != 0; time.Sleep(time.Millisecond) {
		if time.Since(begin) > 10*time.Second {
			t.Fatalf("%s, status %d: %d connections in use, %d requests in flight", hook, status, p.pool.Stat().AcquiredConns(), p.idem.InFlight())
		}
	}
}
