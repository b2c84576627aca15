package client_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
)

// authorizing is a base RoundTripper like many services': it adds a credential, or fails to get
// one.
type authorizing struct {
	base  http.RoundTripper
	token string
	err   error
}

func (a authorizing) RoundTrip(r *http.Request) (*http.Response, error) {
	if a.err != nil {
		_ = r.Body.Close() // as RoundTripper requires, although nothing was sent
		return nil, a.err
	}
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", a.token)
	return a.base.RoundTrip(r)
}

// TestWhatWasNeverSentIsNotExecuted: if a request never got a connection, or nothing of it was
// written, it is proven not to have been executed, whatever failed. If another try would end the
// same way, the client makes none.
func TestWhatWasNeverSentIsNotExecuted(t *testing.T) {
	t.Parallel()
	var served atomic.Int64
	serve := http.HandlerFunc(func(http.ResponseWriter, *http.Request) { served.Add(1) })
	encrypted := httptest.NewUnstartedServer(serve)
	encrypted.Config.ErrorLog = discardLog
	encrypted.StartTLS()
	t.Cleanup(encrypted.Close)
	plain := httptest.NewServer(serve)
	t.Cleanup(plain.Close)
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) }))
	t.Cleanup(proxy.Close)
	proxyURL, err := url.Parse(proxy.URL)
	if err != nil {
		t.Fatal(err)
	}
	plainTransport := func() *http.Transport { return &http.Transport{} }
	for name, one := range map[string]struct {
		url      string
		base     http.RoundTripper
		change   func(r *http.Request)
		attempts int
		why      func(error) bool
	}{
		"certificate of an unknown authority": {url: encrypted.URL, attempts: 1, why: as[x509.UnknownAuthorityError]},
		"https to a port that speaks http":    {url: "https" + strings.TrimPrefix(plain.URL, "http"), attempts: 1, why: as[tls.RecordHeaderError]},
		"scheme that does not exist":          {url: "htps://127.0.0.1:1/"},
		"no host":                             {url: "http:///transfers"},
		"a query with a line break":           {url: plain.URL, change: func(r *http.Request) { r.URL.RawQuery = "a\nb" }},
		"a header with a line break":          {url: plain.URL, change: func(r *http.Request) { r.Header.Set("X-Note", "a\r\nb") }},
		"a header with a space in its name":   {url: plain.URL, change: func(r *http.Request) { r.Header["X Note"] = []string{"a"} }},
		"a header without a name":             {url: plain.URL, change: func(r *http.Request) { r.Header[""] = []string{"a"} }},
		"a trailer with a line break":         {url: plain.URL, change: func(r *http.Request) { r.Trailer = http.Header{"X-Note": {"a\n"}} }},
		"no URL":                              {url: plain.URL, change: func(r *http.Request) { r.URL = nil }},
		"an address that is none":             {url: "http://127.0.0.1:1/", base: &http.Transport{DialContext: dialing("127.0.0.1:1:2")}, attempts: 1, why: as[*net.AddrError]},
		"a host that does not exist":          {url: "http://bank.invalid/", base: &http.Transport{DialContext: notFound(false)}, attempts: 1, why: as[*net.DNSError]},
		"a name server that fails":            {url: "http://bank.invalid/", base: &http.Transport{DialContext: notFound(true)}, attempts: 3},
		"a proxy that refuses CONNECT":        {url: "https://bank.example/", base: &http.Transport{Proxy: http.ProxyURL(proxyURL)}, attempts: 3},
		"a proxy that can't be found out":     {url: plain.URL, base: &http.Transport{Proxy: func(*http.Request) (*url.URL, error) { return nil, errFailing }}, attempts: 3},
		"a credential that is not to be had":  {url: plain.URL, base: authorizing{plainTransport(), "", errFailing}, attempts: 3, why: func(err error) bool { return errors.Is(err, errFailing) }},
		"a credential with a line break":      {url: plain.URL, base: authorizing{plainTransport(), "Bearer secret\n", nil}, attempts: 3},
		"wrapped, and an unknown authority":   {url: encrypted.URL, base: authorizing{plainTransport(), "Bearer secret", nil}, attempts: 1, why: as[x509.UnknownAuthorityError]},
		"HTTP/2, and an unknown authority":    {url: encrypted.URL, base: &http.Transport{ForceAttemptHTTP2: true}, attempts: 1, why: as[x509.UnknownAuthorityError]},
	} {
		t.Run(name, func(t *testing.T) {
			store := newIntents()
			base := one.base
			if base == nil {
				base = plainTransport()
			}
			transport := client.New(base, quick(func(o *client.Options) {
				o.AttemptsMax, o.Intents = 3, store
			}))
			defer transport.CloseIdleConnections()
			r := &http.Request{Method: http.MethodPost, Header: http.Header{}, Body: io.NopCloser(strings.NewReader("body")), ContentLength: 4}
			var err error
			if r.URL, err = url.Parse(one.url); err != nil {
				t.Fatal(err)
			}
			r = r.WithContext(t.Context())
			if one.change != nil {
				one.change(r)
			}
			_, err = transport.RoundTrip(r)
			e := expectError(t, err, idempotency.OutcomeNotExecuted, nil)
			if e.Attempts != one.attempts || one.why != nil && !one.why(err) {
				t.Errorf("after %d attempts, want %d: %v", e.Attempts, one.attempts, err)
			}
			if strings.Contains(err.Error(), "secret") {
				t.Errorf("the error shows a credential: %v", err)
			}
			if served.Load() != 0 || store.count() != 0 {
				t.Errorf("%d requests were served, %d intents are left", served.Load(), store.count())
			}
		})
	}
}

var discardLog = log.New(io.Discard, "", 0)

func as[T error](err error) bool {
	var target T
	return errors.As(err, &target)
}

type dial func(ctx context.Context, network, address string) (net.Conn, error)

// notFound fails as a look-up at a name server does.
func notFound(temporary bool) dial {
	return func(context.Context, string, string) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", Name: "bank.invalid", IsNotFound: !temporary, IsTemporary: temporary}}
	}
}

// dialing always dials the given address.
func dialing(address string) dial {
	return func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, address)
	}
}

// TestDroppedPacketsAreNotExecuted: the dialer gets no answer, and it does not matter whether its
// timeout or the attempt's ends first.
func TestDroppedPacketsAreNotExecuted(t *testing.T) {
	t.Parallel()
	over := make(chan struct{})
	t.Cleanup(func() { close(over) })
	for name, one := range map[string]struct {
		dial func() error
		why  error
	}{
		// net/http still dials when the attempt has ended.
		"the attempt's time ends first": {func() error { <-over; return errFailing }, client.ErrAttemptTimedOut},
		"the dialer's time ends first":  {func() error { return errFailing }, errFailing},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			base := &http.Transport{DialContext: func(_ context.Context, network, _ string) (net.Conn, error) {
				return nil, &net.OpError{Op: "dial", Net: network, Err: one.dial()}
			}}
			store := newIntents()
			c := &http.Client{Transport: client.New(base, quick(func(o *client.Options) {
				o.AttemptTimeout, o.AttemptsMax, o.Intents = 20*time.Millisecond, 3, store
			}))}
			_, _, err := post(t, c, t.Context(), "http://bank.example/", "body")
			if e := expectError(t, err, idempotency.OutcomeNotExecuted, one.why); e.Attempts != 3 || store.count() != 0 {
				t.Errorf("%d attempts, %d intents are left", e.Attempts, store.count())
			}
		})
	}
}

// TestUnsentAfterALostAttemptIsUnknown: an attempt that was never sent proves nothing about one
// that was.
func TestUnsentAfterALostAttemptIsUnknown(t *testing.T) {
	t.Parallel()
	s := newScript(t, each("lost"))
	var dials atomic.Int64
	base := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
		if dials.Add(1) > 1 {
			return nil, &net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", IsNotFound: true}}
		}
		return new(net.Dialer).DialContext(ctx, network, address)
	}}
	_, _, err := post(t, &http.Client{Transport: client.New(base, quick())}, t.Context(), s.server.URL, "body")
	if e := expectError(t, err, idempotency.OutcomeUnknown, nil); e.Attempts != 2 {
		t.Errorf("%d attempts", e.Attempts)
	}
}

// TestSilentBaseProvesNothing: a base that calls no hook of httptrace may have sent the body that
// it read, and a request without a body leaves no trace at all.
func TestSilentBaseProvesNothing(t *testing.T) {
	t.Parallel()
	for name, one := range map[string]struct {
		body    string
		read    bool
		outcome idempotency.Outcome
	}{
		"it read the body":       {"body", true, idempotency.OutcomeUnknown},
		"there is no body":       {"", false, idempotency.OutcomeUnknown},
		"it left the body alone": {"body", false, idempotency.OutcomeNotExecuted},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var body io.ReadCloser
			transport := client.New(canned(func(r *http.Request) (*http.Response, error) {
				if body = r.Body; one.read {
					_, _ = body.Read(make([]byte, 1))
				}
				return nil, errFailing
			}), quick())
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://bank.example/", strings.NewReader(one.body))
			if err != nil {
				t.Fatal(err)
			}
			_, err = transport.RoundTrip(r)
			expectError(t, err, one.outcome, errFailing)
			if one.outcome == idempotency.OutcomeNotExecuted {
				if n, err := body.Read(make([]byte, 4)); n > 0 || err == nil {
					t.Errorf("a late reader gets %d bytes of what is said never to have been sent, %v", n, err)
				}
			}
		})
	}
}

// TestWrittenRequestIsNeverNotExecuted: neither over HTTP/1.1 nor HTTP/2, with or without a body,
// if the server has the request or may have it.
func TestWrittenRequestIsNeverNotExecuted(t *testing.T) {
	t.Parallel()
	for _, protocol := range []string{"HTTP/1.1", "h2c", "h2"} {
		for _, body := range []string{"", "body", strings.Repeat("b", 1<<19)} {
			t.Run(fmt.Sprintf("%s, %d bytes", protocol, len(body)), func(t *testing.T) {
				t.Parallel()
				var arrived atomic.Int64
				server := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
					arrived.Add(1)
					if r.Proto == "HTTP/2.0" != (protocol != "HTTP/1.1") {
						t.Errorf("it arrived by %s", r.Proto)
					}
					lose()
				}))
				server.Config.Protocols = new(http.Protocols)
				base := &http.Transport{Protocols: new(http.Protocols)}
				switch protocol {
				case "HTTP/1.1":
					server.Config.Protocols.SetHTTP1(true)
					base.Protocols.SetHTTP1(true)
					server.Start()
				case "h2c":
					server.Config.Protocols.SetUnencryptedHTTP2(true)
					base.Protocols.SetUnencryptedHTTP2(true)
					server.Start()
				case "h2":
					server.Config.Protocols.SetHTTP2(true)
					base.Protocols.SetHTTP2(true)
					server.EnableHTTP2 = true
					server.StartTLS()
					base.TLSClientConfig = &tls.Config{RootCAs: x509.NewCertPool()}
					base.TLSClientConfig.RootCAs.AddCert(server.Certificate())
				}
				t.Cleanup(server.Close)
				transport := client.New(base, quick(func(o *client.Options) { o.AttemptsMax = 2 }))
				t.Cleanup(transport.CloseIdleConnections)
				_, _, err := post(t, &http.Client{Transport: transport}, t.Context(), server.URL, body)
				expectError(t, err, idempotency.OutcomeUnknown, client.ErrAttemptsSpent)
				if arrived.Load() == 0 {
					t.Errorf("nothing arrived: %v", err)
				}
			})
		}
	}
}

// TestErrorsNameTheOption: each error names the option that would have helped.
func TestErrorsNameTheOption(t *testing.T) {
	t.Parallel()
	s := newScript(t, each("lost"))
	_, _, err := post(t, newClient(t, nil), t.Context(), s.server.URL, "body")
	expectError(t, err, idempotency.OutcomeUnknown, client.ErrNotHonoured)
	if !strings.Contains(err.Error(), "Options.Honours") || !strings.Contains(err.Error(), "client.Everywhere") {
		t.Errorf("the error names no remedy: %v", err)
	}
	for _, err := range []error{
		client.ErrAttemptsSpent, client.ErrTimeSpent, client.ErrRetriesSpent, client.ErrAttemptTimedOut, client.ErrBodyTooLarge, client.ErrIntentTooOld,
	} {
		if !strings.Contains(err.Error(), "(Options.") {
			t.Errorf("%q names no option", err)
		}
	}
}

// TestRefusedAnswersAreClosed: an answer longer than AnswerBytesMax, after which the client retries
// or returns an error, releases its connection.
func TestRefusedAnswersAreClosed(t *testing.T) {
	t.Parallel()
	for name, outcome := range map[string]idempotency.Outcome{"asked again": idempotency.OutcomeUnknown, "not executed": idempotency.OutcomeNotExecuted} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const attempts = 3
			left := make(chan struct{}, attempts)
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Idempotency-Status", string(outcome))
				w.WriteHeader(http.StatusServiceUnavailable)
				_, _ = io.WriteString(w, strings.Repeat("x", 64<<10))
				_ = http.NewResponseController(w).Flush()
				<-r.Context().Done() // the client has closed
				left <- struct{}{}
			}))
			t.Cleanup(func() {
				server.CloseClientConnections() // Close waits for those that are open
				server.Close()
			})
			c := newClient(t, quick(func(o *client.Options) {
				o.AnswerBytesMax, o.AttemptsMax, o.AttemptTimeout, o.TotalMax = 1<<10, attempts, time.Hour, time.Hour
			}))
			_, _, err := post(t, c, t.Context(), server.URL, "body")
			expectError(t, err, outcome, client.ErrAttemptsSpent)
			for n := range attempts {
				select {
				case <-left:
				case <-time.After(10 * time.Second):
					t.Fatalf("%d of %d answers were closed when the call had returned", n, attempts)
				}
			}
		})
	}
}

// TestOneKeyTwiceAtOnceIsUnknown: two requests of one client carry the same key. The first is
// refused while the second may be executed, and neither is reported as proven. The intent stays as
// long as the second needs it.
func TestOneKeyTwiceAtOnceIsUnknown(t *testing.T) {
	t.Parallel()
	for name, one := range map[string]struct {
		refusal string
		intents bool
	}{"without intents": {"503 not-executed", false}, "with intents": {"503 not-executed", true}, "an answer about the request": {"401 not-executed", true}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			arrived := make(chan int)
			refuse, execute := make(chan struct{}), make(chan struct{})
			executes := sync.OnceFunc(func() { close(execute) })
			defer executes() // even if the test has failed by then
			s := newScript(t, func(n int, w http.ResponseWriter, r *http.Request) {
				if n <= 2 {
					arrived <- n
				}
				if n == 2 {
					<-execute
					say(w, 201, "executed")
					return
				}
				<-refuse
				each(one.refusal)(n, w, r)
			})
			store := newIntents()
			c := newClient(t, quick(func(o *client.Options) {
				if one.intents {
					o.Intents = store
				}
			}))
			send := func(ctx context.Context) <-chan error {
				result := make(chan error, 1)
				go func() {
					_, _, err := post(t, c, ctx, s.server.URL, "body")
					result <- err
				}()
				return result
			}
			first := send(client.WithNewKey(t.Context(), "mine"))
			<-arrived
			second := send(client.WithKey(t.Context(), "mine"))
			<-arrived
			close(refuse)
			expectError(t, <-first, idempotency.OutcomeUnknown, client.ErrAttemptsSpent)
			if one.intents && store.count() != 1 {
				t.Error("the intent of the second was forgotten while it was on its way")
			}
			executes()
			if err := <-second; err != nil {
				t.Error(err)
			}
		})
	}
}

// TestRequestWaitsForAnIntentThatIsBeingForgotten: otherwise a second request with the key would
// take its intent for saved, and the first would delete it.
func TestRequestWaitsForAnIntentThatIsBeingForgotten(t *testing.T) {
	t.Parallel()
	s := newScript(t, each("503 not-executed", "503 not-executed", "201 executed"))
	store := newIntents()
	c := newClient(t, quick(func(o *client.Options) { o.Intents, o.AttemptsMax = store, 1 }))
	second := make(chan error, 1)
	store.before = func(call string) {
		if call != "abandon" || len(store.calls) > 1 {
			return
		}
		go func() {
			_, _, err := post(t, c, client.WithNewKey(t.Context(), "mine"), s.server.URL, "body")
			second <- err
		}()
		select {
		case err := <-second:
			second <- err
			t.Error("a second request was sent while the first forgot the intent")
		case <-time.After(50 * time.Millisecond): // it waits
		}
	}
	_, _, err := post(t, c, client.WithNewKey(t.Context(), "mine"), s.server.URL, "body")
	expectError(t, err, idempotency.OutcomeNotExecuted, client.ErrAttemptsSpent)
	<-second
	store.mu.Lock()
	defer store.mu.Unlock()
	if calls := strings.Join(store.calls, ","); !strings.HasPrefix(calls, "save,abandon,save") {
		t.Errorf("calls are %s", calls)
	}
}
