package bank

import (
	"encoding/json"
	"errors"
	"net/http"
)

// problemTypeBase is the prefix of the type of each of the bank's problems.
const problemTypeBase = "https://github.com/paidonce/idempotency/blob/main/cmd/demo-bank/README.md#"

// Problem is an answer that refuses a request: an RFC 9457 problem document. It is also an error,
// so that it can be returned up to the code that writes the answer.
type Problem struct {
	Status int
	Slug   string // the end of the problem's type; clients may branch on it
	Title  string
	Detail string
}

func (p *Problem) Error() string { return p.Slug + ": " + p.Detail }

func refusal(status int, slug, title, detail string) *Problem {
	return &Problem{Status: status, Slug: slug, Title: title, Detail: detail}
}

func invalid(slug, detail string) *Problem {
	return refusal(http.StatusBadRequest, slug, "The request is not valid", detail)
}

func notFound(slug, detail string) *Problem {
	return refusal(http.StatusNotFound, slug, "Not found", detail)
}

// WriteProblem answers with a problem document.
func WriteProblem(w http.ResponseWriter, p *Problem) {
	w.Header().Set("Content-Type", "application/problem+json")
	WriteJSON(w, p.Status, struct {
		Type   string `json:"type"`
		Title  string `json:"title"`
		Status int    `json:"status"`
		Detail string `json:"detail"`
	}{problemTypeBase + p.Slug, p.Title, p.Status, p.Detail})
}

// writeError answers with err if it is a problem. Otherwise it answers with a bare 500, and logs
// the error instead of showing it to the client.
func (b *Bank) writeError(w http.ResponseWriter, r *http.Request, err error) {
	var problem *Problem
	if !errors.As(err, &problem) {
		b.logger.WarnContext(r.Context(), "request failed", "method", r.Method, "error", err)
		problem = refusal(http.StatusInternalServerError, "internal", "The bank failed", "The bank could not answer this request now.")
	}
	WriteProblem(w, problem)
}

// WriteJSON answers with value as JSON. It panics if value can't be encoded.
func WriteJSON(w http.ResponseWriter, status int, value any) {
	if w.Header().Get("Content-Type") == "" {
		w.Header().Set("Content-Type", "application/json")
	}
	body, err := json.Marshal(value)
	if err != nil { // only our own types are passed
		panic(err)
	}
	w.WriteHeader(status)
	_, _ = w.Write(append(body, '\n')) // ignored: the client may be gone
}
