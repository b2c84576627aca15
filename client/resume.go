package client

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/textproto"
	"net/url"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/paidonce/idempotency"
)

// Resumed is the result of one intent.
type Resumed struct {
	Intent *Intent
	// Response is executed, replayed or mismatch, with its body read; nil if there is no such
	// answer.
	Response *http.Response
	Err      error // an *Error, always ErrUnknown: the intent is still kept
}

// Report has the results of [Transport.Resume].
type Report struct {
	Settled int // intents that have their answer and were forgotten
	Kept    int // intents without an answer yet, or with a failed handle
}

// Resume sends pending intents again, each until it is settled or its attempts are spent, and
// [ResumeAtOnce] at a time: the intents of a process that died, and those that ended with
// [ErrUnknown]. A service calls it when it starts, and from time to time. It skips intents that are
// under way in this Transport.
//
// Resume calls handle for each, from several goroutines at once; handle may be nil. It handles an
// answer before it forgets the intent: if handle fails, or the process dies, the answer is handled
// again, and then it is a replay. A mismatch is a bug of the caller: its key belongs to another
// request, and sending it again would not help. An intent older than [Options.IntentAgeMax] is
// handled with [ErrIntentTooOld] and kept, for a person to check: its key may be new at the server,
// and its request may have been executed.
//
// The error is that of the store, of handle, or of ctx.
func (t *Transport) Resume(ctx context.Context, handle func(ctx context.Context, r *Resumed) error) (Report, error) {
	if t.options.Intents == nil {
		return Report{}, errors.New("idempotency/client: Resume needs Options.Intents")
	}
	keys, err := t.options.Intents.Pending(ctx)
	if err != nil {
		return Report{}, fmt.Errorf("list the intents: %w", err)
	}
	var mu sync.Mutex
	var report Report
	var failed []error
	var group sync.WaitGroup
	places := make(chan struct{}, ResumeAtOnce)
	for _, key := range keys {
		if ctx.Err() != nil {
			break
		}
		places <- struct{}{}
		group.Go(func() {
			defer func() { <-places }()
			settled, kept, err := t.resumeOne(ctx, key, handle)
			mu.Lock()
			defer mu.Unlock()
			if settled {
				report.Settled++
			}
			if kept {
				report.Kept++
			}
			if err != nil {
				failed = append(failed, err)
			}
		})
	}
	group.Wait()
	if err := ctx.Err(); err != nil {
		failed = append(failed, err)
	}
	return report, errors.Join(failed...)
}

func (t *Transport) resumeOne(ctx context.Context, key string, handle func(context.Context, *Resumed) error) (settled, kept bool, err error) {
	if !t.flights.enterAlone(key) {
		return false, false, nil
	}
	defer t.flights.leave(key)
	// Only now: since the key was listed, its caller may have got not-executed.
	intent, err := t.options.Intents.Take(ctx, key)
	if err != nil {
		return false, true, fmt.Errorf("take an intent: %w", err)
	}
	if intent == nil {
		return false, false, nil
	}
	op := newOperation(ctx)
	op.key, op.saved, op.maybe = intent.Key, true, true
	resumed := &Resumed{Intent: intent}
	response, err := t.resend(op, intent)
	switch {
	case err != nil:
		resumed.Err = t.end(op, nil, err)
	case !settles(op.last):
		resumed.Err = t.end(op, response, ErrNotHonoured)
	default:
		resumed.Response = response
		defer func() { _ = response.Body.Close() }() // handle may have closed it
	}
	if handle != nil {
		if err := handle(ctx, resumed); err != nil {
			return false, true, fmt.Errorf("handle a resumed intent: %w", err)
		}
	}
	if resumed.Err != nil {
		return false, true, nil
	}
	t.done(op)
	t.trace(op, Event{Kind: EventEnded, Attempt: op.attempts, Status: op.status, Outcome: op.last, Took: time.Since(op.started)})
	return true, false, nil
}

// resend sends an intent's request.
func (t *Transport) resend(op *operation, intent *Intent) (*http.Response, error) {
	switch age := time.Since(intent.SavedAt); {
	case age >= t.options.IntentAgeMax:
		return nil, fmt.Errorf("%w: it was saved %v ago", ErrIntentTooOld, age.Round(time.Second))
	case age < -IntentSkewMax:
		return nil, fmt.Errorf("%w: it was saved in %v from now, says a clock that was set back since", ErrIntentTooOld, -age.Round(time.Second))
	}
	r, err := http.NewRequestWithContext(op.ctx, intent.Method, intent.URL, nil)
	if err != nil {
		return nil, errors.New("the intent is not a request") // url's error would quote the URL
	}
	r.Header = intent.Header.Clone()
	if r.Header == nil {
		r.Header = http.Header{}
	}
	r.Host = intent.Host
	spelt := intent.Key.Value
	if !t.options.BareKeys {
		spelt = quote(spelt)
	}
	r.Header.Set(HeaderKey, spelt)
	if err := sendable(r); err != nil {
		return nil, err
	}
	op.request = r
	op.setBody(intent.Body)
	if op.honoured = t.honours(r); !op.honoured {
		return nil, ErrNotHonoured
	}
	return t.send(op)
}

// intentOf returns the intent of a request. It refuses a request that would differ when it is
// resumed.
func (t *Transport) intentOf(op *operation) (*Intent, error) {
	r := op.request
	address := *r.URL
	address.User = nil // a credential
	address.Fragment, address.RawFragment = "", ""
	intent := &Intent{Key: op.key, Method: r.Method, URL: address.String(), Header: http.Header{}, Body: op.bytes}
	if again, err := url.Parse(intent.URL); err != nil || again.Scheme != address.Scheme || again.Host != address.Host || again.RequestURI() != address.RequestURI() {
		return nil, fmt.Errorf("%w: its URL can't be written down: leave out Opaque", ErrIntentRefused)
	}
	if r.Host != r.URL.Host {
		intent.Host = r.Host
	}
	var unknown []string
	for _, name := range slices.Sorted(maps.Keys(r.Header)) {
		switch canonical := textproto.CanonicalMIMEHeaderKey(name); {
		case slices.Contains(t.options.IntentHeaders, canonical):
			intent.Header[canonical] = append(intent.Header[canonical], r.Header[name]...)
		case !slices.Contains(t.options.IntentHeadersOmitted, canonical) && canonical != HeaderKey:
			unknown = append(unknown, canonical)
		}
	}
	if unknown != nil {
		return nil, fmt.Errorf("%w: it would be resumed without %s: name each in Options.IntentHeaders to have it kept, "+
			"or in IntentHeadersOmitted if the base RoundTripper adds it or it decides nothing", ErrIntentRefused, strings.Join(unknown, ", "))
	}
	return intent, nil
}

// done forgets a settled intent. If that fails, the intent is sent once more, and replayed.
func (t *Transport) done(op *operation) {
	if !op.saved {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(op.ctx), SettleTimeout)
	defer cancel()
	if err := t.options.Intents.Done(ctx, op.key.Value); err != nil {
		t.trace(op, Event{Kind: EventKept, Attempt: op.attempts, Outcome: op.last, Err: err})
	}
}

// abandon forgets an intent before its caller gets not-executed.
func (t *Transport) abandon(op *operation) error {
	if !op.saved || op.savedBefore { // an earlier call left it behind, and does not know its outcome
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(op.ctx), SettleTimeout)
	defer cancel()
	if err := t.options.Intents.Abandon(ctx, op.key.Value); err != nil {
		t.trace(op, Event{Kind: EventKept, Attempt: op.attempts, Outcome: idempotency.OutcomeNotExecuted, Err: err})
		return fmt.Errorf("abandon the intent: %w", err)
	}
	op.saved = false
	return nil
}
