package admin

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"html/template"
	"io/fs"
	"math"
	"mime"
	"net/http"
	"path"
	"strconv"
	"strings"
	"time"

	"github.com/paidonce/idempotency/storage/postgres/operator"
)

//go:embed assets
var embedded embed.FS

// asset is a file that pages load. Its name changes with its contents, so that a browser may cache
// it.
type asset struct {
	content []byte
	kind    string
}

func (a *asset) serve(p *page) error {
	p.w.Header().Set("Content-Type", a.kind)
	p.w.Header().Set("Cache-Control", "private, max-age=31536000, immutable")
	_, _ = p.w.Write(a.content) // the browser may be gone
	return nil
}

// assetsByName has the assets by the name in their URL, and assetNames has those names by file.
// Both are made once and never changed.
var assetsByName, assetNames = loadAssets("admin.css", "admin.js", "icon.svg")

func loadAssets(files ...string) (byName map[string]*asset, names map[string]string) {
	byName, names = map[string]*asset{}, map[string]string{}
	for _, file := range files {
		content, err := embedded.ReadFile("assets/" + file)
		if err != nil { // it is compiled in
			panic(err)
		}
		sum := sha256.Sum256(content)
		extension := path.Ext(file)
		name := strings.TrimSuffix(file, extension) + "-" + hex.EncodeToString(sum[:6]) + extension
		byName[name], names[file] = &asset{content, mime.TypeByExtension(extension)}, name
	}
	return byName, names
}

// templates are the pages by name, each with the layout around it.
var templates = parseTemplates("home", "list", "open", "key", "body", "confirm", "confirm-open", "consumers", "outbox", "parked", "message", "content", "confirm-message", "stats", "doctor", "refusal")

func parseTemplates(names ...string) map[string]*template.Template {
	files, err := fs.Sub(embedded, "assets")
	if err != nil { // the folder is compiled in
		panic(err)
	}
	layout := template.Must(template.New("layout.html").Funcs(functions).ParseFS(files, "layout.html"))
	pages := map[string]*template.Template{}
	for _, name := range names {
		pages[name] = template.Must(template.Must(layout.Clone()).ParseFS(files, name+".html"))
	}
	return pages
}

// view is the layout's data, around a page's own Data.
type view struct {
	Name, Title string // of the page
	Site        string // Options.Title
	Actor       string // empty if unknown
	Data        any
}

func (h *Handler) render(p *page, name, title string, data any) error {
	return h.renderStatus(p, http.StatusOK, name, title, data)
}

// renderStatus answers with a page. If it returns an error it has written nothing.
func (h *Handler) renderStatus(p *page, status int, name, title string, data any) error {
	var body bytes.Buffer
	if err := templates[name].Execute(&body, view{name, title, h.options.Title, p.actor, data}); err != nil {
		return fmt.Errorf("render %s: %w", name, err)
	}
	p.w.Header().Set("Content-Type", "text/html; charset=utf-8")
	p.w.WriteHeader(status)
	_, _ = p.w.Write(body.Bytes()) // the browser may be gone
	return nil
}

var functions = template.FuncMap{
	"asset":       func(file string) string { return assetNames[file] },
	"ago":         formatAgo,
	"bytes":       formatBytes,
	"chip":        chipOf,
	"classes":     func() []int { return []int{2, 3, 4, 5} },
	"clock":       formatClock,
	"count":       formatCount,
	"hex":         func(b [32]byte) string { return hex.EncodeToString(b[:]) },
	"int":         func(n any) string { return formatNumber(toInt64(n)) },
	"long":        formatDuration,
	"ofMessage":   func(name string) bool { return name == "message" || name == "content" || name == "confirm-message" },
	"openChip":    openChip,
	"parkedChip":  parkedChip,
	"toldMessage": tellMessageEvent,
	"settlement":  tellSettlement,
	"rowsOf":      func(caption string, rows []row, now time.Time) rowsView { return rowsView{caption, rows, now} },
	"within": func(name string) bool {
		return name == "key" || name == "body" || name == "confirm" || name == "confirm-open"
	},
	"size":  func(s operator.Stats) string { return formatBytes(s.TableBytes + s.IndexBytes + s.ToastBytes) },
	"stamp": formatStamp,
	"told":  tellEvent,
	"tone":  eventTone,
}

// rowsView is a table of records.
type rowsView struct {
	Caption string
	Rows    []row
	Now     time.Time
}

func toInt64(n any) int64 {
	switch n := n.(type) {
	case int:
		return int64(n)
	case int64:
		return n
	}
	panic("idempotency/admin: not a number")
}

// formatNumber groups the digits by thousands.
func formatNumber(n int64) string {
	digits := strconv.FormatInt(n, 10)
	sign := ""
	if n < 0 {
		sign, digits = "-", digits[1:]
	}
	for at := len(digits) - 3; at > 0; at -= 3 {
		digits = digits[:at] + "," + digits[at:]
	}
	return sign + digits
}

// formatCount marks an estimate as such, and leaves out its last digits.
func formatCount(c operator.Count) string {
	if !c.Estimated {
		return formatNumber(c.Rows)
	}
	unit := int64(1)
	for c.Rows/unit >= 1000 {
		unit *= 10
	}
	return "about " + formatNumber((c.Rows+unit/2)/unit*unit)
}

func formatBytes(n int64) string {
	if n < 1000 {
		return formatNumber(n) + " B"
	}
	value, unit := float64(n), 0
	units := []string{"B", "kB", "MB", "GB", "TB", "PB"}
	for value >= 999.5 && unit < len(units)-1 {
		value /= 1000
		unit++
	}
	if value < 10 {
		return strconv.FormatFloat(value, 'f', 1, 64) + " " + units[unit]
	}
	return strconv.FormatFloat(value, 'f', 0, 64) + " " + units[unit]
}

// formatStamp writes a time to the second, in UTC, for people and for programs.
func formatStamp(t time.Time) template.HTML {
	if t.IsZero() {
		return "not known"
	}
	t = t.UTC()
	// There are only digits, nothing from a record.
	return template.HTML(`<time datetime="` + t.Format(time.RFC3339Nano) + `">` + t.Format("2006-01-02 15:04:05") + ` UTC</time>`)
}

func formatClock(t time.Time) string { return t.UTC().Format("15:04:05") + " UTC" }

// formatDuration writes a duration in its largest unit, and adds the next if that matters.
func formatDuration(d time.Duration) string {
	d = max(d, -math.MaxInt64) // the least has no negation
	switch {
	case d < 0:
		return "-" + formatDuration(-d)
	case d < time.Millisecond:
		return formatNumber(d.Microseconds()) + " µs"
	case d < 10*time.Millisecond:
		return strconv.FormatFloat(float64(d.Microseconds())/1000, 'f', 1, 64) + " ms"
	case d < time.Second:
		return formatNumber(d.Milliseconds()) + " ms"
	case d < 10*time.Second:
		return strconv.FormatFloat(d.Seconds(), 'f', 1, 64) + " s"
	case d < time.Minute:
		return formatNumber(int64(d/time.Second)) + " s"
	case d < time.Hour:
		return formatNumber(int64(d/time.Minute)) + " min"
	case d < 48*time.Hour:
		return formatNumber(int64(d/time.Hour)) + " h"
	}
	return formatNumber(int64(d/(24*time.Hour))) + " days"
}

// formatAgo writes the distance of a time from now.
func formatAgo(now, t time.Time) string {
	switch d := now.Sub(t); {
	case t.IsZero() || now.IsZero():
		return ""
	case d > -time.Second && d < time.Second:
		return "just now"
	case d >= 10*time.Second:
		return formatDuration(d) + " ago"
	case d > 0:
		return formatNumber(int64(d/time.Second)) + " s ago"
	case d > -10*time.Second:
		return "in " + formatNumber(int64(-d/time.Second)) + " s"
	default:
		return "in " + formatDuration(-max(d, -math.MaxInt64))
	}
}

// chip is a short word in a frame. Its tone only repeats the meaning of its text.
type chip struct{ Text, Tone string }

// chipOf returns the chip of a recorded status.
func chipOf(status int) chip {
	text := strconv.Itoa(status)
	if status == 0 {
		return chip{"open", "warn"}
	}
	switch status / 100 {
	case 2:
		return chip{text + " executed", "good"}
	case 3:
		return chip{text + " redirect", "good"}
	case 4:
		return chip{text + " declined", "warn"}
	}
	return chip{text + " failed", "bad"}
}

// openChip returns the chip of an open request.
func openChip(r operator.OpenRequest) chip {
	tone := "plain"
	switch r.State() {
	case operator.OpenParked:
		tone = "bad"
	case operator.OpenDue:
		tone = "warn"
	}
	return chip{string(r.State()), tone}
}

// parkedChip returns the chip of a parked message.
func parkedChip(state operator.ParkedState) chip {
	tone := "plain"
	switch state {
	case operator.MessageDead:
		tone = "bad"
	case operator.MessageWaiting:
		tone = "warn"
	}
	return chip{string(state), tone}
}

// tellMessageEvent describes an event of a message in a line.
func tellMessageEvent(e operator.Event) string {
	text := ""
	switch e.Kind {
	case operator.EventPublished:
		text = "Published; the outbox still has it"
	case operator.EventRecorded:
		return "Handled"
	case operator.EventParked:
		text = "Parked"
	case operator.EventRefused:
		text = "Refused by the broker"
	case operator.EventNext:
		return "Due from this time on"
	case "act-redrive":
		text = "Redriven by " + e.Actor
	case "act-drop", "act-outbox-drop":
		text = "Dropped by " + e.Actor
	case "act-outbox-retry":
		text = "Given to the relay again by " + e.Actor
	default:
		return tellEvent(e)
	}
	if e.Reason != "" {
		text += ": " + e.Reason
	}
	return text
}

// tellSettlement describes a settlement that an operator may choose.
func tellSettlement(as operator.Settlement) string {
	switch as {
	case operator.SettleDone:
		return "done: the other service did it"
	case operator.SettleDeclined:
		return "declined: it refused, and will not do it later"
	case operator.SettleNotSent:
		return "not sent: it never got the request, for certain, and nothing is on its way to it"
	}
	return "not known: send it again with the same key, if its rules permit that"
}

// tellEvent describes an event in a line.
func tellEvent(e operator.Event) string {
	switch e.Kind {
	case operator.EventRecorded:
		return "Attempt executed, its answer recorded"
	case operator.EventRunning:
		return "Key is held: an attempt runs, or a retry reads the record"
	case operator.EventExpires:
		return "Record expires"
	case operator.EventExpired:
		return "Record expired; replayed until the reaper deletes it"
	case operator.EventActExpire:
		return "Expired by " + e.Actor
	case operator.EventActDelete:
		return "Deleted by " + e.Actor
	case operator.EventIntent:
		return "Effect " + e.Effect + ": its intent committed, before it was sent"
	case operator.EventSentAgain:
		return "Effect " + e.Effect + ": about to be sent again (send " + formatNumber(int64(e.Attempts)) + ")"
	case operator.EventResult:
		return "Effect " + e.Effect + ": " + e.Reason
	case operator.EventNext:
		return "Open: anybody may take it over from this time on"
	case operator.EventParked:
		return "Parked: it waits for a person"
	case "act-resume":
		return "Resumed by " + e.Actor
	case "act-park":
		return "Parked by " + e.Actor
	case "act-abandon":
		return "Abandoned by " + e.Actor
	case "act-settle-done", "act-settle-declined", "act-settle-not-sent", "act-settle-retry":
		return "Effect " + e.Effect + ": settled as " + strings.TrimPrefix(string(e.Kind), "act-settle-") + " by " + e.Actor
	case operator.EventExecuted:
		return "Request executed"
	case operator.EventReplayed:
		return "Retry answered with a replay"
	case operator.EventInProgress:
		return "Request refused: the key was in progress"
	case operator.EventMismatch:
		return "Request refused: the key is another request's"
	case operator.EventNotExecuted:
		return "Request not executed"
	case operator.EventUnknown:
		return "Outcome unknown to the client"
	}
	return string(e.Kind)
}

// eventTone returns the tone of an event's mark.
func eventTone(kind operator.EventKind) string {
	switch kind {
	case operator.EventRecorded, operator.EventExecuted:
		return "good"
	case operator.EventActExpire, operator.EventActDelete, operator.EventUnknown, operator.EventParked, operator.EventRefused, "act-abandon":
		return "bad"
	case operator.EventSentAgain, operator.EventRunning, operator.EventMismatch, operator.EventNotExecuted, operator.EventInProgress:
		return "warn"
	}
	return "plain"
}
