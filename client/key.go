package client

import (
	"context"
	"fmt"
	"net/http"
	"strings"

	"github.com/google/uuid"

	"github.com/paidonce/idempotency"
)

// HeaderKey is the header that carries a key.
const HeaderKey = "Idempotency-Key"

type contextKey struct{}

// ownKey is a key that the caller chose.
type ownKey struct {
	value string
	isNew bool
}

// WithKey returns a context whose requests carry a key of the caller's in place of a minted one: to go on with a key
// after [ErrUnknown], or because the caller keeps it with what it is for. It may have been sent before, so a request
// that gets no answer is never said to be [ErrNotExecuted]. The context is for one request: all that carry it share the
// key. An Idempotency-Key header of the request's own does the same, and wins. It is sent as it is, but where intents are kept,
// which are resumed with keys that are spelt as Options.BareKeys says.
//
// A key is 1 to idempotency.KeyBytesMax visible ASCII characters without comma, space and quote; with another one
// nothing is sent.
func WithKey(ctx context.Context, key string) context.Context {
	return context.WithValue(ctx, contextKey{}, ownKey{value: key})
}

// WithNewKey is [WithKey] with the caller's word that no request with the key was ever sent, by anybody: then
// [ErrNotExecuted] can be proven. Where the word is wrong a caller may be told to give up what was executed.
func WithNewKey(ctx context.Context, key string) context.Context {
	return context.WithValue(ctx, contextKey{}, ownKey{value: key, isNew: true})
}

// KeyFrom returns the key that an answer's request carried, minted or not, and "" where it carried none. For a request
// without an answer see [Error].
func KeyFrom(response *http.Response) string {
	if response == nil || response.Request == nil {
		return ""
	}
	key, _ := keyOf(response.Request.Header) // without one, or with one that is none, there is no key
	return key
}

// keyOf returns the key of a header, "" where there is none. Both spellings are the same key.
func keyOf(header http.Header) (string, error) {
	values := header.Values(HeaderKey)
	switch len(values) {
	case 0:
		return "", nil
	case 1:
	default:
		return "", fmt.Errorf("%w: there are %d headers", idempotency.ErrKeyInvalid, len(values))
	}
	key := strings.Trim(values[0], " \t")
	if strings.HasPrefix(key, `"`) {
		unquoted, ok := unquote(key)
		if !ok {
			return "", fmt.Errorf("%w: it is not a quoted string and nothing else", idempotency.ErrKeyInvalid)
		}
		key = unquoted
	}
	if err := idempotency.ValidateKeyValue(key); err != nil {
		return "", err
	}
	return key, nil
}

// quote spells a key as a string of RFC 8941, which is what the header is to be. A strict parser refuses a bare UUIDv7:
// it begins with a digit, as a number would.
func quote(key string) string { return `"` + strings.ReplaceAll(key, `\`, `\\`) + `"` }

// unquote is the inverse of quote. Within a key only the backslash is ever escaped.
func unquote(text string) (key string, ok bool) {
	inside, ok := strings.CutSuffix(text[1:], `"`)
	if !ok {
		return "", false
	}
	var b strings.Builder
	for i := 0; i < len(inside); i++ {
		switch c := inside[i]; c {
		case '"':
			return "", false
		case '\\':
			i++
			if i == len(inside) || inside[i] != '\\' && inside[i] != '"' {
				return "", false
			}
			b.WriteByte(inside[i])
		default:
			b.WriteByte(c)
		}
	}
	return b.String(), true
}

// mint makes a key: a UUIDv7, whose neighbours in time are neighbours in the server's index.
func mint() (string, error) {
	id, err := uuid.NewV7()
	if err != nil {
		return "", fmt.Errorf("make a key: %w", err)
	}
	return id.String(), nil
}
