package rpc

import (
	"errors"
	"fmt"
	"strings"

	"github.com/dunglas/httpsfv"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/paidonce/idempotency"
)

// The names of the metadata.
const (
	HeaderKey       = "idempotency-key"        // of a request: its key
	HeaderStatus    = "idempotency-status"     // of a reply: its outcome
	HeaderReplayed  = "idempotent-replayed"    // of a replay: "true"
	HeaderCreatedAt = "idempotency-created-at" // of a replay: the record's times (RFC 3339)
	HeaderExpiresAt = "idempotency-expires-at"

	// TrailerCode is in the trailers of each reply, and repeats its code as a number. If the caller's
	// gRPC returns another code, it has made that one itself, because a part of the reply was lost or
	// could not be read. Nothing else tells the two apart.
	TrailerCode = "idempotency-code"
)

// KeyFieldDefault is the name of the field that carries a request's id in Google's API guidelines
// (AIP-155).
const KeyFieldDefault = "request_id"

// ErrKeyMissing means that a call came without a key.
var ErrKeyMissing = errors.New("key is missing")

// ErrKeysDiffer means that the metadata and the message of a call have different keys.
var ErrKeysDiffer = errors.New("metadata and message differ")

// Key returns the key of a call: the value of the metadata [HeaderKey], bare or as a quoted string
// (RFC 8941), or the value of the message's string field with this name. The error is
// [ErrKeyMissing] if there is neither. It wraps [idempotency.ErrKeyInvalid] if the two differ (then
// also [ErrKeysDiffer]), if there are several values of the metadata, or if the key can't be stored.
// It quotes no key.
func Key(values []string, message proto.Message, field protoreflect.Name) (string, error) {
	fromField := FieldKey(message, field)
	if len(values) > 1 {
		return "", fmt.Errorf("%w: there are %d values of %s", idempotency.ErrKeyInvalid, len(values), HeaderKey)
	}
	if len(values) == 0 {
		if fromField == "" {
			return "", ErrKeyMissing
		}
		return fromField, idempotency.ValidateKeyValue(fromField)
	}
	value, err := unquote(values[0])
	switch {
	case err != nil:
		return "", err
	case fromField != "" && fromField != value:
		return "", fmt.Errorf("%w: %w: %s and the field %s", idempotency.ErrKeyInvalid, ErrKeysDiffer, HeaderKey, field)
	}
	return value, idempotency.ValidateKeyValue(value)
}

// unquote returns the key in a value of the metadata, in either spelling.
func unquote(value string) (string, error) {
	value = strings.Trim(value, " \t")
	if !strings.HasPrefix(value, `"`) {
		return value, nil
	}
	item, err := httpsfv.UnmarshalItem([]string{value})
	unquoted, ok := item.Value.(string)
	if err != nil || !ok || len(item.Params.Names()) > 0 {
		return "", fmt.Errorf("%w: it is not a quoted string and nothing else", idempotency.ErrKeyInvalid)
	}
	return unquoted, nil
}

// keyField returns the message's own string field with this name, or nil.
func keyField(message protoreflect.Message, name protoreflect.Name) protoreflect.FieldDescriptor {
	field := message.Descriptor().Fields().ByName(name)
	if field == nil || field.Kind() != protoreflect.StringKind || field.Cardinality() == protoreflect.Repeated {
		return nil
	}
	return field
}

// FieldKey returns the value of the message's field with this name, or "".
func FieldKey(message proto.Message, name protoreflect.Name) string {
	m := message.ProtoReflect()
	if field := keyField(m, name); field != nil {
		return m.Get(field).String()
	}
	return ""
}
