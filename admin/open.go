package admin

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// openQuery is the query in a link to a page of the open requests.
type openQuery struct {
	Route  string          `json:"r,omitempty"`
	Parked bool            `json:"p,omitempty"`
	After  operator.Cursor `json:"n,omitempty"`
	Page   int             `json:"i,omitempty"` // number of previous pages; only for display
}

// openRow is an open request in the list.
type openRow struct {
	operator.OpenRequest
	Link string // to its page
}

// openPage is the data of open.html.
type openPage struct {
	Query       openQuery
	Rows        []openRow
	First, Next string // links; empty if there is none
	Number      int
	Now         time.Time
}

// open shows a page of the open requests, the oldest first.
func (h *Handler) open(p *page) error {
	values := p.r.URL.Query()
	q := openQuery{Route: values.Get("route"), Parked: values.Get("parked") != ""} // neither is secret
	if token := values.Get("q"); token != "" {
		if err := h.sealer.open(purposeOpenList, token, &q); err != nil {
			return errStaleLink
		}
	}
	list, err := h.operator.ListOpen(p.ctx(), operator.OpenFilter{Route: q.Route, Parked: q.Parked}, operator.Page{After: q.After})
	if err != nil {
		return err
	}
	view := openPage{Query: q, Number: q.Page + 1, Now: list.Now}
	for i := range list.Requests {
		view.Rows = append(view.Rows, openRow{list.Requests[i], h.keyLink(list.Requests[i].Key)})
	}
	if q.After != "" {
		view.First = h.openLink(openQuery{Route: q.Route, Parked: q.Parked})
	}
	if list.Next != "" {
		view.Next = h.openLink(openQuery{Route: q.Route, Parked: q.Parked, After: list.Next, Page: q.Page + 1})
	}
	return h.render(p, "open", "Open requests", view)
}

func (h *Handler) openLink(q openQuery) string {
	return "open?q=" + h.sealer.seal(purposeOpenList, q)
}

// openOf returns the key's open request, or nil if it has ended, or if the database's role may not
// read it.
func (h *Handler) openOf(p *page, ref keyRef) (*operator.OpenRequest, error) {
	r, err := h.operator.GetOpen(p.ctx(), ref.key())
	var pgErr *pgconn.PgError
	switch {
	case errors.Is(err, operator.ErrNotOpen), errors.As(err, &pgErr) && pgErr.Code == "42501":
		return nil, nil
	case err != nil:
		return nil, err
	}
	return &r, nil
}

// openAct is an act on an open request, by the name of its path.
type openAct string

// The acts. None of them makes the answer: the service's handler does, when it runs next.
const (
	actSettle  openAct = "settle"
	actResume  openAct = "resume"
	actPark    openAct = "park"
	actAbandon openAct = "abandon"
)

func (a openAct) permission() Permission {
	if a == actAbandon {
		return PermissionAbandon
	}
	return PermissionSettle
}

// openTicket is a ticket for an act on an open request as the page showed it. The act is refused if
// somebody has taken the request over or acted on it since.
type openTicket struct {
	ticket
	Epoch  int64    `json:"e"`
	Effect string   `json:"f,omitempty"` // the one to settle
	Sent   []string `json:"s,omitempty"` // the effects that may have been sent
}

// word returns the text that must be typed to confirm that the request is abandoned, or "". It has
// the names of the effects that may have been sent, so that somebody looks each of them up first.
func (t *openTicket) word() string {
	switch {
	case openAct(t.Act) != actAbandon:
		return ""
	case len(t.Sent) == 0:
		return string(actAbandon)
	}
	return strings.Join(t.Sent, ",")
}

// openForm has the input of the form of an act.
type openForm struct {
	As     operator.Settlement
	Output string
	Reason string
}

// openConfirmPage is the data of confirm-open.html.
type openConfirmPage struct {
	Act            openAct
	Scope, Value   string
	Request        operator.OpenRequest
	Effect         string
	Token, Ticket  string
	Word           string // to be typed; empty for none
	Form           openForm
	Settlements    []operator.Settlement
	ReasonBytesMax int
	Problem        string // why the form is shown again
}

var (
	settlements = []operator.Settlement{operator.SettleDone, operator.SettleDeclined, operator.SettleNotSent, operator.SettleRetry}
	openTitles  = map[openAct]string{actSettle: "Settle this effect?", actResume: "Resume this request?", actPark: "Park this request?", actAbandon: "Abandon this request?"}
)

func (h *Handler) confirmSettle(p *page) error  { return h.confirmOpenLink(p, actSettle) }
func (h *Handler) confirmResume(p *page) error  { return h.confirmOpenLink(p, actResume) }
func (h *Handler) confirmPark(p *page) error    { return h.confirmOpenLink(p, actPark) }
func (h *Handler) confirmAbandon(p *page) error { return h.confirmOpenLink(p, actAbandon) }

func (h *Handler) confirmOpenLink(p *page, act openAct) error {
	values := p.r.URL.Query()
	return h.confirmOpen(p, act, values.Get("k"), values.Get("e"), openForm{}, "")
}

// confirmOpen shows what an act on an open request does, and the form that does it. problem is the
// reason if the form is shown again.
func (h *Handler) confirmOpen(p *page, act openAct, token, effect string, form openForm, problem string) error {
	actor, err := h.allowed(p.r, act.permission())
	if err != nil {
		return err
	}
	ref, err := h.refOf(token)
	if err != nil {
		return err
	}
	r, err := h.operator.GetOpen(p.ctx(), ref.key())
	switch {
	case err != nil:
		return err
	case act == actSettle && !slices.Contains(r.Unsettled, effect):
		return operator.ErrSettled
	}
	t := openTicket{ticket{string(act), actor, ref, r.Attempt.String(), h.now()}, r.Epoch, effect, r.MaybeSent()}
	return h.renderStatus(p, statusOfForm(problem), "confirm-open", openTitles[act], openConfirmPage{
		Act: act, Scope: ref.Scope, Value: ref.Value, Request: r, Effect: effect, Token: token, Ticket: h.sealer.seal(purposeOpenForm, t), Word: t.word(),
		Form: form, Settlements: settlements, ReasonBytesMax: operator.ReasonBytesMax, Problem: problem,
	})
}

func (h *Handler) settle(p *page) error  { return h.actOpen(p, actSettle) }
func (h *Handler) resume(p *page) error  { return h.actOpen(p, actResume) }
func (h *Handler) park(p *page) error    { return h.actOpen(p, actPark) }
func (h *Handler) abandon(p *page) error { return h.actOpen(p, actAbandon) }

// actOpen does the act of a confirmed form, as [Handler.act] does. The act in the database checks
// by the epoch that the request is still as it was shown.
func (h *Handler) actOpen(p *page, act openAct) error {
	var t openTicket
	deed, err := h.redeem(p, act.permission(), string(act), purposeOpenForm, &t, &t.ticket)
	if err != nil {
		return err
	}
	values := p.r.PostForm
	form := openForm{operator.Settlement(values.Get("as")), strings.TrimSpace(values.Get("output")), deed.Reason}
	openDeed := operator.OpenAct{Act: deed, Epoch: t.Epoch}
	if problem := form.problem(&t, strings.TrimSpace(values.Get("confirm")), deed); problem != "" {
		return h.confirmOpen(p, act, h.sealer.seal(purposeKey, t.Ref), t.Effect, form, problem)
	}

	ctx, cancel := context.WithTimeout(context.WithoutCancel(p.ctx()), actTimeout)
	defer cancel()
	key := t.Ref.key()
	switch act {
	case actSettle:
		var output []byte
		if form.Output != "" {
			output = []byte(form.Output)
		}
		_, err = h.operator.Settle(ctx, key, t.Effect, form.As, output, openDeed)
	case actResume:
		_, err = h.operator.Resume(ctx, key, openDeed)
	case actPark:
		_, err = h.operator.Park(ctx, key, openDeed)
	case actAbandon:
		_, err = h.operator.Abandon(ctx, key, operator.Abandonment{OpenAct: openDeed, Sent: t.Sent})
	}
	return h.acted(p, &t.ticket, err)
}

// problem returns the reason why the form can't be acted on, or "".
func (f *openForm) problem(t *openTicket, confirm string, act operator.Act) string {
	settles := openAct(t.Act) == actSettle
	hasOutput := f.Output != ""
	switch {
	case settles && !slices.Contains(settlements, f.As):
		return "Nothing was done: say what is known of the effect."
	case settles && f.As == operator.SettleDone && !hasOutput:
		return "Nothing was done: the handler needs the result of what is done, as JSON."
	case settles && hasOutput && f.As != operator.SettleDone && f.As != operator.SettleDeclined:
		return "Nothing was done: only what is done or declined has a result."
	case hasOutput && !json.Valid([]byte(f.Output)):
		return `Nothing was done: the result is not JSON, such as {"id":"ch_1","amount":900}.`
	case t.word() != "" && confirm != t.word():
		return "Nothing was done: type " + t.word() + " to confirm."
	}
	return problemOf(act)
}
