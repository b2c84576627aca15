package client

import (
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"
)

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// While a machine is suspended its monotonic clock stands still: by that clock no time has passed
// when the machine resumes, although the key may be new at the server by then. A clock that is set
// back does not lengthen the time either.
func TestMachineThatWasSuspendedDoesNotSendAgain(t *testing.T) {
	t.Parallel()
	for name, shift := range map[string]func(op *operation){
		"suspended for a day":                   func(op *operation) { op.began = op.began.Add(-25 * time.Hour) },
		"stopped for a day, its clock set back": func(op *operation) { op.started = op.started.Add(-25 * time.Hour) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var op *operation
			sent := 0
			transport := New(roundTrip(func(*http.Request) (*http.Response, error) {
				sent++
				shift(op)
				return nil, errors.New("connection lost")
			}), &Options{Honours: Everywhere, BackoffFirst: 1, BackoffMax: 1})
			r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://bank.example/", strings.NewReader("body"))
			if err != nil {
				t.Fatal(err)
			}
			if op, err = transport.prepare(r); err != nil {
				t.Fatal(err)
			}
			response, err := transport.send(op)
			if response != nil {
				_ = response.Body.Close()
			}
			if sent != 1 || !errors.Is(err, ErrTimeSpent) {
				t.Errorf("sent %d times: %v", sent, err)
			}
		})
	}
}
