package admin

import (
	"context"
	"encoding/hex"
	"errors"
	"strings"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// messageRef names a message in a link: at a consumer, or in the outbox if Consumer is empty.
type messageRef struct {
	Consumer string `json:"c,omitempty"`
	ID       string `json:"i"`
}

func (h *Handler) messageLink(ref messageRef) string {
	return "message?k=" + h.sealer.seal(purposeMessage, ref)
}

func (h *Handler) messageOf(p *page) (ref messageRef, err error) {
	if h.sealer.open(purposeMessage, p.r.URL.Query().Get("k"), &ref) != nil {
		return ref, errStaleLink
	}
	return ref, nil
}

// consumers shows where each consumer is, and how much it has parked.
func (h *Handler) consumers(p *page) error {
	list, err := h.operator.Consumers(p.ctx(), "")
	if err != nil {
		return err
	}
	return h.render(p, "consumers", "Consumers", list)
}

// parkedQuery is the query in a link to a page of parked messages.
type parkedQuery struct {
	Consumer string               `json:"c,omitempty"`
	State    operator.ParkedState `json:"s,omitempty"`
	After    operator.Cursor      `json:"n,omitempty"`
	Page     int                  `json:"i,omitempty"` // number of previous pages; only for display
}

type parkedRow struct {
	operator.ParkedMessage
	Link string // to its page
}

// parkedPage is the data of parked.html.
type parkedPage struct {
	Query       parkedQuery
	States      []operator.ParkedState
	Rows        []parkedRow
	First, Next string // links; empty if there is none
	Number      int
	Now         time.Time
}

// parked shows a page of the parked messages, the oldest first. Without a query it shows the dead
// ones.
func (h *Handler) parked(p *page) error {
	values := p.r.URL.Query()
	q := parkedQuery{Consumer: values.Get("consumer"), State: operator.MessageDead} // neither is secret
	if values.Has("state") {
		q.State = operator.ParkedState(values.Get("state"))
	}
	if token := values.Get("q"); token != "" {
		if err := h.sealer.open(purposeParkedList, token, &q); err != nil {
			return errStaleLink
		}
	}
	list, err := h.operator.ListParked(p.ctx(), operator.ParkedFilter{Consumer: q.Consumer, State: q.State}, operator.Page{After: q.After})
	if err != nil {
		return err
	}
	view := parkedPage{Query: q, States: []operator.ParkedState{operator.MessageDead, operator.MessageWaiting, operator.MessageBehind}, Number: q.Page + 1, Now: list.Now}
	for i := range list.Messages {
		m := &list.Messages[i]
		view.Rows = append(view.Rows, parkedRow{*m, h.messageLink(messageRef{m.Consumer, m.ID})})
	}
	link := func(q parkedQuery) string { return "parked?q=" + h.sealer.seal(purposeParkedList, q) }
	if q.After != "" {
		view.First = link(parkedQuery{Consumer: q.Consumer, State: q.State})
	}
	if list.Next != "" {
		view.Next = link(parkedQuery{Consumer: q.Consumer, State: q.State, After: list.Next, Page: q.Page + 1})
	}
	return h.render(p, "parked", "Dead letters", view)
}

type outboxRow struct {
	operator.OutboxMessage
	Link string // to its page
}

// outboxPage is the data of outbox.html.
type outboxPage struct {
	Box         operator.Outbox
	Rows        []outboxRow
	First, Next string // links; empty if there is none
	Number      int
	Now         time.Time
}

// outbox shows how much waits for a relay, and a page of the messages that the broker refused.
func (h *Handler) outbox(p *page) error {
	var q struct {
		After operator.Cursor `json:"n,omitempty"`
		Page  int             `json:"i,omitempty"`
	}
	if token := p.r.URL.Query().Get("q"); token != "" {
		if err := h.sealer.open(purposeOutboxList, token, &q); err != nil {
			return errStaleLink
		}
	}
	box, err := h.operator.Outbox(p.ctx())
	if err != nil {
		return err
	}
	list, err := h.operator.ListOutbox(p.ctx(), operator.Page{After: q.After})
	if err != nil {
		return err
	}
	view := outboxPage{Box: box, Number: q.Page + 1, Now: list.Now}
	for i := range list.Messages {
		view.Rows = append(view.Rows, outboxRow{list.Messages[i], h.messageLink(messageRef{ID: list.Messages[i].ID})})
	}
	if q.After != "" {
		view.First = "outbox"
	}
	if list.Next != "" {
		q.After, q.Page = list.Next, q.Page+1
		view.Next = "outbox?q=" + h.sealer.seal(purposeOutboxList, q)
	}
	return h.render(p, "outbox", "Outbox", view)
}

// messagePage is the data of message.html and of confirm-message.html.
type messagePage struct {
	Ref    messageRef
	State  operator.MessageState
	Parked *operator.ParkedMessage // nil if its consumer has not parked it
	Outbox *operator.OutboxMessage // nil if the broker has not refused it
	Token  string                  // of the message, for links
	Done   string                  // the act just done to it; empty if none

	MayViewBody, MayRedrive, MayDrop bool

	// Of confirm-message.html.
	Act            messageAct
	Ticket, Word   string // the reader must type Word, unless it is empty
	Reason         string // as typed before
	ReasonBytesMax int
	Problem        string // why the form is shown again
}

// message shows what is known of a message.
func (h *Handler) message(p *page) error {
	ref, err := h.messageOf(p)
	if err != nil {
		return err
	}
	view, err := h.lookMessage(p, ref)
	if err != nil {
		return err
	}
	var d done
	if token := p.r.URL.Query().Get("done"); token != "" && h.sealer.open(purposeDone, token, &d) == nil &&
		d.Ref == (keyRef{ref.Consumer, ref.ID}) && d.Actor == p.actor && h.now().Sub(d.At) <= doneShown {
		view.Done = string(d.Act)
	}
	view.MayViewBody, view.MayRedrive, view.MayDrop = h.has(p, PermissionViewBody), h.has(p, PermissionRedrive), h.has(p, PermissionDrop)
	return h.render(p, "message", "Message", view)
}

// lookMessage reads a message for its pages.
func (h *Handler) lookMessage(p *page, ref messageRef) (view messagePage, err error) {
	view.Ref, view.Token = ref, h.sealer.seal(purposeMessage, ref)
	if view.State, err = h.operator.Message(p.ctx(), ref.ID, ref.Consumer); err != nil {
		return view, err
	}
	for i := range view.State.Parked {
		if ref.Consumer != "" && view.State.Parked[i].Consumer == ref.Consumer {
			view.Parked = &view.State.Parked[i]
		}
	}
	for i := range view.State.Outbox {
		if ref.Consumer == "" && view.State.Outbox[i].Refused != "" {
			view.Outbox = &view.State.Outbox[i]
			break
		}
	}
	return view, nil
}

// contentPage is the data of content.html.
type contentPage struct {
	Ref        messageRef
	Token      string // of the message, for links
	Key        string
	Headers    []header
	Text       string // the shown text
	Form       string // text, JSON or hexadecimal
	ShownBytes int    // of the body, from its beginning
	Bytes      int
}

// content shows a message's key, headers and body to readers with PermissionViewBody.
func (h *Handler) content(p *page) error {
	actor, err := h.allowed(p.r, PermissionViewBody)
	if err != nil {
		return err
	}
	ref, err := h.messageOf(p)
	if err != nil {
		return err
	}
	m, err := h.operator.MessageContent(p.ctx(), ref.ID)
	if err != nil {
		return err
	}
	h.options.Logger.Info("admin: a message's content was shown", "actor", actor, "consumer", ref.Consumer)
	view := contentPage{Ref: ref, Token: h.sealer.seal(purposeMessage, ref), Key: string(m.Key), Headers: headersOf(m.Header), Bytes: len(m.Body)}
	if !printable(m.Key) {
		view.Key = hex.EncodeToString(m.Key)
	}
	view.Text, view.Form, view.ShownBytes = showBody(m.Body, m.Header)
	return h.render(p, "content", "Content of the message", view)
}

// messageAct is an act on a message, by the name of its path.
type messageAct string

// The acts.
const (
	actRedrive messageAct = "redrive" // at a consumer
	actDrop    messageAct = "drop"    // at a consumer, or in the outbox
	actRetry   messageAct = "retry"   // in the outbox
)

// DropWord must be typed to confirm that a message is dropped.
const DropWord = "drop"

func (a messageAct) permission() Permission {
	if a == actDrop {
		return PermissionDrop
	}
	return PermissionRedrive
}

func (a messageAct) word() string {
	if a == actDrop {
		return DropWord
	}
	return ""
}

var messageTitles = map[messageAct]string{actRedrive: "Redrive this message?", actDrop: "Drop this message?", actRetry: "Give this message to the broker again?"}

// messageTicket is a ticket for an act on a message as the page showed it. Its Ref has the consumer
// and the id.
type messageTicket struct {
	ticket
	Seen string `json:"s,omitempty"`
}

func (h *Handler) confirmRedrive(p *page) error { return h.confirmMessageLink(p, actRedrive) }
func (h *Handler) confirmDrop(p *page) error    { return h.confirmMessageLink(p, actDrop) }
func (h *Handler) confirmRetry(p *page) error   { return h.confirmMessageLink(p, actRetry) }

func (h *Handler) confirmMessageLink(p *page, act messageAct) error {
	if _, err := h.allowed(p.r, act.permission()); err != nil {
		return err
	}
	ref, err := h.messageOf(p)
	if err != nil {
		return err
	}
	return h.confirmMessage(p, act, ref, "", "")
}

// confirmMessage shows the consequences of an act on a message, and the form for it. problem is the
// reason if the form is shown again.
func (h *Handler) confirmMessage(p *page, act messageAct, ref messageRef, reason, problem string) error {
	actor, err := h.allowed(p.r, act.permission())
	if err != nil {
		return err
	}
	view, err := h.lookMessage(p, ref)
	seen := ""
	switch {
	case err != nil:
		return err
	case view.Parked != nil && act != actRetry:
		if seen = view.Parked.Seen(); act == actRedrive && view.Parked.State == operator.MessageBehind {
			return operator.ErrBehind
		}
	case view.Outbox == nil || act == actRedrive:
		return operator.ErrNotParked
	}
	t := messageTicket{ticket{string(act), actor, keyRef{ref.Consumer, ref.ID}, idempotency.AttemptID{}.String(), h.now()}, seen}
	view.Act, view.Ticket, view.Word = act, h.sealer.seal(purposeMessageForm, t), act.word()
	view.Reason, view.ReasonBytesMax, view.Problem = reason, operator.ReasonBytesMax, problem
	return h.renderStatus(p, statusOfForm(problem), "confirm-message", messageTitles[act], view)
}

func (h *Handler) redrive(p *page) error { return h.actMessage(p, actRedrive) }
func (h *Handler) drop(p *page) error    { return h.actMessage(p, actDrop) }
func (h *Handler) retry(p *page) error   { return h.actMessage(p, actRetry) }

// actMessage does the act of a confirmed form, as [Handler.act] does. The operator's act checks
// that a parked message still has the state and the tries that the form showed.
func (h *Handler) actMessage(p *page, act messageAct) error {
	var t messageTicket
	deed, err := h.redeem(p, act.permission(), string(act), purposeMessageForm, &t, &t.ticket)
	if err != nil {
		return err
	}
	ref := messageRef{t.Ref.Scope, t.Ref.Value}
	problem := problemOf(deed)
	if word := act.word(); word != "" && strings.TrimSpace(p.r.PostForm.Get("confirm")) != word {
		problem = "Nothing was done: type the word " + word + " to confirm."
	}
	if problem != "" {
		return h.confirmMessage(p, act, ref, deed.Reason, problem)
	}

	ctx, cancel := context.WithTimeout(context.WithoutCancel(p.ctx()), actTimeout)
	defer cancel()
	messageDeed := operator.MessageAct{Act: deed, Seen: t.Seen}
	switch {
	case act == actRedrive:
		_, err = h.operator.Redrive(ctx, ref.Consumer, ref.ID, messageDeed)
	case act == actRetry:
		_, err = h.operator.RetryOutbox(ctx, ref.ID, messageDeed)
	case ref.Consumer == "":
		_, err = h.operator.DropOutbox(ctx, ref.ID, messageDeed)
	default:
		_, err = h.operator.Drop(ctx, ref.Consumer, ref.ID, messageDeed)
	}
	log := h.options.Logger.With("act", t.Act, "actor", t.Actor, "consumer", ref.Consumer)
	switch {
	case errors.Is(err, operator.ErrUnknown):
		log.Error("admin: it is not known whether an act was done", "error", err)
		return err
	case err != nil:
		log.Warn("admin: an act was not done", "error", err)
		return err
	}
	log.Warn("admin: an act was done")
	return redirect(p, h.messageLink(ref)+"&done="+h.sealer.seal(purposeDone, done{Permission(t.Act), t.Attempt, p.actor, t.Ref, h.now()}))
}
