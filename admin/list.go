package admin

import (
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// keyRef is a key in a link.
type keyRef struct {
	Scope string `json:"s"`
	Value string `json:"k"`
}

func (k keyRef) key() idempotency.Key { return idempotency.Key{Scope: k.Scope, Value: k.Value} }

// listQuery is the query in a list's link.
type listQuery struct {
	Scope      string          `json:"s,omitempty"`
	Prefix     string          `json:"p,omitempty"`
	Class      int             `json:"c,omitempty"`
	Expiry     operator.Expiry `json:"e,omitempty"`
	From       string          `json:"f,omitempty"` // as the form sends it: see parseTime
	To         string          `json:"t,omitempty"`
	TraceID    string          `json:"x,omitempty"`
	Attempt    string          `json:"a,omitempty"`
	Descending bool            `json:"d,omitempty"`

	After operator.Cursor `json:"n,omitempty"`
	Page  int             `json:"i,omitempty"` // number of previous pages; only for display
}

// Filtered reports whether the list leaves records out.
func (q listQuery) Filtered() bool {
	first := q.first()
	first.Descending = false
	return first != listQuery{}
}

// first returns the query for the first page.
func (q listQuery) first() listQuery {
	q.After, q.Page = "", 0
	return q
}

// formTime is the format of a browser's date and time field; here it is UTC.
const formTime = "2006-01-02T15:04"

func parseTime(s string) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	for _, layout := range []string{formTime, formTime + ":05", time.RFC3339} {
		if t, err := time.Parse(layout, s); err == nil {
			return t.UTC(), nil
		}
	}
	return time.Time{}, invalid("A date is written as 2006-01-02T15:04, in UTC.")
}

func (q listQuery) filter() (operator.Filter, error) {
	f := operator.Filter{Scope: q.Scope, KeyPrefix: q.Prefix, StatusClass: q.Class, Expiry: q.Expiry, TraceID: q.TraceID}
	var err error
	if f.CreatedFrom, err = parseTime(q.From); err != nil {
		return f, err
	}
	if f.CreatedTo, err = parseTime(q.To); err != nil {
		return f, err
	}
	if q.Attempt != "" {
		if f.Attempt, err = parseAttempt(q.Attempt); err != nil {
			return f, err
		}
	}
	return f, nil
}

// row is a record in a list.
type row struct {
	operator.Record
	Link string // to its page
}

func (h *Handler) rows(records []operator.Record) []row {
	rows := make([]row, 0, len(records))
	for _, record := range records {
		rows = append(rows, row{record, h.keyLink(record.Key)})
	}
	return rows
}

func (h *Handler) keyLink(key idempotency.Key) string {
	return "key?k=" + h.sealer.seal(purposeKey, keyRef{key.Scope, key.Value})
}

func (h *Handler) listLink(q listQuery) string { return "list?q=" + h.sealer.seal(purposeList, q) }

// homePage is the data of home.html.
type homePage struct {
	Rows         []row
	RowsExamined int64
	Now          time.Time
	Figures      operator.Stats
}

// recentRows is the maximum number of newest records on the first page.
const recentRows = 20

// home shows the figures, the search and approximately the newest records.
func (h *Handler) home(p *page) error {
	stats, err := h.figures.get(p.ctx(), h.operator)
	if err != nil {
		return err
	}
	recent, err := h.operator.Recent(p.ctx(), recentRows)
	if err != nil {
		return err
	}
	return h.render(p, "home", "Keys", homePage{Rows: h.rows(recent.Records), RowsExamined: recent.RowsExamined, Now: recent.Now, Figures: stats})
}

// listPage is the data of list.html.
type listPage struct {
	Query        listQuery
	Rows         []row
	First, Next  string // links; empty if there is none
	Number       int
	RowsExamined int64
	Now          time.Time
	Took         time.Duration
}

// list shows a page of the records in the order of scope and key.
func (h *Handler) list(p *page) error {
	var q listQuery
	if token := p.r.URL.Query().Get("q"); token != "" {
		if err := h.sealer.open(purposeList, token, &q); err != nil {
			return errStaleLink
		}
	}
	filter, err := q.filter()
	if err != nil {
		return err
	}
	started := time.Now()
	list, err := h.operator.List(p.ctx(), filter, operator.Page{After: q.After, Descending: q.Descending})
	if err != nil {
		return err
	}
	view := listPage{
		Query: q, Rows: h.rows(list.Records), Number: q.Page + 1, RowsExamined: list.RowsExamined, Now: list.Now, Took: time.Since(started),
	}
	if q.After != "" {
		view.First = h.listLink(q.first())
	}
	if list.Next != "" {
		next := q
		next.After, next.Page = list.Next, q.Page+1
		view.Next = h.listLink(next)
	}
	return h.render(p, "list", "All keys", view)
}

// search takes a form with values that must not be in a URL, and redirects to a link that contains
// them sealed: to a key if one is named, else to a list.
func (h *Handler) search(p *page) error {
	form := p.r.PostForm
	key := trimKey(form.Get("key"))
	if form.Get("open") != "" {
		ref := keyRef{form.Get("scope"), key}
		if err := ref.key().Validate(); err != nil {
			return invalid(explain(err))
		}
		return redirect(p, h.keyLink(ref.key()))
	}
	q := listQuery{
		Scope: form.Get("scope"), Prefix: key, Expiry: operator.Expiry(form.Get("expiry")),
		From: form.Get("from"), To: form.Get("to"), TraceID: strings.TrimSpace(form.Get("trace")), Attempt: strings.TrimSpace(form.Get("attempt")),
		Descending: form.Get("order") == "descending",
	}
	if class := form.Get("class"); class != "" {
		var err error
		if q.Class, err = strconv.Atoi(class); err != nil {
			return invalid("The status is one of 2xx to 5xx.")
		}
	}
	if _, err := q.filter(); err != nil {
		return err
	}
	return redirect(p, h.listLink(q))
}

// trimKey removes spaces around a key and the quotes of a structured field, which are often copied
// with it from a header. No key can contain either.
func trimKey(s string) string {
	s = strings.TrimSpace(s)
	if len(s) >= 2 && s[0] == '"' && s[len(s)-1] == '"' {
		s = s[1 : len(s)-1]
	}
	return s
}

// explain explains to a reader why a scope or key is invalid. The errors quote nothing.
func explain(err error) string {
	switch {
	case errors.Is(err, idempotency.ErrScopeInvalid):
		return "That scope can't be one. It is the account whose key it is, and both are needed to open a key."
	case errors.Is(err, idempotency.ErrKeyInvalid):
		return "That key can't be one: a key is 1 to 255 visible ASCII characters without comma, space or quote."
	}
	return "That can't be asked for."
}

// redirect sends the browser on to a link of ours, by GET.
func redirect(p *page, link string) error {
	p.w.Header().Set("Location", "./"+link) // relative: only the client knows the prefix
	p.w.WriteHeader(http.StatusSeeOther)
	return nil
}

// keyOf opens the key in a link.
func (h *Handler) keyOf(values url.Values) (idempotency.Key, error) {
	ref, err := h.refOf(values.Get("k"))
	return ref.key(), err
}

// refOf opens the token of a key in a link.
func (h *Handler) refOf(token string) (ref keyRef, err error) {
	if h.sealer.open(purposeKey, token, &ref) != nil {
		return keyRef{}, errStaleLink
	}
	return ref, nil
}
