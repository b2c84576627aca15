package chaos

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	gatewayTimeout  = 60 * time.Second // of a request to the processor, also one that nobody waits for
	gatewayBytesMax = 256 << 20
	inputsMax       = 3 // different inputs that are kept for each key
	processorHeader = "Processor-Instance"
)

// gateway stands between the banks and the processor, with a listener for each bank. It sees each
// call, and can lose, hold or answer it.
type gateway struct {
	run     *run
	client  *http.Client
	servers []*http.Server
	urls    []string
	serving sync.WaitGroup
	posts   atomic.Int64 // calls that write
	lookups atomic.Int64

	mu    sync.Mutex
	calls map[callName]*calls
	hooks map[int]func(*call) verdict // of scripts, by the index of the key
}

// callName identifies the calls of one effect: the service, and the processor's key.
type callName struct{ service, key string }

// calls are the gateway's notes on the calls under one name.
type calls struct {
	inputs  []string
	sent    int
	last    time.Duration // of its sends, by the run's clock
	forEver bool          // the processor answered 500, and repeats that for ever
}

// call is one call that writes.
type call struct {
	bank int
	name callName
	body []byte
	nth  int  // of its name
	key  *key // of the client's request, if the body names it
}

// verdict decides about a call. The zero value lets it pass.
type verdict struct {
	hold   <-chan struct{} // first wait for this
	answer int             // answer this status without a call to the processor; 0: call it
	body   string          // of that answer
	lose   bool            // cut the conn, without a call to the processor
	cut    bool            // call the processor, and cut the conn in place of its answer
	before func()          // called when the call has arrived
	after  func()          // called when the processor has answered
}

func newGateway(r *run) *gateway {
	return &gateway{
		run: r, calls: map[callName]*calls{}, hooks: map[int]func(*call) verdict{},
		client: &http.Client{
			Timeout: gatewayTimeout,
			// No request may be sent twice: each has a conn of its own, and its body can't be
			// rewound.
			Transport:     &http.Transport{DisableKeepAlives: true, DisableCompression: true},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
}

// start opens a listener for each bank.
func (g *gateway) start() error {
	for bank := range g.run.config.Banks {
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { g.serve(w, r, bank) })}
		g.servers = append(g.servers, server)
		g.urls = append(g.urls, "http://"+listener.Addr().String())
		g.serving.Go(func() { _ = server.Serve(listener) }) // until close
	}
	return nil
}

func (g *gateway) close() {
	for _, server := range g.servers {
		_ = server.Close()
	}
	g.serving.Wait()
}

// rest closes the banks' idle conns, so that they don't count as conns of the banks.
func (g *gateway) rest() {
	for _, server := range g.servers {
		server.SetKeepAlivesEnabled(false)
	}
}

func (g *gateway) serve(w http.ResponseWriter, r *http.Request, bank int) {
	if r.Method != http.MethodPost {
		g.lookups.Add(1)
		g.pass(r.Context(), w, r, nil, &verdict{}, nil)
		return
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, gatewayBytesMax))
	if err != nil {
		return
	}
	c := &call{bank: bank, name: callName{r.URL.Path, r.Header.Get("Idempotency-Key")}, body: body, key: g.run.keys.find(body)}
	if c.name.key == "" { // a mail has none
		c.name.key = string(body)
	}
	v := g.note(c)
	if v.before != nil {
		v.before()
	}
	if v.hold != nil {
		select {
		case <-v.hold:
		case <-time.After(gatewayTimeout):
		}
	}
	switch {
	case v.lose:
		g.cut(w)
	case v.answer != 0:
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(v.answer)
		_, _ = io.WriteString(w, v.body) // the bank may be gone
	default:
		// The call was sent, so it goes on even if the bank no longer waits.
		g.pass(context.WithoutCancel(r.Context()), w, r, body, &v, c)
	}
}

// note counts a call and returns the verdict on it.
func (g *gateway) note(c *call) verdict {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.posts.Add(1)
	seen := g.calls[c.name]
	if seen == nil {
		seen = &calls{}
		g.calls[c.name] = seen
	}
	seen.sent++
	seen.last = g.run.clock()
	c.nth = seen.sent
	if text := string(c.body); !slices.Contains(seen.inputs, text) && len(seen.inputs) < inputsMax {
		seen.inputs = append(seen.inputs, text)
	}
	if c.key != nil {
		if hook := g.hooks[c.key.index]; hook != nil {
			return hook(c)
		}
	}
	return verdict{}
}

// hook makes fn decide on each call of a key.
func (g *gateway) hook(k *key, fn func(*call) verdict) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.hooks[k.index] = fn
}

// pass forwards a request and its answer. A conn that the processor cuts is cut too.
func (g *gateway) pass(ctx context.Context, w http.ResponseWriter, r *http.Request, body []byte, v *verdict, c *call) {
	var content io.Reader
	if body != nil {
		content = bytes.NewReader(body)
	}
	request, err := http.NewRequestWithContext(ctx, r.Method, "http://"+g.run.processor.address+r.URL.RequestURI(), content)
	if err != nil {
		g.cut(w)
		return
	}
	request.GetBody = nil
	for _, name := range []string{"Content-Type", "Idempotency-Key"} {
		if value := r.Header.Get(name); value != "" {
			request.Header.Set(name, value)
		}
	}
	var answer []byte
	response, err := g.client.Do(request)
	if err == nil {
		answer, err = io.ReadAll(io.LimitReader(response.Body, gatewayBytesMax))
		_ = response.Body.Close()
	}
	if c != nil {
		g.learn(c, response, err)
	}
	if v.after != nil {
		v.after()
	}
	if err != nil || v.cut {
		g.cut(w)
		return
	}
	for _, name := range []string{"Content-Type", processorHeader} {
		w.Header().Set(name, response.Header.Get(name))
	}
	w.WriteHeader(response.StatusCode)
	_, _ = w.Write(answer) // the bank may be gone
}

// learn notes whether the answer is a 500, which the processor repeats for ever.
func (g *gateway) learn(c *call, response *http.Response, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if err == nil && response.StatusCode == http.StatusInternalServerError {
		g.calls[c.name].forEver = true
	}
}

// seen returns the calls under a name.
func (g *gateway) seen(name callName) calls {
	g.mu.Lock()
	defer g.mu.Unlock()
	if c := g.calls[name]; c != nil {
		return *c
	}
	return calls{}
}

// all returns all calls by name.
func (g *gateway) all() map[callName]calls {
	g.mu.Lock()
	defer g.mu.Unlock()
	all := make(map[callName]calls, len(g.calls))
	for name, c := range g.calls {
		all[name] = *c
	}
	return all
}

// cut resets the conn.
func (g *gateway) cut(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		panic(http.ErrAbortHandler)
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // fails if the conn is gone already
	}
	_ = conn.Close()
}
