package admin

import (
	"bytes"
	"cmp"
	"encoding/hex"
	"encoding/json"
	"errors"
	"mime"
	"net/http"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// keyPage is the data of key.html.
type keyPage struct {
	Scope, Value string
	State        operator.State
	Headers      []header
	Timeline     []operator.Event
	Done         *done                 // the act just done to the key, or nil
	Token        string                // of the key, for links
	Open         *operator.OpenRequest // nil if there is none

	MayViewBody, MayExpire, MayDelete, MaySettle, MayAbandon bool
}

type header struct{ Name, Value string }

// key shows a key's record, holder and history.
func (h *Handler) key(p *page) error {
	key, err := h.keyOf(p.r.URL.Query())
	if err != nil {
		return err
	}
	state, err := h.operator.Get(p.ctx(), key)
	if errors.Is(err, operator.ErrNotFound) {
		err = nil // its history may be known
	}
	if err != nil {
		return err
	}
	timeline, err := h.operator.Timeline(p.ctx(), key)
	if err != nil {
		return err
	}
	view := keyPage{
		Scope: key.Scope, Value: key.Value, State: state, Timeline: timeline, Done: h.doneOf(p, key), Token: p.r.URL.Query().Get("k"),
		MayViewBody: h.has(p, PermissionViewBody), MayExpire: h.has(p, PermissionExpire), MayDelete: h.has(p, PermissionDelete),
	}
	if state.Record != nil {
		view.Headers = headersOf(state.Record.Header)
		if state.Record.Open() {
			if view.Open, err = h.openOf(p, keyRef{key.Scope, key.Value}); err != nil {
				return err
			}
			view.MaySettle, view.MayAbandon = h.has(p, PermissionSettle), h.has(p, PermissionAbandon)
		}
	}
	return h.render(p, "key", "Key", view)
}

// headersOf returns the headers sorted by name, one entry per value.
func headersOf(recorded map[string][]string) []header {
	var headers []header
	for name, values := range recorded {
		for _, value := range values {
			headers = append(headers, header{name, value})
		}
	}
	slices.SortStableFunc(headers, func(a, b header) int { return cmp.Compare(a.Name, b.Name) })
	return headers
}

// bodyShownBytesMax is the maximum number of bytes of a body that are shown.
const bodyShownBytesMax = 64 << 10

// bodyHexBytesMax is the maximum for a body that is not text.
const bodyHexBytesMax = 4 << 10

// bodyPage is the data of body.html.
type bodyPage struct {
	Scope, Value string
	Record       *operator.Record
	Token        string
	Text         string // the shown text
	Form         string // text, JSON or hexadecimal
	ShownBytes   int    // of the body, from its beginning
	Bytes        int
}

// body shows a recorded body to readers with PermissionViewBody.
func (h *Handler) body(p *page) error {
	actor, err := h.allowed(p.r, PermissionViewBody)
	if err != nil {
		return err
	}
	key, err := h.keyOf(p.r.URL.Query())
	if err != nil {
		return err
	}
	state, err := h.operator.Get(p.ctx(), key)
	if err != nil {
		return err
	}
	if state.Record == nil {
		return operator.ErrNotFound
	}
	body, err := h.operator.Body(p.ctx(), key)
	if err != nil {
		return err
	}
	h.options.Logger.Info("admin: a recorded body was shown", "actor", actor, "attempt", state.Record.Attempt.String())
	view := bodyPage{Scope: key.Scope, Value: key.Value, Record: state.Record, Token: p.r.URL.Query().Get("k"), Bytes: len(body)}
	view.Text, view.Form, view.ShownBytes = showBody(body, state.Record.Header)
	return h.render(p, "body", "Recorded body", view)
}

// Forms in which a body is shown.
const (
	formText = "text, as it was recorded"
	formJSON = "JSON, indented here for reading"
	formHex  = "hexadecimal, because it is not text: compressed, encrypted or binary"
)

// showBody returns the beginning of a body as text, its form, and the number of its bytes shown.
func showBody(body []byte, recorded map[string][]string) (text, form string, shown int) {
	if !printable(body) {
		shown = min(len(body), bodyHexBytesMax)
		return hex.Dump(body[:shown]), formHex, shown
	}
	if len(body) <= bodyShownBytesMax && isJSON(recorded) && nesting(body) <= bodyNestingMax {
		var indented bytes.Buffer
		if json.Indent(&indented, body, "", "  ") == nil && indented.Len() <= 2*bodyShownBytesMax {
			return indented.String(), formJSON, len(body)
		}
	}
	shown = min(len(body), bodyShownBytesMax)
	for shown < len(body) && !utf8.RuneStart(body[shown]) {
		shown--
	}
	return string(body[:shown]), formText, shown
}

// bodyNestingMax is the maximum nesting of a JSON body that is indented: deeper ones would become
// many times their size.
const bodyNestingMax = 32

// nesting returns the nesting depth of a JSON text.
func nesting(text []byte) (deepest int) {
	depth, quoted := 0, false
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case quoted && c == '\\':
			i++
		case c == '"':
			quoted = !quoted
		case quoted:
		case c == '[' || c == '{':
			depth++
			deepest = max(deepest, depth)
		case c == ']' || c == '}':
			depth--
		}
	}
	return deepest
}

// printable reports whether a body can be shown as text: UTF-8 without control characters.
func printable(body []byte) bool {
	return utf8.Valid(body) && !bytes.ContainsFunc(body, func(r rune) bool { return r < ' ' && r != '\n' && r != '\r' && r != '\t' || r == 0x7f })
}

func isJSON(recorded map[string][]string) bool {
	for name, values := range recorded {
		if strings.EqualFold(name, "Content-Type") && len(values) == 1 {
			kind, _, err := mime.ParseMediaType(values[0])
			return err == nil && (kind == "application/json" || strings.HasSuffix(kind, "+json"))
		}
	}
	return false
}

// done is an act that the next page reports.
type done struct {
	Act     Permission `json:"a"`
	Attempt string     `json:"t"`
	Actor   string     `json:"u"`
	Ref     keyRef     `json:"k"`
	At      time.Time  `json:"d"`
}

// doneShown is the time for which pages report an act.
const doneShown = time.Minute

// doneOf returns the act that the reader has just done to the key, or nil.
func (h *Handler) doneOf(p *page, key idempotency.Key) *done {
	var d done
	token := p.r.URL.Query().Get("done")
	if token == "" || h.sealer.open(purposeDone, token, &d) != nil || d.Ref.key() != key || d.Actor != p.actor || h.now().Sub(d.At) > doneShown {
		return nil
	}
	return &d
}

func parseAttempt(s string) (id idempotency.AttemptID, err error) {
	if id, err = operator.ParseAttemptID(s); err != nil {
		return id, invalid("An attempt's id is a UUID: 32 hexadecimal digits.")
	}
	return id, nil
}

// invalid is the refusal of a form's contents.
func invalid(detail string) error { return refusal{status: http.StatusBadRequest, detail: detail} }
