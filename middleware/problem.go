package middleware

import (
	"encoding/json"
	"net/http"
	"strconv"
	"time"

	"github.com/paidonce/idempotency"
)

// StatusError is an error of a scope function that says which status a caller gets.
type StatusError struct {
	Status    int    // 400 to 599; anything else counts as 401
	Detail    string // shown to the client
	Challenge string // the value of WWW-Authenticate, which RFC 9110 wants of a 401
}

func (e *StatusError) Error() string { return e.Detail }

// problem is a problem document (RFC 9457).
type problem struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail"`

	// Accepted means that the request will end, whatever the client does.
	Accepted bool `json:"accepted,omitempty"`
}

// text is the text of a reason's document.
type text struct {
	status        int
	title, detail string
	retry         bool // Retry-After is sent
}

var texts = map[idempotency.Reason]text{
	idempotency.ReasonKeyMissing: {http.StatusBadRequest, "Idempotency-Key is missing",
		"Send an Idempotency-Key header that is new for each request and the same for its retries.", false},
	idempotency.ReasonKeyInvalid: {http.StatusBadRequest, "Idempotency-Key is invalid",
		"Send exactly one Idempotency-Key of visible ASCII characters without comma, space or quote inside, within the limit of its length, bare or as one quoted string.", false},
	idempotency.ReasonScope: {http.StatusUnauthorized, "The caller is not known",
		"Keys belong to a caller, and this request names none.", false},
	idempotency.ReasonBodyTooLarge: {http.StatusRequestEntityTooLarge, "The body is too large",
		"The request's body is over the limit. Nothing was executed.", false},
	idempotency.ReasonBodyUnread: {http.StatusBadRequest, "The body did not arrive",
		"The request's body ended early, took too long or could not be decoded. Nothing was executed.", false},
	idempotency.ReasonMediaType: {http.StatusUnsupportedMediaType, "gRPC is not served here",
		"The HTTP middleware can't record the answer of a gRPC call, which ends in trailers. The service must put the interceptor of github.com/paidonce/idempotency/contrib/grpc into its gRPC server, and leave this route out of the HTTP middleware. Nothing was executed.", false},
	idempotency.ReasonReplayDenied: {http.StatusForbidden, "The answer may not be shown",
		"This request was answered before, and you may not see that answer now.", false},
	idempotency.ReasonQuotaExceeded: {http.StatusTooManyRequests, "Too many new keys",
		"The account has used as many new keys as it may for now. This request left nothing in the database. Try again with the same key after a while.", false},
	idempotency.ReasonKeyReused: {http.StatusUnprocessableEntity, "Idempotency-Key was used for another request",
		"The key belongs to a request with another method, path, query, content type or body. Use a new key for a new request.", false},
	idempotency.ReasonInProgress: {http.StatusConflict, "The request is in progress",
		"An earlier request with this key is still running. Try again with the same key.", true},
	idempotency.ReasonHandlerFailed: {http.StatusInternalServerError, "The request failed",
		"This request left nothing in the database. You may try again with the same key.", false},
	idempotency.ReasonTransactionLost: {http.StatusInternalServerError, "The outcome is not known",
		"The request may or may not have been executed. Keep the key.", false},
	idempotency.ReasonUnavailable: {http.StatusServiceUnavailable, "The service is not available",
		"This request left nothing in the database. Try again with the same key, or give up if no earlier one may have been executed.", true},
	idempotency.ReasonOutcomeUnknown: {http.StatusServiceUnavailable, "The outcome is not known",
		"The request may or may not have been executed. Try again with the same key until the answer is another one.", true},
	idempotency.ReasonNeedsAttention: {http.StatusServiceUnavailable, "The outcome is not known",
		"The request was accepted, and needs a person to settle it. Keep the key, and try again later.", true},
	idempotency.ReasonCallUnknown: {http.StatusServiceUnavailable, "The outcome is not known",
		"This request left nothing in the database, but may have had an effect at another service that it called. Try again with the same key until the answer is another one.", true},
	idempotency.ReasonRecordCorrupt: {http.StatusInternalServerError, "The recorded answer can't be trusted",
		"The request may have been executed, and the record of its answer was changed. Keep the key.", false},
}

// textOf returns the text of a reason, with the parts that override replaces.
func textOf(reason idempotency.Reason, override *StatusError) text {
	t := texts[reason]
	if override != nil {
		if override.Status >= 400 && override.Status <= 599 {
			t.status = override.Status
		}
		if override.Detail != "" {
			t.detail = override.Detail
		}
	}
	return t
}

// writeProblem answers with the problem document of a reason.
func (m *Middleware) writeProblem(w http.ResponseWriter, reason idempotency.Reason, outcome idempotency.Outcome, override *StatusError) {
	m.writeDocument(w, textOf(reason, override), problem{Type: m.options.ProblemBase + string(reason)}, outcome, override, m.options.RetryAfter)
}

// writeAccepted answers an open request, which will end without the client.
func (m *Middleware) writeAccepted(w http.ResponseWriter, result idempotency.Result) {
	t := textOf(result.Reason, nil)
	if result.Reason == idempotency.ReasonOutcomeUnknown {
		t.detail = "The request was accepted, and calls another service that has not answered yet. It will be brought to its end. Try again with the same key for the answer."
	}
	m.writeDocument(w, t, problem{Type: m.options.ProblemBase + string(result.Reason), Accepted: true}, result.Outcome, nil, max(result.RetryAfter, m.options.RetryAfter))
}

func (m *Middleware) writeDocument(w http.ResponseWriter, t text, document problem, outcome idempotency.Outcome, override *StatusError, retry time.Duration) {
	if override != nil && override.Challenge != "" {
		w.Header().Set("WWW-Authenticate", override.Challenge)
	}
	document.Title, document.Status, document.Detail = t.title, t.status, t.detail
	body, err := json.Marshal(document)
	if err != nil { // four strings and a number
		panic(err)
	}
	h := w.Header()
	h.Set("Content-Type", "application/problem+json")
	h.Add("Link", "<"+document.Type+`>; rel="describedby"`)
	h.Set("Cache-Control", "no-store")
	if outcome != "" {
		h.Set("Idempotency-Status", string(outcome))
	}
	if t.retry {
		h.Set("Retry-After", retryAfter(retry))
	}
	h.Del("Content-Length") // net/http sets it, after outer middleware
	w.WriteHeader(t.status)
	_, _ = w.Write(body) // a client that is gone asks again
}

// retryAfter returns the value of Retry-After: full seconds, rounded up.
func retryAfter(d time.Duration) string {
	return strconv.FormatInt(int64((d+time.Second-1)/time.Second), 10)
}
