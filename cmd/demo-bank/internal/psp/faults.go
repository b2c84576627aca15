package psp

import (
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"time"
)

// Limits of [Faults].
const (
	DelayMax       = 10 * time.Minute
	KeyLifetimeMax = 366 * 24 * time.Hour
)

// Faults are the ways in which the processor misbehaves. Probabilities are from 0 to 1. They apply
// to requests that write. [FaultsDefault] returns those of a good processor.
type Faults struct {
	// Seed decides the requests that a probability meets. The same seed and the same sequence of
	// requests under a key give the same faults, whatever other keys do meanwhile.
	Seed uint64 `json:"seed"`

	// LoseRequest resets the connection, and nothing is applied.
	LoseRequest float64 `json:"lose_request"`

	// LoseReply applies the request, then resets the connection.
	LoseReply float64 `json:"lose_reply"`

	// ErrorAfter applies the request, then answers 504.
	ErrorAfter float64 `json:"error_after"`

	// ErrorBefore answers 503, and nothing is applied.
	ErrorBefore float64 `json:"error_before"`

	// SlowMS delays each request before it is applied. A client that hangs up in between does not
	// stop it.
	SlowMS int64 `json:"slow_ms"`

	// Late resets the connection, and applies the request LateMS later. Until then the key is under
	// way. A request that would only repeat an answer is never late.
	Late   float64 `json:"late"`
	LateMS int64   `json:"late_ms"`

	// SameError answers 500 to the first request under a key and to every later one, and nothing is
	// applied. Setting other faults later does not change that. Requests without a key don't meet
	// it.
	SameError float64 `json:"same_error"`

	// Down resets every connection, except on the route of the faults: otherwise Down could not be
	// ended.
	Down bool `json:"down"`

	// KeyLifetimeS is the time in seconds for which a key and its answer are kept. Afterwards the
	// key is new. Defaults to 86,400, a day.
	KeyLifetimeS float64 `json:"key_lifetime_s"`

	// KeepsDeclines repeats a refusal under its key. If it is false, a refused request leaves
	// nothing, and the next one under its key is decided by itself. Defaults to true.
	KeepsDeclines bool `json:"keeps_declines"`

	// LookupLagMS hides an item from the list of its key while it is younger.
	LookupLagMS int64 `json:"lookup_lag_ms"`
}

// FaultsDefault returns the faults of a good processor: none.
func FaultsDefault() Faults { return Faults{Seed: 1, KeyLifetimeS: 86400, KeepsDeclines: true} }

// decodeFaults reads the body of PUT /faults. Absent fields have their default.
func decodeFaults(body []byte) (Faults, error) {
	f := FaultsDefault()
	if err := decodeObject(body, &f); err != nil {
		return Faults{}, err
	}
	return f, f.validate()
}

func (f *Faults) validate() error {
	for _, p := range []struct {
		name  string
		value float64
	}{
		{"lose_request", f.LoseRequest}, {"lose_reply", f.LoseReply}, {"error_after", f.ErrorAfter},
		{"error_before", f.ErrorBefore}, {"late", f.Late}, {"same_error", f.SameError},
	} {
		if p.value < 0 || p.value > 1 {
			return fmt.Errorf("%s must be a probability from 0 to 1", p.name)
		}
	}
	for _, ms := range []struct {
		name  string
		value int64
	}{{"slow_ms", f.SlowMS}, {"late_ms", f.LateMS}, {"lookup_lag_ms", f.LookupLagMS}} {
		if ms.value < 0 || ms.value > DelayMax.Milliseconds() {
			return fmt.Errorf("%s must be from 0 to %d", ms.name, DelayMax.Milliseconds())
		}
	}
	if f.KeyLifetimeS < 0 || f.KeyLifetimeS > KeyLifetimeMax.Seconds() {
		return fmt.Errorf("key_lifetime_s must be from 0 to %.0f", KeyLifetimeMax.Seconds())
	}
	return nil
}

func (f *Faults) slow() time.Duration      { return time.Duration(f.SlowMS) * time.Millisecond }
func (f *Faults) late() time.Duration      { return time.Duration(f.LateMS) * time.Millisecond }
func (f *Faults) lookupLag() time.Duration { return time.Duration(f.LookupLagMS) * time.Millisecond }
func (f *Faults) keyLifetime() time.Duration {
	return time.Duration(f.KeyLifetimeS * float64(time.Second))
}

// draw holds the faults that one request meets, and the delays that were in force when it came.
type draw struct {
	loseRequest, errorBefore, sameError, late, loseReply, errorAfter bool
	slowFor, lateFor                                                 time.Duration
}

// draw returns the faults of the nth request under a name.
func (f *Faults) draw(name keyName, n uint64) draw {
	seed := sha256.Sum256(fmt.Appendf(nil, "%d\x00%s\x00%s\x00%d", f.Seed, name.kind, name.key, n))
	source := rand.New(rand.NewChaCha8(seed))
	// All faults are drawn, even those with probability 0: so a change of one probability does not
	// change which requests the others hit.
	hit := func(p float64) bool { return source.Float64() < p }
	return draw{
		loseRequest: hit(f.LoseRequest), errorBefore: hit(f.ErrorBefore), sameError: hit(f.SameError) && name.key != "",
		late: hit(f.Late), loseReply: hit(f.LoseReply), errorAfter: hit(f.ErrorAfter),
		slowFor: f.slow(), lateFor: f.late(),
	}
}
