package admin

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// ticket allows one act, by one actor, on the record of one attempt, for a limited time. Another
// site's page can't know it.
type ticket struct {
	Act     string    `json:"a"` // the name of its path
	Actor   string    `json:"u"`
	Ref     keyRef    `json:"k"`
	Attempt string    `json:"t"`
	Made    time.Time `json:"d"`
}

var errStrangeForm = refusal{
	status: http.StatusForbidden,
	detail: "This form was not made by this page for you, or the service was restarted since. Nothing was done. Open the key again.",
}

// fresh refuses a form that was made too long ago.
func (h *Handler) fresh(made time.Time) error {
	if age := h.now().Sub(made); age > FormAgeMax || age < -FormAgeMax {
		return refusal{status: http.StatusForbidden, detail: "This form is too old. Nothing was done. Open the key again, and see whether it is still as it was."}
	}
	return nil
}

// DeleteWord must be typed to confirm the deletion of a record.
const DeleteWord = "delete"

// confirmPage is the data of confirm.html.
type confirmPage struct {
	Act            Permission
	Scope, Value   string
	State          operator.State
	Token, Ticket  string
	Word           string // to be typed; empty for none
	ReasonBytesMax int
	Reason         string // as typed before
	Problem        string // why the form is shown again
}

func (h *Handler) confirmExpire(p *page) error {
	return h.confirm(p, PermissionExpire, p.r.URL.Query().Get("k"), "", "")
}
func (h *Handler) confirmDelete(p *page) error {
	return h.confirm(p, PermissionDelete, p.r.URL.Query().Get("k"), "", "")
}

// confirm shows the effect of an act, and the form that does it. problem is the reason if the form
// is shown again.
func (h *Handler) confirm(p *page, act Permission, token, reason, problem string) error {
	actor, err := h.allowed(p.r, act)
	if err != nil {
		return err
	}
	ref, err := h.refOf(token)
	if err != nil {
		return err
	}
	state, err := h.operator.Get(p.ctx(), ref.key())
	switch {
	case err != nil:
		return err
	case state.Record == nil:
		return operator.ErrInProgress
	case state.Record.Open():
		return operator.ErrOpen
	}
	view := confirmPage{
		Act: act, Scope: ref.Scope, Value: ref.Value, State: state, Token: token, ReasonBytesMax: operator.ReasonBytesMax, Reason: reason, Problem: problem,
		Ticket: h.sealer.seal(purposeForm, ticket{string(act), actor, ref, state.Record.Attempt.String(), h.now()}),
	}
	if act == PermissionDelete {
		view.Word = DeleteWord
	}
	title := "Expire this record?"
	if act == PermissionDelete {
		title = "Delete this record?"
	}
	return h.renderStatus(p, statusOfForm(problem), "confirm", title, view)
}

// statusOfForm returns the status of a page with a form. problem is the reason if the form is shown
// again, or "".
func statusOfForm(problem string) int {
	if problem != "" {
		return http.StatusUnprocessableEntity
	}
	return http.StatusOK
}

// redeem opens the ticket of a confirmed form into t; its common part is common. It returns the act
// of the ticket's actor, with the reason of the form. Each of its checks fails closed.
func (h *Handler) redeem(p *page, need Permission, act, purpose string, t any, common *ticket) (operator.Act, error) {
	actor, err := h.allowed(p.r, need)
	if err != nil {
		return operator.Act{}, err
	}
	form := p.r.PostForm
	if h.sealer.open(purpose, form.Get("ticket"), t) != nil || common.Act != act || common.Actor != actor {
		return operator.Act{}, errStrangeForm
	}
	if err := h.fresh(common.Made); err != nil {
		return operator.Act{}, err
	}
	attempt, err := parseAttempt(common.Attempt)
	return operator.Act{Actor: actor, Reason: strings.TrimSpace(form.Get("reason")), Attempt: attempt}, err
}

// problemOf returns the reason why an act can't be done, or "".
func problemOf(act operator.Act) string {
	switch {
	case act.Reason == "":
		return "Nothing was done: say why. It is kept with your name."
	case act.Validate() != nil:
		return "Nothing was done: the reason is too long, or is not text."
	}
	return ""
}

// acted logs an act that has ended with err, and sends the browser to the page of the key, which
// reports it. The details are for the log.
func (h *Handler) acted(p *page, t *ticket, err error, details ...any) error {
	log := h.options.Logger.With("act", t.Act, "actor", t.Actor, "attempt", t.Attempt)
	switch {
	case errors.Is(err, operator.ErrUnknown):
		log.Error("admin: it is not known whether an act was done", "error", err)
		return err
	case err != nil:
		log.Warn("admin: an act was not done", "error", err)
		return err
	}
	log.Warn("admin: an act was done", details...)
	return redirect(p, h.keyLink(t.Ref.key())+"&done="+h.sealer.seal(purposeDone, done{Permission(t.Act), t.Attempt, p.actor, t.Ref, h.now()}))
}

func (h *Handler) expire(p *page) error { return h.act(p, PermissionExpire, h.operator.Expire) }
func (h *Handler) delete(p *page) error { return h.act(p, PermissionDelete, h.operator.Delete) }

// act does the act of a confirmed form. The database repeats the checks that others can change
// meanwhile: that the record is still the one shown, and that nobody holds the key.
func (h *Handler) act(p *page, act Permission, do func(context.Context, idempotency.Key, operator.Act) (operator.Record, error)) error {
	var t ticket
	deed, err := h.redeem(p, act, string(act), purposeForm, &t, &t)
	if err != nil {
		return err
	}
	problem := problemOf(deed)
	if act == PermissionDelete && strings.TrimSpace(p.r.PostForm.Get("confirm")) != DeleteWord {
		problem = "Nothing was done: type the word " + DeleteWord + " to confirm."
	}
	if problem != "" {
		return h.confirm(p, act, h.sealer.seal(purposeKey, t.Ref), deed.Reason, problem)
	}

	ctx, cancel := context.WithTimeout(context.WithoutCancel(p.ctx()), actTimeout)
	defer cancel()
	record, err := do(ctx, t.Ref.key(), deed)
	return h.acted(p, &t, err, "status", record.Status)
}
