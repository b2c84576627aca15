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

// Intent is a request that is to be executed once: all that it takes to send it again. Its body and URL may say what
// nobody else should read. It prints as its key does, as a hash.
type Intent struct {
	Key     idempotency.Key // Value alone
	Method  string
	URL     string      // absolute, without user and password
	Host    string      // of the request, where it is not the URL's; empty
	Header  http.Header // those that are kept (Options.IntentHeaders); never a credential
	Body    []byte
	SavedAt time.Time // as this process's clock would have said
}

// Format keeps key and body out of every verb of fmt.
func (i Intent) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, "intent "+i.Key.String()) } // fmt has no use for the error

// LogValue keeps key and body out of structured logs.
func (i Intent) LogValue() slog.Value { return slog.StringValue("intent " + i.Key.String()) }

// MarshalJSON returns an error, as that of its key does: an IntentStore encodes the fields.
func (i Intent) MarshalJSON() ([]byte, error) {
	return nil, errors.New("idempotency/client: an Intent is not encoded, so that its key and body reach no log by accident: encode its fields")
}

// IntentStore keeps intents across the death of a process. Package client/boltintent keeps them in
// a file, client/pgintent in PostgreSQL. All methods are safe for concurrent use. After an error it
// is not known whether the call took effect.
type IntentStore interface {
	// Save keeps an intent, and returns when it would survive a crash: until then nothing is sent.
	// The store keeps no reference to it, and sets SavedAt itself. before reports that the key was
	// kept already, with the same request (all but SavedAt); with another request the error is
	// [ErrIntentDifferent]. If the same request is saved again, the caller takes the intent over, as by
	// Take. An error that wraps [ErrIntentRefused] means that nothing was changed.
	Save(ctx context.Context, intent *Intent) (before bool, err error)

	// Done forgets the intent of a key that is settled: whoever sends it again changes nothing. A key that is not kept is no
	// error. Where a crash undoes it, the request is sent once more and replayed.
	Done(ctx context.Context, key string) error

	// Abandon forgets the intent of a key whose caller is told that it was not executed, and may do it anew. It returns when
	// that would outlive a crash. It is [ErrIntentTaken] where the intent is not kept, or may be sent by somebody else: then
	// the caller is told that it is unknown.
	Abandon(ctx context.Context, key string) error

	// Pending returns the keys of intents that may be taken, oldest first. A store may return the first of them only, if it
	// comes to the others when those were taken.
	Pending(ctx context.Context) ([]string, error)

	// Take returns the intent of a key for it to be sent again. It is nil where it is not kept any more, or is somebody
	// else's to send. From then on it is the taker's: another's Abandon fails.
	Take(ctx context.Context, key string) (*Intent, error)
}
