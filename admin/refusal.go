package admin

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// refusal is an answer in place of the requested page. It repeats nothing that the request
// contains.
type refusal struct {
	status int
	title  string // empty: that of the status
	detail string // what the reader can do about it
}

func (r refusal) Error() string { return http.StatusText(r.status) + ": " + r.detail }

var errStaleLink = refusal{
	status: http.StatusNotFound, title: "This link leads nowhere",
	detail: "It was cut short, or made by another process of the service, or before the last restart. Search for the key again.",
}

// refusalOf returns the refusal for an error, and whether to log the error.
func refusalOf(err error) (refused refusal, failed bool) {
	var pgErr *pgconn.PgError
	switch {
	case errors.As(err, &refused):
		return refused, false
	case errors.Is(err, operator.ErrInvalid):
		return refusal{http.StatusBadRequest, "That can't be asked for", "Look at the form's fields again."}, false
	case errors.Is(err, operator.ErrNotFound):
		return refusal{http.StatusNotFound, "This key has no record", "No attempt has committed, or the record expired, or somebody deleted it. Its page shows what else is known."}, false
	case errors.Is(err, operator.ErrInProgress):
		return refusal{http.StatusConflict, "Somebody holds this key", "An attempt runs, or its call may still be being sent, or a retry reads the record just now. Nothing was done. Wait until it has ended, and look again."}, false
	case errors.Is(err, operator.ErrChanged):
		return refusal{http.StatusConflict, "It has changed", "The record, the request or the message is not as this form showed it any more. Nothing was done. Open it again."}, false
	case errors.Is(err, operator.ErrNotOpen):
		return refusal{http.StatusNotFound, "This key has no open request", "It has ended, or somebody abandoned it. Nothing was done. Open the key again."}, false
	case errors.Is(err, operator.ErrOpen):
		return refusal{http.StatusConflict, "This request is open", "There is no record to change, and money may have moved. Nothing was done. Settle its effects, or abandon it."}, false
	case errors.Is(err, operator.ErrSettled), errors.Is(err, operator.ErrNoEffect):
		return refusal{http.StatusConflict, "This effect has a result", "Somebody has settled it, or its result has come, and a recorded result is never replaced. Nothing was done. Open the key again."}, false
	case errors.Is(err, operator.ErrUnconfirmed):
		return refusal{http.StatusConflict, "The request has changed", "Other effects may have been sent than this form showed. Nothing was done. Open the key again."}, false
	case errors.Is(err, operator.ErrEncrypted):
		return refusal{http.StatusConflict, "The service encrypts its results", "This page can't encrypt one. Nothing was done. A program with the keys can: docs/operations.md."}, false
	case errors.Is(err, operator.ErrNotParked):
		return refusal{http.StatusNotFound, "This message is not parked", "It was handled or published, or somebody dropped it. Nothing was done. Its page shows what became of it."}, false
	case errors.Is(err, operator.ErrNoMessage):
		return refusal{http.StatusNotFound, "Nothing is known of this message", "The broker may have it. Its record may have expired."}, false
	case errors.Is(err, operator.ErrBehind):
		return refusal{http.StatusConflict, "This message waits behind another one", "Redrive or drop the one in front of it: its page has the id. Nothing was done."}, false
	case errors.Is(err, operator.ErrTooLarge):
		return refusal{http.StatusRequestEntityTooLarge, "This body is too large to show", "It is in the table idempotency_keys."}, false
	case errors.Is(err, operator.ErrUnknown):
		return refusal{http.StatusServiceUnavailable, "It is not known whether it was done", "The reply to COMMIT was lost. Open the key again: its timeline shows the act if it was done."}, true
	case errors.As(err, &pgErr) && (pgErr.Code == "42P01" || pgErr.Code == "3F000" || pgErr.Code == "42703"):
		return refusal{http.StatusServiceUnavailable, "The tables are not there", "Run the migrations: this page needs all of them."}, true
	case errors.As(err, &pgErr) && pgErr.Code == "42501":
		return refusal{http.StatusServiceUnavailable, "The database refuses this", "The role that the service connects as lacks a right. docs/admin.md lists those that this page needs."}, true
	case errors.As(err, &pgErr) && pgErr.Code == "25006":
		return refusal{http.StatusServiceUnavailable, "This server is a standby", "Nothing can be changed here. Nothing was done."}, true
	case errors.As(err, &pgErr) && pgErr.Code == "57014", errors.Is(err, context.DeadlineExceeded):
		return refusal{http.StatusServiceUnavailable, "It took too long", "The database did not answer in time. Narrow the search, or try again."}, true
	}
	return refusal{http.StatusServiceUnavailable, "The database could not be asked", "The service's log says why. Try again."}, true
}

// refuse answers with a refusal: a page, or a problem document (RFC 9457) if the client asked for
// JSON.
func (h *Handler) refuse(p *page, err error) {
	refused, failed := refusalOf(err)
	if failed && p.client.Err() == nil {
		h.options.Logger.Error("admin: a request failed", "page", strings.TrimPrefix(p.r.URL.Path, "/"), "error", err)
	}
	switch refused.status {
	case http.StatusUnauthorized:
		if h.options.Challenge != "" {
			p.w.Header().Set("WWW-Authenticate", h.options.Challenge)
		}
		refused.title, refused.detail = "Who are you?", "This page is for people who are known to the service. Sign in, and open it again."
	case http.StatusForbidden:
		if refused.title == "" {
			refused.title = "This is not allowed"
		}
		if refused.detail == "" {
			refused.detail = "You may not do this here. Nothing was done. Who runs the service decides who may."
		}
	}
	if refused.title == "" {
		refused.title = http.StatusText(refused.status)
	}
	if wantsJSON(p.r) {
		writeProblem(p.w, refused)
		return
	}
	if err := h.renderStatus(p, refused.status, "refusal", refused.title, refused.detail); err != nil {
		writeProblem(p.w, refused)
	}
}

// wantsJSON reports whether the client asked for JSON in place of a page.
func wantsJSON(r *http.Request) bool {
	accept := r.Header.Get("Accept")
	return strings.Contains(accept, "json") && !strings.Contains(accept, "text/html")
}

func writeProblem(w http.ResponseWriter, refused refusal) {
	text, _ := json.Marshal(struct { // plain strings: this never fails
		Title  string `json:"title"`
		Status int    `json:"status"`
		Detail string `json:"detail"`
	}{refused.title, refused.status, refused.detail})
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(refused.status)
	_, _ = w.Write(text) // the client may be gone
}
