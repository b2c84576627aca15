package effect_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/storage/postgres"
)

type card struct {
	Token  string
	Amount int
}

type charge struct {
	ID     string
	Amount int
}

// behavior is the processor's response to one request.
type behavior uint8

const (
	answers      behavior = iota
	loses                 // applies it, and hangs up without an answer
	cutsOff               // applies it, and sends half an answer
	times504              // applies it, and answers 504
	refuses               // answers 402, and applies nothing
	panics500             // applies it, and answers 500, now and for ever
	forgets               // hangs up, and applies nothing
	stalls                // holds it until release is called, and then applies it
	refusesToRun          // says that it was not executed, and applies nothing
)

// processor is the other service: an HTTP server that charges cards, once for each key.
type processor struct {
	*httptest.Server
	client *http.Client

	mu       sync.Mutex
	keepsNo  bool // a decline is kept under its key
	lags     bool // the look-up finds nothing
	random   bool // behaves at random, without plan
	plan     []behavior
	always   behavior // after the plan
	requests []card
	keys     map[string]bool // that were sent
	kept     map[string]kept
	charges  map[string]int // amounts, by key
	lookups  int
	release  chan struct{}
	received chan struct{} // a token for each request that stalls
}

type kept struct {
	status int
	body   string
}

func newProcessor(t *testing.T) *processor {
	p := &processor{
		keys: map[string]bool{}, kept: map[string]kept{}, charges: map[string]int{}, release: make(chan struct{}), received: make(chan struct{}, 100),
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /charges", p.post)
	mux.HandleFunc("GET /charges/{key}", p.get)
	p.Server = httptest.NewServer(mux)
	p.client = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	t.Cleanup(func() {
		p.client.CloseIdleConnections()
		p.Server.CloseClientConnections()
		p.Server.Close()
	})
	return p
}

func (p *processor) post(w http.ResponseWriter, r *http.Request) {
	key := r.Header.Get("Idempotency-Key")
	var in card
	if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
		panic(err)
	}
	p.mu.Lock()
	does := p.always
	if len(p.plan) > 0 {
		does, p.plan = p.plan[0], p.plan[1:]
	}
	if p.random {
		does = behavior(rand.N(int(refuses) + 1))
	}
	p.requests, p.keys[key] = append(p.requests, in), true
	p.mu.Unlock()
	if does == stalls {
		p.received <- struct{}{}
		<-p.release
		does = answers
	}
	if does == refusesToRun {
		w.Header().Set("Idempotency-Status", "not-executed")
		w.WriteHeader(503)
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	answer, known := p.kept[key]
	if !known {
		answer = kept{201, fmt.Sprintf(`{"ID":"ch_%d","Amount":%d}`, len(p.charges)+1, in.Amount)}
		switch does {
		case refuses:
			answer = kept{402, `{"code":"no_funds"}`}
		case forgets:
			panic(http.ErrAbortHandler)
		case panics500:
			answer = kept{500, ""}
		}
		if does != refuses {
			p.charges[key] += in.Amount
		}
		if does != refuses || p.keepsNo {
			p.kept[key] = answer
		}
	}
	switch does {
	case loses, forgets:
		panic(http.ErrAbortHandler)
	case times504:
		answer = kept{504, ""}
	case cutsOff:
		w.Header().Set("Content-Length", fmt.Sprint(len(answer.body)))
		answer.body = answer.body[:len(answer.body)/2]
	}
	w.WriteHeader(answer.status)
	_, _ = w.Write([]byte(answer.body))
}

func (p *processor) get(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lookups++
	amount, ok := p.charges[r.PathValue("key")]
	if !ok || p.lags || p.random && rand.N(2) == 0 {
		http.NotFound(w, r)
		return
	}
	_, _ = fmt.Fprintf(w, `{"ID":"ch_found","Amount":%d}`, amount)
}

func (p *processor) does(plan ...behavior) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.plan = plan
}

// alwaysDoes sets what it does with each request that has no plan, from now on.
func (p *processor) alwaysDoes(now behavior) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.always = now
}

// cutsTheNext closes the connection of the next request that stalls. It is at the processor, which
// does not notice, and net/http may repeat it.
func (p *processor) cutsTheNext() {
	go func() {
		<-p.received
		p.CloseClientConnections()
	}()
}

// arrives lets the request through that stalls, and returns when its charge is the second one.
func (p *processor) arrives() {
	p.release <- struct{}{}
	for len(p.charged()) < 2 {
		time.Sleep(time.Millisecond)
	}
}

// sent returns the number of requests, and fails the test if they had more than one key.
func (p *processor) sent(t *testing.T) int {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.keys) > 1 {
		t.Errorf("%d keys for one call", len(p.keys))
	}
	return len(p.requests)
}

// charged returns the amounts of all charges.
func (p *processor) charged() (amounts []int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, amount := range p.charges {
		amounts = append(amounts, amount)
	}
	return amounts
}

// do charges a card.
func (p *processor) do(ctx context.Context, key string, in card) (out charge, err error) {
	body, err := json.Marshal(in)
	if err != nil {
		return out, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.URL+"/charges", strings.NewReader(string(body)))
	if err != nil {
		return out, effect.NotSent(err)
	}
	req.Header.Set("Idempotency-Key", key)
	resp, err := p.client.Do(req)
	if err == nil {
		defer resp.Body.Close()
	}
	if err := effect.FromHTTP(resp, err); err != nil {
		return out, err
	}
	return out, json.NewDecoder(resp.Body).Decode(&out)
}

func (p *processor) lookup(ctx context.Context, key string, _ card) (out charge, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.URL+"/charges/"+key, nil)
	if err != nil {
		return out, err
	}
	resp, err := p.client.Do(req)
	if err != nil {
		return out, err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusNotFound {
		return out, effect.ErrAbsent
	}
	return out, json.NewDecoder(resp.Body).Decode(&out)
}

// shop is a service with one resumable route, which charges a card and posts the charge.
type shop struct {
	*testservice.Service
	*processor
	key    idempotency.Key
	charge *effect.Declared[card, charge]
	price  int
	handle func(ctx context.Context) (*idempotency.Answer, error) // topUp unless set
	ends   *ends

	beforeCall, afterCall func() // in the handler
}

// ends collects the ends of effects.
type ends struct {
	idempotency.Tracer
	mu  sync.Mutex
	all []idempotency.EffectEnd
}

func (*ends) TraceRequestStart(ctx context.Context, _ idempotency.RequestStart) context.Context {
	return ctx
}
func (*ends) TraceStep(context.Context, idempotency.StepEnd)          {}
func (*ends) TraceRequestEnd(context.Context, idempotency.RequestEnd) {}
func (e *ends) TraceEffect(_ context.Context, end idempotency.EffectEnd) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.all = append(e.all, end)
}

func (e *ends) last(t *testing.T) idempotency.EffectEnd {
	t.Helper()
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.all) == 0 {
		t.Fatal("no effect was traced")
	}
	return e.all[len(e.all)-1]
}

// newShop returns a shop. set changes its effect.
func newShop(t *testing.T, set func(p *processor, e *effect.Effect[card, charge])) *shop {
	t.Helper()
	s := &shop{Service: testservice.New(t, nil), processor: newProcessor(t), key: idempotency.Key{Scope: "acme", Value: "key-1"}, price: 900, ends: &ends{}}
	e := effect.Effect[card, charge]{Do: s.processor.do, Timeout: 2 * time.Second}
	if set != nil {
		set(s.processor, &e)
	}
	s.charge = effect.New("charge", e)
	s.serve(s.Store, idempotency.Timeouts{})
	return s
}

// serve makes the shop answer with another store, as another process would.
func (s *shop) serve(store idempotency.Store, timeouts idempotency.Timeouts) {
	s.Engine = idempotency.NewEngine(store, &idempotency.Options{Tracer: s.ends, Timeouts: timeouts})
	s.Engine.Resumable("topup/1", func(idempotency.Key, []byte) (idempotency.RunFunc, error) { return s.run, nil })
}

func (s *shop) run(ctx context.Context) (*idempotency.Answer, error) {
	if s.handle != nil {
		return s.handle(ctx)
	}
	return s.topUp(ctx)
}

// topUp is the handler of the package's comment.
func (s *shop) topUp(ctx context.Context) (*idempotency.Answer, error) {
	if s.beforeCall != nil {
		s.beforeCall()
	}
	paid, err := s.charge.Call(ctx, card{"tok", s.price})
	if s.afterCall != nil {
		s.afterCall()
	}
	switch {
	case errors.Is(err, effect.ErrDeclined):
		return &idempotency.Answer{Status: 402}, nil
	case errors.Is(err, effect.ErrMaybe):
		return &idempotency.Answer{Status: 202}, nil
	case err != nil:
		return &idempotency.Answer{Status: 200}, nil // dropped
	}
	return s.post(ctx, paid)
}

func (s *shop) post(ctx context.Context, paid charge) (*idempotency.Answer, error) {
	if _, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO effects (name) VALUES ($1)", fmt.Sprint(paid.Amount)); err != nil {
		return nil, err
	}
	return &idempotency.Answer{Status: 201, Body: []byte(paid.ID)}, nil
}

// request makes one request with the key, in a goroutine that the handler may end, as the death of
// the process would.
func (s *shop) request() idempotency.Result {
	return mayDie(func() idempotency.Result { return s.Engine.Do(context.Background(), s.newRequest(), s.run) })
}

func (s *shop) newRequest() idempotency.Request {
	req := testservice.Request(s.key)
	req.Resumable, req.Stored = "topup/1", func() []byte { return []byte("the request") }
	return req
}

func mayDie(do func() idempotency.Result) idempotency.Result {
	result := idempotency.Result{Reason: "died"}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		result = do()
	}()
	<-ended
	return result
}

// due ends the lease of the last owner, or the pause.
func (s *shop) due(t *testing.T) {
	t.Helper()
	s.Exec(t, "UPDATE idempotency_open SET next_at = now()")
}

// older makes the effects older, as if the database's clock had gone on.
func (s *shop) older(t *testing.T, by time.Duration) {
	t.Helper()
	s.Exec(t, "UPDATE idempotency_effects SET sent_first_at = sent_first_at - $1::interval, doubt_at = doubt_at - $1::interval", by.String())
	s.Exec(t, "UPDATE idempotency_open SET started_at = started_at - $1::interval, next_at = now()", by.String())
}

// resume runs the request again, as the completer would.
func (s *shop) resume(t *testing.T) idempotency.Result {
	t.Helper()
	s.due(t)
	return mayDie(func() idempotency.Result { return s.Engine.Resume(context.Background(), s.key) })
}

// wantSent fails the test unless the processor got this number of requests, under one key.
func (s *shop) wantSent(t *testing.T, want int) {
	t.Helper()
	if n := s.sent(t); n != want {
		t.Errorf("sent %d times, want %d", n, want)
	}
}

// wantPaid fails the test unless the answer is 201, with one charge and one posting of the amount.
func (s *shop) wantPaid(t *testing.T, result idempotency.Result, amount int) {
	t.Helper()
	if result.Answer == nil || result.Answer.Status != 201 {
		t.Errorf("outcome %q, reason %q, answer %v: %v", result.Outcome, result.Reason, result.Answer, result.Err)
	}
	if got := s.charged(); len(got) != 1 || got[0] != amount {
		t.Errorf("charges %v, want one of %d", got, amount)
	}
	if got := s.Strings(t, "SELECT name FROM effects"); len(got) != 1 || got[0] != fmt.Sprint(amount) {
		t.Errorf("postings %v, want one of %d", got, amount)
	}
	if n := s.Count(t, "SELECT count(*) FROM idempotency_open"); n != 0 {
		t.Errorf("%d requests are open", n)
	}
}

// wantOpen fails the test unless the request is open and not parked.
func (s *shop) wantOpen(t *testing.T, result idempotency.Result) {
	t.Helper()
	if result.Outcome != idempotency.OutcomeUnknown || result.Reason != idempotency.ReasonOutcomeUnknown || !result.Accepted {
		t.Errorf("outcome %q, reason %q, accepted %v: %v", result.Outcome, result.Reason, result.Accepted, result.Err)
	}
	if n := s.Count(t, "SELECT count(*) FROM idempotency_open WHERE parked IS NULL"); n != 1 {
		t.Errorf("%d requests are open and not parked", n)
	}
}

// wantParked fails the test unless the request waits for a person, for a reason with these words.
func (s *shop) wantParked(t *testing.T, result idempotency.Result, words string) {
	t.Helper()
	if result.Reason != idempotency.ReasonNeedsAttention {
		t.Errorf("outcome %q, reason %q: %v", result.Outcome, result.Reason, result.Err)
	}
	if parked := s.Text(t, "SELECT COALESCE(max(parked), 'nothing is parked') FROM idempotency_open"); !strings.Contains(parked, words) {
		t.Errorf("parked: %q, want %q", parked, words)
	}
}
