package rpc

import (
	"slices"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/paidonce/idempotency"
)

// Domain is the domain of the ErrorInfo of refusals.
const Domain = "github.com/paidonce/idempotency"

// ReasonStreamRefused is the reason for refusing a stream. The engine never returns it.
const ReasonStreamRefused idempotency.Reason = "stream-refused"

// Keys of the metadata in the ErrorInfo of refusals.
const (
	InfoOutcome  = "outcome"  // the outcome, as in [HeaderStatus]
	InfoAccepted = "accepted" // "true" if the server will end the request, even without a retry
)

// text is the status of a reason.
type text struct {
	code    code.Code
	message string
	retry   bool // it has a RetryInfo
}

// An unknown outcome never has a code that means a definite failure.
var texts = map[idempotency.Reason]text{
	idempotency.ReasonKeyMissing: {code.Code_INVALID_ARGUMENT,
		"The key is missing: send it as metadata idempotency-key, or in the message's field for it (request_id unless the service names another), new for each request and the same for its retries.", false},
	idempotency.ReasonKeyInvalid: {code.Code_INVALID_ARGUMENT,
		"The key is invalid: send exactly one, as metadata idempotency-key or in the message's field for it (request_id unless the service names another), of visible ASCII characters without comma, space or quote inside, within the limit of its length.", false},
	idempotency.ReasonScope: {code.Code_UNAUTHENTICATED,
		"The caller is not known: keys belong to a caller.", false},
	idempotency.ReasonBodyTooLarge: {code.Code_INVALID_ARGUMENT,
		"The message is over the limit. Nothing was executed.", false},
	idempotency.ReasonReplayDenied: {code.Code_PERMISSION_DENIED,
		"This request was answered before, and you may not see that answer now.", false},
	idempotency.ReasonQuotaExceeded: {code.Code_RESOURCE_EXHAUSTED,
		"The account has used as many new keys as it may for now. This request left nothing in the database. Try again with the same key after a while.", true},
	idempotency.ReasonKeyReused: {code.Code_INVALID_ARGUMENT,
		"The key belongs to a request with another method or message. Use a new key for a new request.", false},
	idempotency.ReasonInProgress: {code.Code_ABORTED,
		"An earlier request with this key is still running. Try again with the same key.", true},
	idempotency.ReasonHandlerFailed: {code.Code_INTERNAL,
		"The request failed, and left nothing in the database. You may try again with the same key.", false},
	idempotency.ReasonTransactionLost: {code.Code_UNKNOWN,
		"The request may or may not have been executed. Keep the key.", false},
	idempotency.ReasonUnavailable: {code.Code_UNAVAILABLE,
		"This request left nothing in the database. Try again with the same key, or give up if no earlier one may have been executed.", true},
	idempotency.ReasonOutcomeUnknown: {code.Code_UNAVAILABLE,
		"The request may or may not have been executed. Try again with the same key until the answer is another one.", true},
	idempotency.ReasonNeedsAttention: {code.Code_UNAVAILABLE,
		"The request was accepted, and needs a person to settle it. Keep the key, and try again later.", true},
	idempotency.ReasonCallUnknown: {code.Code_UNAVAILABLE,
		"This request left nothing in the database, but may have had an effect at another service that it called. Try again with the same key until the answer is another one.", true},
	idempotency.ReasonRecordCorrupt: {code.Code_DATA_LOSS,
		"The request may have been executed, and the record of its answer was changed. Keep the key.", false},
	ReasonStreamRefused: {code.Code_UNIMPLEMENTED,
		"A stream can't be retried with a key. Nothing was executed.", false},
}

// Refusal describes a call that gets no answer of its handler.
type Refusal struct {
	Reason     idempotency.Reason
	Outcome    idempotency.Outcome
	RetryAfter time.Duration // of the RetryInfo, if the reason has one
	Accepted   bool          // the server will end the request, even without a retry

	// Status replaces the code and the message if its code is not OK, and adds its details.
	Status *status.Status
}

// Error returns the status of a refusal. Its details begin with an ErrorInfo: the domain is
// [Domain], the reason is that of the refusal in upper case, such as KEY_REUSED, and the metadata
// have the outcome. A RetryInfo follows if a retry may get another answer.
func (r Refusal) Error() *status.Status {
	t, ok := texts[r.Reason]
	if !ok {
		t = texts[idempotency.ReasonOutcomeUnknown]
	}
	refused := &status.Status{Code: int32(t.code), Message: t.message}
	metadata := map[string]string{InfoOutcome: string(r.Outcome)}
	if r.Accepted {
		metadata[InfoAccepted] = "true"
	}
	details := []proto.Message{&errdetails.ErrorInfo{
		Reason: strings.ToUpper(strings.ReplaceAll(string(r.Reason), "-", "_")), Domain: Domain, Metadata: metadata,
	}}
	if t.retry {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(r.RetryAfter)})
	}
	for _, detail := range details {
		packed, err := anypb.New(detail)
		if err != nil { // a few valid strings
			panic(err)
		}
		refused.Details = append(refused.Details, packed)
	}
	if r.Status.GetCode() != int32(code.Code_OK) {
		refused.Code, refused.Message = r.Status.GetCode(), r.Status.GetMessage()
		refused.Details = slices.Concat(refused.Details, r.Status.GetDetails())
	}
	return refused
}

// Refused returns the refusal that an error describes, and false if it describes none. It does not
// set Status.
func Refused(s *status.Status) (r Refusal, ok bool) {
	for _, detail := range s.GetDetails() {
		message, err := detail.UnmarshalNew()
		if err != nil {
			continue // a detail of the service's own
		}
		switch message := message.(type) {
		case *errdetails.ErrorInfo:
			if message.GetDomain() == Domain {
				ok = true
				r.Reason = idempotency.Reason(strings.ToLower(strings.ReplaceAll(message.GetReason(), "_", "-")))
				r.Outcome = idempotency.Outcome(message.GetMetadata()[InfoOutcome])
				r.Accepted = message.GetMetadata()[InfoAccepted] == "true"
			}
		case *errdetails.RetryInfo:
			r.RetryAfter = message.GetRetryDelay().AsDuration()
		}
	}
	return r, ok
}
