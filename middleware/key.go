package middleware

import (
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/dunglas/httpsfv"

	"github.com/paidonce/idempotency"
)

var errKeyMissing = errors.New("key is missing")

// keyValue returns the key from the headers. It is an RFC 8941 string, "8e03978e", or the bare
// 8e03978e, which most clients send and a strict parser refuses if it begins with a digit. Both are
// the same key.
func keyValue(header http.Header, bytesMin, bytesMax int) (string, error) {
	values := header.Values("Idempotency-Key")
	switch len(values) {
	case 0:
		return "", errKeyMissing
	case 1:
	default:
		return "", fmt.Errorf("%w: there are %d headers", idempotency.ErrKeyInvalid, len(values))
	}
	value := strings.Trim(values[0], " \t")
	switch inside, quoted := strings.CutPrefix(value, `"`); {
	case !quoted:
	case strings.IndexAny(inside, `"\`) == len(inside)-1 && strings.HasSuffix(inside, `"`):
		// Nothing in the key is escaped.
		value = inside[:len(inside)-1]
	default:
		item, err := httpsfv.UnmarshalItem([]string{value})
		unquoted, ok := item.Value.(string)
		if err != nil || !ok || len(item.Params.Names()) > 0 {
			return "", fmt.Errorf("%w: it is not a quoted string and nothing else", idempotency.ErrKeyInvalid)
		}
		value = unquoted
	}
	if err := idempotency.ValidateKeyValue(value); err != nil {
		return "", err
	}
	if len(value) < bytesMin || len(value) > bytesMax {
		return "", fmt.Errorf("%w: it has %d characters, and must have %d to %d", idempotency.ErrKeyInvalid, len(value), bytesMin, bytesMax)
	}
	return value, nil
}
