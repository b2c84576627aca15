// Package probe examines an HTTP API that claims to honour Idempotency-Key, from outside: it sends
// requests and judges the answers by the rules of a profile.
//
//   - [Run] makes an examination, from the first request to the report
//   - rules.go has the rules, with their levels and sources
//   - cases.go has the cases that judge them, one function each
//   - client.go sends requests byte by byte, so that two can be held back and released at once, and
//     one can be cut off
//   - body.go fills in the body's placeholders and finds another body
//   - effects.go counts effects, at a URL or by the ids in answers
//   - report.go prints the report
//   - mask.go replaces secrets in it
package probe

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Limits of an examination.
const (
	// TimeMax is the longest time that an examination takes.
	TimeMax = 110 * time.Second
	// RequestsMax is the maximum number of requests, including those that count effects.
	RequestsMax = 600
	// RequestsPerSecondMax is the maximum rate, on average. Copies at once are sent together, and
	// followed by a pause.
	RequestsPerSecondMax = 50

	copies       = 8 // sent at once
	copiesRounds = 5
	atOnceRounds = 5
	cutRounds    = 5

	requestTimeout = 10 * time.Second
	answerBytesMax = 4 << 20 // of a body
	headBytesMax   = 1 << 20 // of an answer's header
	cutDelayMax    = 2 * time.Second
)

// Config is the API to examine, and the profile to judge it by. URL, Method and Profile are
// required. Tests set shorter pauses than the defaults.
type Config struct {
	URL     *url.URL
	Method  string
	Profile Profile
	Header  []Field // of every request of the caller
	Body    string  // with placeholders: see newBodies

	// SecondHeader replaces the headers of the same names in the requests of a second caller.
	// Without it the rule key-scoped can't be judged.
	SecondHeader []Field

	// EffectsURL is read with GET and the caller's headers. The JSON pointer EffectsPath
	// (RFC 6901) leads to the number of effects, or to an array with one element for each. If
	// EffectsURL is nil, the ids in answers are compared.
	EffectsURL  *url.URL
	EffectsPath string

	// AnyHost allows hosts that are not this machine.
	AnyHost bool

	// Progress is called with the name of each case before it begins. Nil is allowed.
	Progress func(name string)

	// Keep is the minimum age of an answer at its last retry. Defaults to 10 seconds.
	Keep time.Duration
	// Patience is the maximum time for retries of a request that is refused with 429, and of one that
	// was cut off or sent in copies until its answer is not 409, 425, 429 or 5xx. Defaults to 12
	// seconds.
	Patience time.Duration
	// EffectsWait is the maximum wait for an effect that is late. Defaults to 5 seconds.
	EffectsWait time.Duration
	// Settle is the pause before effects are counted again, to find one too many. Defaults to 200
	// milliseconds.
	Settle time.Duration
	// Interval is the mean time between two requests. Defaults to 20 milliseconds: see
	// RequestsPerSecondMax.
	Interval time.Duration
	// TimeMax and RequestsMax default to the constants, which are also their maximum.
	TimeMax     time.Duration
	RequestsMax int
}

// Field is one header line.
type Field struct{ Name, Value string }

// reserved are the headers that the examination sets itself.
var reserved = []string{"Idempotency-Key", "Content-Length", "Transfer-Encoding", "Connection", "Expect", "Upgrade"}

// Validate returns an error if the configuration can't be used. The error's text quotes no URL,
// path, body or header value.
func (c *Config) Validate() error {
	for i, u := range []*url.URL{c.URL, c.EffectsURL} {
		switch {
		case u == nil && i == 1: // it is optional
		case u == nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "":
			return errors.New("the URL must begin with http:// or https:// and name a host")
		case strings.ContainsFunc(u.RequestURI(), func(r rune) bool { return r <= ' ' || r > '~' }):
			return errors.New("the URL's query must be percent-encoded")
		case u.User != nil:
			return errors.New("put the credentials of the URL into --header 'Authorization: ...', which is masked in all output")
		}
	}
	if !token(c.Method) {
		return errors.New("--method is not a method of HTTP")
	}
	if !slices.Contains(Profiles, c.Profile) {
		return fmt.Errorf("--profile is one of %v", Profiles)
	}
	for _, f := range slices.Concat(c.Header, c.SecondHeader) {
		if !token(f.Name) || strings.ContainsAny(f.Value, "\r\n\x00") {
			return errors.New("a header is not 'Name: value' on one line")
		}
		if slices.ContainsFunc(reserved, func(name string) bool { return strings.EqualFold(name, f.Name) }) {
			return fmt.Errorf("%s is set by the examination itself", http.CanonicalHeaderKey(f.Name))
		}
	}
	if c.EffectsPath != "" && !strings.HasPrefix(c.EffectsPath, "/") {
		return errors.New("--effects-path is a JSON pointer, such as /transfers")
	}
	if c.EffectsPath != "" && c.EffectsURL == nil {
		return errors.New("--effects-path needs --effects-url")
	}
	return nil
}

// token reports whether text is a token of RFC 9110, as names of headers and methods are.
func token(text string) bool {
	return text != "" && !strings.ContainsFunc(text, func(r rune) bool {
		letter := r|0x20 >= 'a' && r|0x20 <= 'z'
		return !letter && (r < '0' || r > '9') && !strings.ContainsRune("!#$%&'*+-.^_`|~", r)
	})
}

// Run examines the API and returns the report. If ctx ends or a limit is reached, the remaining
// rules are not judged. The error is that of [Config.Validate].
func Run(ctx context.Context, config Config) (*Report, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	config.Keep = cmp.Or(config.Keep, 10*time.Second)
	config.Patience = cmp.Or(config.Patience, 12*time.Second)
	config.EffectsWait = cmp.Or(config.EffectsWait, 5*time.Second)
	config.Settle = cmp.Or(config.Settle, 200*time.Millisecond)
	config.Interval = cmp.Or(config.Interval, time.Second/RequestsPerSecondMax)
	config.TimeMax = min(cmp.Or(config.TimeMax, TimeMax), TimeMax)
	config.RequestsMax = min(cmp.Or(config.RequestsMax, RequestsMax), RequestsMax)
	limited, cancel := context.WithTimeoutCause(ctx, config.TimeMax, fmt.Errorf("the time of %v is used up", config.TimeMax))
	defer cancel()

	e := newExaminer(config)
	for _, c := range e.cases() {
		if config.Progress != nil {
			config.Progress(c.name)
		}
		err := c.examine(limited)
		switch {
		case err == nil:
			continue
		case ctx.Err() != nil:
			err = errors.New("it was interrupted")
		case limited.Err() != nil:
			err = context.Cause(limited)
		}
		e.stop(err)
		break
	}
	return e.report(), nil
}
