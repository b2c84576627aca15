package psp

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// waitMax limits every wait. It is long because the machine may be loaded.
const waitMax = 60 * time.Second

// clock is a time that only the test moves.
type clock struct {
	mu   sync.Mutex
	time time.Time
}

func newClock() *clock { return &clock{time: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)} }

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.time
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.time = c.time.Add(d)
}

// bundle is a running processor and its test's tools. Its methods fail the test without stopping
// it, so any goroutine may call them.
type bundle struct {
	t      *testing.T
	server *Server
	http   *http.Client
	end    func() error // stops the processor once, and returns the error of Run

	mayFail bool // the test looks at the error itself
}

func setup(t *testing.T, change ...func(*Config)) *bundle {
	t.Helper()
	config := Config{Addr: "127.0.0.1:0"}
	for _, f := range change {
		f(&config)
	}
	s := New(config)
	transport := &http.Transport{MaxIdleConnsPerHost: 64}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	end := sync.OnceValue(func() error {
		transport.CloseIdleConnections()
		cancel()
		select {
		case err := <-ended:
			return err
		case <-time.After(waitMax):
			return errors.New("it did not end")
		}
	})
	select {
	case <-s.Serving():
	case err := <-ended:
		t.Fatalf("the processor did not start: %v", err)
	case <-time.After(waitMax):
		t.Fatal("the processor did not start in time")
	}
	b := &bundle{t: t, server: s, http: &http.Client{Transport: transport, Timeout: waitMax}, end: end}
	t.Cleanup(func() {
		if !b.mayFail {
			b.stop()
		}
	})
	return b
}

// stop stops the processor, which must end without an error.
func (b *bundle) stop() {
	b.t.Helper()
	if err := b.end(); err != nil {
		b.t.Errorf("the processor ended with: %v", err)
	}
}

// reply is a complete answer, or the error of a request without one.
type reply struct {
	status int
	header http.Header
	body   string
	err    error
}

// reset reports whether the connection was reset instead of an answer.
func (r reply) reset() bool { return errors.Is(r.err, syscall.ECONNRESET) }

func (r reply) is(status int, contains string) bool {
	return r.err == nil && r.status == status && strings.Contains(r.body, contains)
}

// field returns a field of the answer's object, as text.
func (r reply) field(name string) string {
	var object map[string]any
	if json.Unmarshal([]byte(r.body), &object) != nil {
		return ""
	}
	value, ok := object[name]
	if !ok {
		return ""
	}
	return fmt.Sprint(value)
}

// do sends a request. Without a key it sends no header.
func (b *bundle) do(method, path, key, body string) reply {
	request, err := http.NewRequest(method, b.server.URL()+path, strings.NewReader(body))
	if err != nil {
		return reply{err: err}
	}
	request.GetBody = nil // or Go's client repeats it by itself
	if key != "" {
		request.Header.Set("Idempotency-Key", key)
	}
	response, err := b.http.Do(request)
	if err != nil {
		return reply{err: err}
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	return reply{response.StatusCode, response.Header, string(content), err}
}

func (b *bundle) charge(key string) reply {
	return b.do("POST", "/charges", key, `{"card":"tok_visa","amount":1250,"reference":"order 1"}`)
}

// faults sets the faults.
func (b *bundle) faults(body string) {
	b.t.Helper()
	if r := b.do("PUT", "/faults", "", body); !r.is(http.StatusNoContent, "") {
		b.t.Errorf("PUT /faults %s: %+v", body, r)
	}
}

// items returns a list.
func (b *bundle) items(path string) []map[string]any {
	b.t.Helper()
	r := b.do("GET", path, "", "")
	var list struct {
		Items []map[string]any `json:"items"`
	}
	if err := json.Unmarshal([]byte(r.body), &list); err != nil || r.status != http.StatusOK || list.Items == nil {
		b.t.Errorf("GET %s: %+v %v", path, r, err)
	}
	return list.Items
}

// eventually waits until so returns true.
func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(waitMax); !so(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it never came true: %s", what)
		}
	}
}

// TestEachServiceAnswersAndLists: each answer has its status and exactly its fields. The list of
// the service has the same item, and so has the list of the key.
func TestEachServiceAnswersAndLists(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ch := b.charge("ch-1").field("id")
	for _, test := range []struct {
		path, key, body    string
		status             int
		fields, listFields []string
	}{
		{"/charges", "k", `{"card":"tok_visa","amount":9223372036854775807,"reference":"r"}`, 201,
			[]string{"amount", "card", "created_at", "id", "key", "reference"}, nil},
		{"/refunds", "k", `{"charge":"` + ch + `","amount":1,"reference":"r"}`, 201, []string{"amount", "charge", "id", "key"}, nil},
		{"/payouts", "k", `{"iban":"DE0201","amount":1,"reference":"r"}`, 201, []string{"amount", "iban", "id", "key"}, nil},
		{"/mails", "", `{"to":"alice@example.com","text":"<paid> & done"}`, 202, []string{"id"}, []string{"created_at", "id", "text", "to"}},
		{"/mails", "k", `{"to":"alice@example.com","text":"paid"}`, 202, []string{"id"}, []string{"created_at", "id", "key", "text", "to"}},
	} {
		r := b.do("POST", test.path, test.key, test.body)
		var object map[string]any
		if err := json.Unmarshal([]byte(r.body), &object); err != nil || r.status != test.status ||
			!slices.Equal(slices.Sorted(maps.Keys(object)), test.fields) {
			t.Errorf("POST %s: %+v", test.path, r)
		}
		if r.header.Get("Content-Type") != "application/json" || r.header.Get(InstanceHeader) != b.server.Instance() {
			t.Errorf("POST %s has the header %v", test.path, r.header)
		}
		lists := []string{test.path}
		if test.key != "" {
			lists = append(lists, test.path+"?key="+test.key)
		}
		for _, path := range lists {
			items := b.items(path)
			if len(items) == 0 {
				t.Errorf("GET %s is empty", path)
				continue
			}
			last := items[len(items)-1]
			want := test.listFields
			if want == nil {
				want = test.fields
			}
			if last["id"] != object["id"] || !slices.Equal(slices.Sorted(maps.Keys(last)), want) {
				t.Errorf("GET %s ends with %v, want %v", path, last, object)
			}
		}
	}
	if r := b.do("GET", "/instance", "", ""); r.field("instance") != b.server.Instance() || b.server.Instance() == "" {
		t.Errorf("GET /instance: %+v", r)
	}
}

// TestRefusals: each refusal has its status and error, and leaves no item.
func TestRefusals(t *testing.T) {
	t.Parallel()
	b := setup(t)
	long := func(n int) string { return strings.Repeat("ü", n) }
	for _, test := range []struct {
		method, path, key, body string
		status                  int
		contains                string
	}{
		{"POST", "/charges", "k1", `{"card":"tok_0002","amount":1}`, 402, `{"error":"card_declined"}`},
		{"POST", "/payouts", "k1", `{"iban":"DE0002","amount":1}`, 422, `{"error":"payout_refused"}`},
		{"POST", "/refunds", "k1", `{"charge":"ch_none","amount":1}`, 404, `{"error":"charge_not_found"}`},
		{"POST", "/charges", "", `{"card":"tok","amount":1}`, 400, `"invalid_key"`},
		{"POST", "/charges", strings.Repeat("k", KeyBytesMax+1), `{"card":"tok","amount":1}`, 400, `"invalid_key"`},
		{"POST", "/charges", "ü", `{"card":"tok","amount":1}`, 400, `"invalid_key"`},
		{"POST", "/charges", "k2", `{"card":"tok","amount":0}`, 400, "amount must be"},
		{"POST", "/charges", "k2", `{"card":"tok","amount":-1}`, 400, "amount must be"},
		{"POST", "/charges", "k2", `{"card":"tok"}`, 400, "amount must be"},
		{"POST", "/charges", "k2", `{"card":"tok","amount":1.0}`, 400, `"invalid"`},
		{"POST", "/charges", "k2", `{"card":"tok","amount":1e2}`, 400, `"invalid"`},
		{"POST", "/charges", "k2", `{"card":"tok","amount":"1"}`, 400, `"invalid"`},
		{"POST", "/charges", "k2", `{"card":"tok","amount":9223372036854775808}`, 400, `"invalid"`},
		{"POST", "/charges", "k2", `{"amount":1}`, 400, "card must be given"},
		{"POST", "/charges", "k2", `{"card":"tok","amount":1,"currency":"EUR"}`, 400, "unknown field"},
		{"POST", "/charges", "k2", `{"card":"tok","amount":1}{}`, 400, "follows"},
		{"POST", "/charges", "k2", `[]`, 400, "not a JSON object"},
		{"POST", "/charges", "k2", `null`, 400, "not a JSON object"},
		{"POST", "/charges", "k2", ``, 400, "not a JSON object"},
		{"POST", "/charges", "k2", `{"card":"` + long(AccountRunesMax+1) + `","amount":1}`, 400, "card must be at most"},
		{"POST", "/charges", "k2", `{"card":"tok","amount":1,"reference":"` + long(ReferenceRunesMax+1) + `"}`, 400, "reference must be at most"},
		{"POST", "/refunds", "k2", `{"charge":"ch_none","amount":0}`, 400, "amount must be"},
		{"POST", "/payouts", "k2", `{"iban":"DE","amount":0}`, 400, "amount must be"},
		{"POST", "/mails", "", `{"to":"a","text":"` + long(TextRunesMax+1) + `"}`, 400, "text must be at most"},
		{"POST", "/mails", "", `{"to":"` + long(AddressRunesMax+1) + `","text":"t"}`, 400, "to must be at most"},
		{"POST", "/mails", "", `{"to":"a"}`, 400, "text must be given"},
		{"GET", "/charges?limit=1", "", "", 400, "unknown"},
		{"GET", "/charges?%zz", "", "", 400, `"invalid"`},
		{"GET", "/nothing", "", "", 404, `"not_found"`},
		{"DELETE", "/charges", "", "", 405, `"method_not_allowed"`},
	} {
		if r := b.do(test.method, test.path, test.key, test.body); !r.is(test.status, test.contains) {
			t.Errorf("%s %s %.60q: %+v, want %d with %s", test.method, test.path, test.body, r, test.status, test.contains)
		}
	}
	for _, path := range []string{"/charges", "/refunds", "/payouts", "/mails"} {
		if items := b.items(path); len(items) > 0 {
			t.Errorf("GET %s has %v", path, items)
		}
	}

	// The other side of each limit.
	key := strings.Repeat("k", KeyBytesMax)
	if r := b.do("POST", "/charges", key, `{"card":"`+long(AccountRunesMax)+`","amount":1,"reference":"`+long(ReferenceRunesMax)+`"}`); !r.is(201, key) {
		t.Errorf("at its limits: %+v", r)
	}
	if r := b.do("POST", "/mails", "", `{"to":"`+long(AddressRunesMax)+`","text":"`+long(TextRunesMax)+`"}`); !r.is(202, "") {
		t.Errorf("at its limits: %+v", r)
	}
}

func TestBodiesHaveALimit(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const body = `{"card":"tok","amount":1}`
	fits := body + strings.Repeat(" ", BodyBytesMax-len(body))
	if r := b.do("POST", "/charges", "fits", fits); !r.is(201, "") {
		t.Errorf("a body of the maximum: %+v", r)
	}
	if r := b.do("POST", "/charges", "over", fits+" "); !r.is(413, `"body_too_large"`) {
		t.Errorf("a body over it: %+v", r)
	}
	if r := b.do("PUT", "/faults", "", `{}`+strings.Repeat(" ", BodyBytesMax)); !r.is(413, `"body_too_large"`) {
		t.Errorf("faults over it: %+v", r)
	}
}

// TestAFullProcessorRefuses: items and kept refusals count; replays and requests that leave nothing
// do not.
func TestAFullProcessorRefuses(t *testing.T) {
	t.Parallel()
	file := t.TempDir() + "/psp"
	limit := func(c *Config) { c.EntriesMax, c.File = 3, file }
	b := setup(t, limit)
	b.faults(`{"keeps_declines":false}`)
	for range 4 {
		if r := b.do("POST", "/charges", "no", `{"card":"0002","amount":1}`); !r.is(402, "") {
			t.Errorf("a decline that is not kept: %+v", r)
		}
	}
	b.faults(`{}`)
	b.do("POST", "/charges", "kept", `{"card":"0002","amount":1}`)
	b.do("POST", "/mails", "", `{"to":"a","text":"t"}`)
	if r := b.charge("third"); !r.is(201, "") {
		t.Errorf("the last that fits: %+v", r)
	}
	for range 2 {
		for _, r := range []reply{b.charge("fourth"), b.do("POST", "/mails", "", `{"to":"a","text":"t"}`)} {
			if !r.is(507, `"full"`) {
				t.Errorf("one over the limit: %+v", r)
			}
		}
		if r := b.charge("third"); !r.is(201, "") {
			t.Errorf("a replay at a full processor: %+v", r)
		}
		b.stop()
		b = setup(t, limit)
	}
}

// TestTheSameKeyRepeatsTheAnswer: the same body, however it is written, gets the same bytes;
// another body is refused. Each service has keys of its own, and each mail is sent.
func TestTheSameKeyRepeatsTheAnswer(t *testing.T) {
	t.Parallel()
	b := setup(t)
	first := b.charge("k")
	if again := b.do("POST", "/charges", "k", ` { "reference":"order 1", "amount":1250, "card":"tok_visa" }`); first.status != 201 || again.status != 201 || again.body != first.body {
		t.Errorf("%+v, then %+v", first, again)
	}
	for _, body := range []string{`{"card":"tok_visa","amount":1251,"reference":"order 1"}`, `{"card":"tok_visa","amount":1250}`, `{"card":"0002","amount":1250}`} {
		if r := b.do("POST", "/charges", "k", body); !r.is(400, `{"error":"key_reused"}`) {
			t.Errorf("%s: %+v", body, r)
		}
	}
	if r := b.do("POST", "/payouts", "k", `{"iban":"DE1","amount":1}`); !r.is(201, "") {
		t.Errorf("a payout with the charge's key: %+v", r)
	}
	if n := len(b.items("/charges")); n != 1 {
		t.Errorf("%d charges", n)
	}
	for range 2 {
		b.do("POST", "/mails", "k", `{"to":"a","text":"t"}`)
	}
	if n := len(b.items("/mails?key=k")); n != 2 {
		t.Errorf("%d mails, want each that was sent", n)
	}
}

// TestCopiesAtOnceMakeOneCharge: while one request is under way, the others get 409.
func TestCopiesAtOnceMakeOneCharge(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const copies = 32
	b.faults(`{"slow_ms":1000}`)
	replies := make(chan reply, copies)
	for range copies {
		go func() { replies <- b.charge("k") }()
	}
	statuses := map[int]int{}
	for range copies {
		r := <-replies
		statuses[r.status]++
		if r.status == http.StatusConflict && r.body != `{"error":"key_under_way"}`+"\n" {
			t.Errorf("a copy got %+v", r)
		}
	}
	if statuses[201] != 1 || statuses[409] != copies-1 {
		t.Errorf("the statuses are %v", statuses)
	}
	b.faults(`{}`)
	if items := b.items("/charges"); len(items) != 1 || b.charge("k").field("id") != items[0]["id"] {
		t.Errorf("the charges are %v", items)
	}
}

// TestManyKeysAtOnce: requests that share an fsync are each applied once, in the order of the file.
func TestManyKeysAtOnce(t *testing.T) {
	t.Parallel()
	file := t.TempDir() + "/psp"
	b := setup(t, func(c *Config) { c.File = file })
	const clients, each = 16, 8
	var group sync.WaitGroup
	for i := range clients {
		group.Go(func() {
			for n := range each {
				if r := b.charge(fmt.Sprintf("k-%d-%d", i, n)); !r.is(201, "") {
					t.Errorf("%+v", r)
				}
			}
		})
	}
	group.Wait()
	before := b.do("GET", "/charges", "", "").body
	if n := len(b.items("/charges")); n != clients*each {
		t.Errorf("%d charges", n)
	}
	b.stop()
	b = setup(t, func(c *Config) { c.File = file })
	if after := b.do("GET", "/charges", "", "").body; after != before {
		t.Errorf("the list changed with a restart:\n%s%s", before, after)
	}
}

// underWay waits until a charge is under way.
func (b *bundle) underWay(key string) {
	b.t.Helper()
	eventually(b.t, "the charge is under way", func() bool {
		l := b.server.ledger
		l.mu.Lock()
		defer l.mu.Unlock()
		state := l.keys[keyName{charges, key}]
		return state != nil && state.entry == nil
	})
}

// TestStopFinishesWhatIsInProgress: a slow request gets its answer, and one that outlasts
// ShutdownTimeout is cut and leaves nothing.
func TestStopFinishesWhatIsInProgress(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		slow, shutdownTimeout time.Duration
		applied               bool
	}{{300 * time.Millisecond, waitMax, true}, {DelayMax, 100 * time.Millisecond, false}} {
		file := t.TempDir() + "/psp"
		b := setup(t, func(c *Config) { c.File, c.ShutdownTimeout = file, test.shutdownTimeout })
		b.mayFail = true
		b.faults(fmt.Sprintf(`{"slow_ms":%d}`, test.slow.Milliseconds()))
		replies := make(chan reply, 1)
		go func() { replies <- b.charge("k") }()
		b.underWay("k")
		if err := b.end(); (err == nil) != test.applied {
			t.Errorf("slow for %v, it ended with %v", test.slow, err)
		}
		if r := <-replies; (r.status == 201) != test.applied {
			t.Errorf("slow for %v, the client got %+v", test.slow, r)
		}
		b = setup(t, func(c *Config) { c.File = file })
		if n := len(b.items("/charges")); (n == 1) != test.applied {
			t.Errorf("slow for %v, %d charges", test.slow, n)
		}
	}
}
