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

// keyPage is what key.html shows.
type keyPage struct {
	Scope, Value string
	State        operator.State
	Headers      []header
	Timeline     []operator.Event
	Done         *done  // what was done to the key just now, nil for nothing
	Token        string // of the key, for links

	MayViewBody, MayExpire, MayDelete bool
}

type header struct{ Name, Value string }

// key shows what is known of one key.
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
	}
	return h.render(p, "key", "Key", view)
}

// headersOf returns the headers in the order of their names, each value apart.
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

// bodyShownBytesMax is how much of a body is shown.
const bodyShownBytesMax = 64 << 10

// bodyHexBytesMax is how much is shown of one that is not text.
const bodyHexBytesMax = 4 << 10

// bodyPage is what body.html shows.
type bodyPage struct {
	Scope, Value string
	Record       *operator.Record
	Token        string
	Text         string // what is shown
	Form         string // how: text, JSON or hexadecimal
	ShownBytes   int    // of the body, from its beginning
	Bytes        int
}

// body shows a recorded body to who has the permission for that.
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

// Forms that a body is shown in.
const (
	formText = "text, as it was recorded"
	formJSON = "JSON, indented here for reading"
	formHex  = "hexadecimal, because it is not text: compressed, encrypted or binary"
)

// showBody returns the beginning of a body as text, in which form it is, and how many of its bytes are shown.
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

// bodyNestingMax is how deeply a body may be nested to be indented: what is deeper would become many times its size.
const bodyNestingMax = 32

// nesting returns how deeply a JSON text is nested.
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

// done is an act that was done, as the page after it tells.
type done struct {
	Act     Permission `json:"a"`
	Attempt string     `json:"t"`
	Actor   string     `json:"u"`
	Ref     keyRef     `json:"k"`
	At      time.Time  `json:"d"`
}

// doneShown is for how long a page tells of an act.
const doneShown = time.Minute

// doneOf returns the act that the reader has just done to the key, nil where there is none.
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

// invalid is a refusal of what a form said.
func invalid(detail string) error { return refusal{status: http.StatusBadRequest, detail: detail} }
