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

// WithKey returns a context with the caller's key, which its request carries in place of a minted
// one: to continue with a key after [ErrUnknown], or because the caller keeps the key with its
// purpose. The key may have been sent before, so a request without an answer never ends with
// [ErrNotExecuted]. Use the context for one request: all requests with it share the key. The
// request's own Idempotency-Key header does the same, and takes precedence. That header is sent
// unchanged, unless intents are kept: those are resumed with keys in the spelling of
// Options.BareKeys.
//
// A key is 1 to idempotency.KeyBytesMax visible ASCII characters without comma, space and quote.
// With an invalid key nothing is sent.
func WithKey(ctx context.Context, key string) context.Context {
	return context.WithValue(ctx, contextKey{}, ownKey{value: key})
}

// WithNewKey is [WithKey] for a key that was never sent before, as the caller promises: then
// [ErrNotExecuted] can be proven. If the promise is untrue, a caller may get not-executed for a
// request that was executed.
func WithNewKey(ctx context.Context, key string) context.Context {
	return context.WithValue(ctx, contextKey{}, ownKey{value: key, isNew: true})
}

// KeyFrom returns the key that an answer's request carried, minted or not, or "" if it carried
// none. For a request without an answer see [Error].
func KeyFrom(response *http.Response) string {
	if response == nil || response.Request == nil {
		return ""
	}
	key, _ := keyOf(response.Request.Header) // "" without a key, or with an invalid one
	return key
}

// keyOf returns the key in a header, or "". Both spellings are the same key.
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

// quote spells a key as a string of RFC 8941, as the header's definition demands. A strict parser
// refuses a bare UUIDv7, because it begins with a digit, as a number does.
func quote(key string) string { return `"` + strings.ReplaceAll(key, `\`, `\\`) + `"` }

// unquote is the inverse of quote. Within a key only a backslash is ever escaped.
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

// mint makes a key: a UUIDv7, so that keys of one time are neighbours in the server's index.
func mint() (string, error) {
	id, err := uuid.NewV7()
	if err != nil {
		return "", fmt.Errorf("make a key: %w", err)
	}
	return id.String(), nil
}
