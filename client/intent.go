package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"time"

	"github.com/paidonce/idempotency"
)

// Intent is a request to be executed once, with everything needed to send it again. Its body and
// URL may contain secrets. Like its key, it prints as a hash.
type Intent struct {
	Key     idempotency.Key // only Value is set
	Method  string
	URL     string      // absolute, without user and password
	Host    string      // the request's host if it differs from the URL's; else empty
	Header  http.Header // the headers that are kept (Options.IntentHeaders); never a credential
	Body    []byte
	SavedAt time.Time // by this process's clock
}

// Format keeps key and body out of every verb of fmt. It drops the error, for which fmt has no use.
func (i Intent) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "intent "+i.Key.String()) }

// LogValue keeps key and body out of structured logs.
func (i Intent) LogValue() slog.Value { return slog.StringValue("intent " + i.Key.String()) }

// MarshalJSON returns an error, like its key's: an IntentStore must encode the fields.
func (i Intent) MarshalJSON() ([]byte, error) {
	return nil, errors.New("idempotency/client: an Intent is not encoded, so that its key and body reach no log by accident: encode its fields")
}

// IntentStore keeps intents when a process dies. Package client/boltintent keeps them in a file,
// client/pgintent in PostgreSQL. All methods are safe for concurrent use. After an error it is not
// known whether the call took effect.
type IntentStore interface {
	// Save keeps an intent, and returns when it would survive a crash: nothing is sent before. The
	// store keeps no reference to it, and sets SavedAt itself. before reports that the key was kept
	// already, with the same request (all but SavedAt). With another request the error is
	// [ErrIntentDifferent]. A caller that saves the same request again takes the intent over, as by
	// Take. An error that wraps [ErrIntentRefused] means that nothing was changed.
	Save(ctx context.Context, intent *Intent) (before bool, err error)

	// Done forgets the intent of a settled key: sending it again would change nothing. A key that
	// is not kept is no error. If a crash undoes Done, the request is sent once more and replayed.
	Done(ctx context.Context, key string) error

	// Abandon forgets the intent of a key. It is called before the caller gets not-executed, after
	// which the caller may run the request again under a new key. It returns when that would
	// survive a crash. It returns [ErrIntentTaken] if the intent is not kept, or another process
	// may send it: then the caller gets unknown.
	Abandon(ctx context.Context, key string) error

	// Pending returns the keys of intents that may be taken, oldest first. A store may return only
	// the first of them, if it returns the others once those are taken.
	Pending(ctx context.Context) ([]string, error)

	// Take returns the intent of a key to be sent again. It returns nil if the intent is no longer
	// kept, or if another process may send it. From then on the intent belongs to the taker:
	// Abandon by anyone else fails.
	Take(ctx context.Context, key string) (*Intent, error)
}
