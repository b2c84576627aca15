package bank

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/paidonce/idempotency/effect"
)

// Facts about the processor, for the calls of package effect.
const (
	// KeyLifetimeDefault is the time for which the processor surely knows a key.
	KeyLifetimeDefault = 24 * time.Hour
	// KeyLifetimeMin is the shortest lifetime that package effect accepts for callTimeout.
	KeyLifetimeMin = 10 * callTimeout
	// BackoffMax is the longest pause between two runs of a request that is open.
	BackoffMax = 5 * time.Second

	callTimeout = 5 * time.Second
	settleAfter = 5 * time.Second

	answerBytesMax = 1 << 20
	listBytesMax   = 1 << 28
	listTimeout    = 5 * time.Second // for the audit
	idleTimeout    = 5 * time.Second // of a connection
)

// instanceHeader is in every answer of the processor: the id of its instance.
const instanceHeader = "Processor-Instance"

// Processor is the card processor, bank rail and mail service that the bank calls, over HTTP. It is
// safe for concurrent use.
type Processor struct {
	url  string
	http *http.Client

	charge *effect.Declared[chargeOrder, executed]
	payout *effect.Declared[payoutOrder, executed]
	mail   *effect.Declared[mail, executed]
}

// ProcessorOptions describe a processor.
type ProcessorOptions struct {
	// URL is the base of the processor's URLs.
	URL string
	// KeyLifetime is the time for which the processor surely knows a key, at least KeyLifetimeMin.
	// Zero means KeyLifetimeDefault.
	KeyLifetime time.Duration
	// Transport makes the requests. Defaults to a new one from NewTransport.
	Transport http.RoundTripper
}

// ErrProcessorURL means that the URL of a processor can't be used.
var ErrProcessorURL = errors.New("it must be an http or https URL with a host")

// NewProcessor returns a processor, without calling it. It returns [ErrProcessorURL] if the URL
// can't be used.
func NewProcessor(o ProcessorOptions) (*Processor, error) {
	parsed, err := url.Parse(o.URL)
	if err != nil || parsed.Scheme != "http" && parsed.Scheme != "https" || parsed.Host == "" {
		return nil, ErrProcessorURL
	}
	if o.KeyLifetime == 0 {
		o.KeyLifetime = KeyLifetimeDefault
	}
	if o.Transport == nil {
		o.Transport = NewTransport()
	}
	p := &Processor{url: strings.TrimRight(o.URL, "/"), http: &http.Client{
		Transport: o.Transport,
		// A second request would hide the outcome of the first.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	p.charge = effect.New("charge", keyed[chargeOrder](p, "/charges", o.KeyLifetime))
	p.payout = effect.New("payout", keyed[payoutOrder](p, "/payouts", o.KeyLifetime))
	p.mail = effect.New("mail", effect.Effect[mail, executed]{
		Do:      func(ctx context.Context, _ string, in mail) (executed, error) { return p.send(ctx, "/mails", "", in) },
		Timeout: callTimeout, SettleAfter: settleAfter, AtMostOnce: true,
	})
	return p, nil
}

// keyed returns the effect of a request that the processor recognizes by its key. KeepsDeclines
// stays false, because the processor's faults can make it forget declines.
func keyed[In any](p *Processor, path string, keyLifetime time.Duration) effect.Effect[In, executed] {
	return effect.Effect[In, executed]{
		Do:      func(ctx context.Context, key string, in In) (executed, error) { return p.execute(ctx, path, key, in) },
		Lookup:  func(ctx context.Context, key string, _ In) (executed, error) { return p.find(ctx, path, key) },
		Timeout: callTimeout, KeyLifetime: keyLifetime, SettleAfter: settleAfter,
	}
}

// NewTransport returns the transport of a [Processor]. It uses no proxy, and closes connections
// that are idle for 5 seconds, so that a bank at rest holds none.
func NewTransport() *http.Transport {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.Proxy, transport.IdleConnTimeout = nil, idleTimeout
	return transport
}

// Close ends idle connections to the processor.
func (p *Processor) Close() { p.http.CloseIdleConnections() }

// The inputs of the calls. They are recorded and sent as the same JSON, that of the processor's
// API.
type (
	chargeOrder struct {
		Card      string `json:"card"`
		Amount    int64  `json:"amount"`
		Reference string `json:"reference"`
	}
	payoutOrder struct {
		IBAN      string `json:"iban"`
		Amount    int64  `json:"amount"`
		Reference string `json:"reference"`
	}
	mail struct {
		To   string `json:"to"`
		Text string `json:"text"`
	}
)

// executed is the recorded result of a call. A mail has no amount.
type executed struct {
	ID       string `json:"id"`
	Amount   int64  `json:"amount"`
	Instance string `json:"instance"` // of the processor that executed it
}

// refusals are the processor's codes for a definite no: nothing was done.
var refusals = map[int]string{
	http.StatusPaymentRequired:     "card_declined",
	http.StatusUnprocessableEntity: "payout_refused",
}

// ErrKept is the error of a 500. The processor repeats it to every request with the same key.
var ErrKept = errors.New("the processor answers 500 to this key, now and later")

// execute sends a request that writes.
func (p *Processor) execute(ctx context.Context, path, key string, in any) (executed, error) {
	out, err := p.send(ctx, path, key, in)
	if !errors.Is(err, ErrKept) {
		return out, err
	}
	// Another send gets the same 500. Only a look-up may find a result.
	switch found, missed := p.find(ctx, path, key); {
	case missed == nil:
		return found, nil
	case errors.Is(missed, effect.ErrAbsent):
		return executed{}, effect.Park("the processor answers 500 to its key, now and later, and does not list it", err)
	}
	return executed{}, err
}

func (p *Processor) send(ctx context.Context, path, key string, in any) (out executed, err error) {
	body, err := json.Marshal(in)
	if err != nil {
		return out, effect.NotSent(err)
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, p.url+path, bytes.NewReader(body))
	if err != nil {
		return out, effect.NotSent(err)
	}
	r.GetBody = nil // otherwise net/http may send it again by itself
	r.Header.Set("Content-Type", "application/json")
	if key != "" {
		r.Header.Set("Idempotency-Key", key)
	}
	response, err := p.http.Do(r)
	if err != nil {
		return out, effect.FromHTTP(nil, err)
	}
	defer func() { _ = response.Body.Close() }()
	content, err := io.ReadAll(io.LimitReader(response.Body, answerBytesMax))
	if err != nil {
		return out, fmt.Errorf("the processor's answer %d was cut off: %w", response.StatusCode, err)
	}
	var problem struct {
		Error string `json:"error"`
	}
	_ = json.Unmarshal(content, &problem) // else it has no code
	said := fmt.Errorf("the processor answered %d %.64q", response.StatusCode, problem.Error)
	switch status := response.StatusCode; {
	case status == http.StatusCreated || status == http.StatusAccepted:
		if err := json.Unmarshal(content, &out); err != nil || out.ID == "" {
			return executed{}, fmt.Errorf("the processor's answer %d can't be read", status)
		}
		out.Instance = response.Header.Get(instanceHeader)
		return out, nil
	case problem.Error != "" && refusals[status] == problem.Error:
		return out, effect.Declined(said, nil)
	case status == http.StatusBadRequest: // a key that was used with another body, or our mistake
		return out, effect.Park("the processor answers 400: another body under its key, or a mistake of ours", said)
	case status == http.StatusInternalServerError:
		return out, ErrKept
	}
	return out, said
}

// Notify sends a mail under a key, unless one was sent under it before. The processor sends a mail
// for each request that it gets, so Notify looks the key up first. After an error the mail may have
// been sent. After [ErrKept] another call would end the same way. At most one call per key may be
// under way.
func (p *Processor) Notify(ctx context.Context, key string, n Notice) error {
	if _, err := p.find(ctx, "/mails", key); !errors.Is(err, effect.ErrAbsent) {
		return err
	}
	return p.NotifyUnseen(ctx, key, n)
}

// NotifyUnseen sends a mail under a key, whether or not one was sent under it before.
func (p *Processor) NotifyUnseen(ctx context.Context, key string, n Notice) error {
	_, err := p.send(ctx, "/mails", key, mail(n))
	return err
}

// find looks up the result of a call by its key.
func (p *Processor) find(ctx context.Context, path, key string) (executed, error) {
	items, instance, err := p.list(ctx, path+"?key="+url.QueryEscape(key))
	switch {
	case err != nil:
		return executed{}, err
	case len(items) == 0:
		return executed{}, effect.ErrAbsent
	}
	return executed{ID: items[0].ID, Amount: items[0].Amount, Instance: instance}, nil
}

// item is an item of the processor's lists.
type item struct {
	ID     string `json:"id"`
	Amount int64  `json:"amount"`
	Key    string `json:"key"`
}

// list reads a list of the processor, oldest first, and the id of its instance.
func (p *Processor) list(ctx context.Context, path string) (items []item, instance string, err error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, p.url+path, nil)
	if err != nil {
		return nil, "", err
	}
	response, err := p.http.Do(r)
	if err != nil {
		return nil, "", err
	}
	defer func() { _ = response.Body.Close() }()
	if response.StatusCode != http.StatusOK {
		return nil, "", fmt.Errorf("the processor answered %d", response.StatusCode)
	}
	var list struct {
		Items []item `json:"items"`
	}
	if err := json.NewDecoder(io.LimitReader(response.Body, listBytesMax)).Decode(&list); err != nil {
		return nil, "", fmt.Errorf("the processor's list can't be read: %w", err)
	}
	return list.Items, response.Header.Get(instanceHeader), nil
}
