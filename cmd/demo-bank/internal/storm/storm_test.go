package storm

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// model is a bank in memory that keeps every promise except the one that a test breaks. It does not
// replace the bank: the tests of package server run storms on that. The model shows that a storm
// detects a bank that lies.
type model struct {
	mu      sync.Mutex
	answers map[string]*bank.Transfer
	bodies  map[string]string
	ids     map[string]bank.Transfer
	posts   int
	audit   bank.Audit

	forget   bool // executes every copy again
	lose     bool // acknowledges without keeping
	alter    bool // records another amount than it acknowledged
	trusting bool // does not compare bodies
	// Loses the first reply to a key, and is still executing when the retry arrives.
	slow  bool
	asked map[string]int                                  // number of requests per key, on a slow bank
	fail  func(n int, w http.ResponseWriter) (taken bool) // may answer the n-th POST itself
}

func (m *model) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case r.URL.Path == "/v1/audit":
		reply(w, 200, "", m.audit)
	case r.Method == http.MethodGet:
		if t, ok := m.ids[strings.TrimPrefix(r.URL.Path, "/v1/transfers/")]; ok {
			reply(w, 200, "", t)
		} else {
			reply(w, 404, "", struct{}{})
		}
	default:
		m.post(w, r)
	}
}

func (m *model) post(w http.ResponseWriter, r *http.Request) {
	m.posts++
	if m.fail != nil && m.fail(m.posts, w) {
		return
	}
	var body bytes.Buffer
	if _, err := body.ReadFrom(r.Body); err != nil {
		return // the client cut the connection
	}
	key := r.Header.Get("Idempotency-Key")
	if m.slow {
		switch m.asked[key]++; m.asked[key] {
		case 1:
			panic(http.ErrAbortHandler)
		case 2:
			reply(w, 409, "in-progress", struct{}{})
			return
		}
	}
	first, known := m.answers[key]
	switch {
	case known && !m.trusting && m.bodies[key] != body.String():
		reply(w, 422, "mismatch", struct{}{})
		return
	case known && !m.forget:
		reply(w, 201, "replayed", first)
		return
	}
	t := bank.Transfer{ID: fmt.Sprint(len(m.ids) + 1), Currency: "EUR", CreatedAt: time.Now().UTC()}
	if err := json.Unmarshal(body.Bytes(), &t); err != nil {
		reply(w, 400, "executed", struct{}{})
		return
	}
	m.answers[key], m.bodies[key] = &t, body.String()
	kept := t
	if m.alter {
		kept.Amount++
	}
	if !m.lose {
		m.ids[t.ID] = kept
	}
	reply(w, 201, "executed", t)
}

func reply(w http.ResponseWriter, status int, outcome string, value any) {
	if outcome != "" {
		w.Header().Set("Idempotency-Status", outcome)
	}
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(value)
}

func run(t *testing.T, m *model, change ...func(*Config)) (*Report, error) {
	t.Helper()
	m.answers, m.bodies, m.ids = map[string]*bank.Transfer{}, map[string]string{}, map[string]bank.Transfer{}
	m.asked = map[string]int{}
	if m.audit == (bank.Audit{}) {
		m.audit = bank.Audit{OK: true, BalanceTotal: "5", OpeningTotal: "5", EntriesTotal: "0"}
	}
	server := httptest.NewServer(m)
	defer server.Close()
	config := Config{URL: server.URL, Keys: 20, Copies: 3, Clients: 4, Patience: 20 * time.Second}
	for _, f := range change {
		f(&config)
	}
	return Run(t.Context(), config)
}

// TestVerdict: each broken promise breaks the verdict with its own name. A good bank passes.
func TestVerdict(t *testing.T) {
	t.Parallel()
	unavailable := func(status int, outcome string) func(int, http.ResponseWriter) bool {
		return func(n int, w http.ResponseWriter) bool {
			if n%3 != 0 {
				return false
			}
			w.Header().Set("Retry-After", "1")
			reply(w, status, outcome, struct{}{})
			return true
		}
	}
	for _, one := range []struct {
		name   string
		model  *model
		broken []fault
	}{
		{"a good bank", &model{}, nil},
		{"a good bank that is often busy", &model{fail: unavailable(503, "not-executed")}, nil},
		{"a good bank that often does not know", &model{fail: unavailable(503, "unknown")}, nil},
		{"a good bank with keys in progress", &model{slow: true}, nil},
		{"a good bank whose handlers fail", &model{fail: unavailable(500, "not-executed")}, nil},
		{"it says in progress where nobody is at work", &model{fail: unavailable(409, "in-progress")}, []fault{faultOrder}},
		{"it executes again", &model{forget: true}, []fault{faultTwoAnswers, faultForgotten}},
		{"it acknowledges and keeps nothing", &model{lose: true}, []fault{faultMissing}},
		{"it keeps something else", &model{alter: true}, []fault{faultMissing}},
		{"it answers another body", &model{trusting: true}, []fault{faultChangedBody}},
		{"it refuses good requests", &model{fail: unavailable(400, "not-executed")}, []fault{faultUnexpected}},
		{"it calls the same body another", &model{fail: unavailable(422, "mismatch")}, []fault{faultUnexpected}},
		{"money from nowhere", &model{audit: bank.Audit{OK: true, BalanceTotal: "6", OpeningTotal: "5", EntriesTotal: "0"}}, []fault{faultMoney}},
		{"entries that don't add up", &model{audit: bank.Audit{OK: true, BalanceTotal: "5", OpeningTotal: "5", EntriesTotal: "1"}}, []fault{faultMoney}},
		{"doubles in the books", &model{audit: bank.Audit{OK: true, BalanceTotal: "5", OpeningTotal: "5", EntriesTotal: "0", KeysWithManyTransfers: 1}}, []fault{faultDoubles}},
		{"an audit that is not ok", &model{audit: bank.Audit{BalanceTotal: "5", OpeningTotal: "5", EntriesTotal: "0"}}, []fault{faultAudit}},
	} {
		t.Run(one.name, func(t *testing.T) {
			t.Parallel()
			report, err := run(t, one.model)
			if err != nil {
				t.Fatal(err)
			}
			if report.OK() != (len(one.broken) == 0) || (report.Verdict == "ok") != report.OK() {
				t.Errorf("verdict is %s: %v %v", report.Verdict, report.Broken, report.Examples)
			}
			for _, want := range one.broken {
				if !slices.ContainsFunc(report.Broken, func(s string) bool { return strings.HasPrefix(s, string(want)) }) {
					t.Errorf("the verdict does not say %q: %v", want, report.Broken)
				}
			}
			var text, object bytes.Buffer
			if err := report.WriteText(&text); err != nil || !strings.Contains(text.String(), "\nverdict: "+report.Verdict+"\n") {
				t.Errorf("the text does not say the verdict: %v\n%s", err, text.String())
			}
			if err := report.WriteJSON(&object); err != nil || strings.Count(object.String(), "\n") != 1 {
				t.Errorf("the JSON is not one line: %v\n%s", err, object.String())
			}
		})
	}
}

// TestPatienceEnds: a key that never gets an answer ends the storm without a verdict, in bounded
// time.
func TestPatienceEnds(t *testing.T) {
	t.Parallel()
	for name, fail := range map[string]func(int, http.ResponseWriter) bool{
		"always busy": func(_ int, w http.ResponseWriter) bool {
			reply(w, 409, "in-progress", struct{}{})
			return true
		},
		"always hangs up": func(int, http.ResponseWriter) bool { panic(http.ErrAbortHandler) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			report, err := run(t, &model{fail: fail}, func(c *Config) { c.Patience = 300 * time.Millisecond })
			if err == nil || !strings.Contains(err.Error(), errPatience.Error()) {
				t.Errorf("the storm ended with %v and %+v", err, report)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	server := httptest.NewServer(&model{})
	defer server.Close()
	if _, err := Run(ctx, Config{URL: server.URL, Keys: 1, Copies: 1, Clients: 1, Patience: time.Minute}); err == nil {
		t.Error("a storm that was told to stop has a verdict")
	}
}

// TestNothingIsSentUnseen: Go's client could repeat a keyed request by itself if a kept connection
// breaks. The storm must have counted each request that arrives.
func TestNothingIsSentUnseen(t *testing.T) {
	t.Parallel()
	var arrived int
	m := &model{}
	m.fail = func(n int, _ http.ResponseWriter) bool {
		arrived = n
		if n%5 == 0 {
			panic(http.ErrAbortHandler)
		}
		return false
	}
	report, err := run(t, m, func(c *Config) { c.Copies = 2 })
	if err != nil {
		t.Fatal(err)
	}
	if int64(arrived) > report.Requests || !report.OK() {
		t.Errorf("%d requests arrived, %d were counted: %v", arrived, report.Requests, report.Broken)
	}
}

// TestProgress: a terminal shows one line, which is removed at the end.
func TestProgress(t *testing.T) {
	t.Parallel()
	var line bytes.Buffer
	if _, err := run(t, &model{}, func(c *Config) { c.Progress = &line }); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(line.String(), "of 20 keys") || !strings.HasSuffix(line.String(), "\r\x1b[K") {
		t.Errorf("progress is %q", line.String())
	}
}

func TestConfigIsChecked(t *testing.T) {
	t.Parallel()
	good := Config{URL: "http://127.0.0.1:1", Keys: 1, Copies: 1, Clients: 1, Patience: 1}
	if err := good.Validate(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Config){
		"no URL": func(c *Config) { c.URL = "" }, "https": func(c *Config) { c.URL = "https://127.0.0.1:1" },
		"no keys": func(c *Config) { c.Keys = 0 }, "too many keys": func(c *Config) { c.Keys = KeysMax + 1 },
		"no copies": func(c *Config) { c.Copies = 0 }, "too many copies": func(c *Config) { c.Copies = CopiesMax + 1 },
		"no clients": func(c *Config) { c.Clients = 0 }, "too many clients": func(c *Config) { c.Clients = ClientsMax + 1 },
		"no patience": func(c *Config) { c.Patience = 0 },
	} {
		config := good
		change(&config)
		if config.Validate() == nil {
			t.Errorf("%s is taken", name)
		}
	}
}
