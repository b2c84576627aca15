package live

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
)

// Limits of [Plan]. A storm runs inside the bank, beside all other requests.
const (
	KeysMax         = 2000
	CopiesMax       = 8
	ClientsMax      = 64
	SharePercentMax = 60

	formBytesMax = 4 << 10
)

// Mode selects the twins that take part in a storm.
type Mode string

// The modes.
const (
	ModeBoth        Mode = "both"
	ModeProtected   Mode = "protected"
	ModeUnprotected Mode = "unprotected"
)

// Plan configures a storm.
type Plan struct {
	Mode         Mode    `json:"mode"`
	Keys         int     `json:"keys"`          // distinct payments, each with a key of its own
	Copies       int     `json:"copies"`        // number of times each is sent, without retries
	Clients      int     `json:"clients"`       // number of concurrent senders per side
	SharePercent int     `json:"share_percent"` // of attempts that meet a fault
	Faults       []Fault `json:"faults"`
}

// Limits are the limits of the page's form.
type Limits struct {
	KeysMax         int `json:"keys_max"`
	CopiesMax       int `json:"copies_max"`
	ClientsMax      int `json:"clients_max"`
	SharePercentMax int `json:"share_percent_max"`
	LanesMax        int `json:"lanes_max"` // per side
	BarsMax         int `json:"bars_max"`
}

var limits = Limits{KeysMax, CopiesMax, ClientsMax, SharePercentMax, lanesMax, barsMax}

// sides returns the sides that take part.
func (p *Plan) sides() []Side {
	switch p.Mode {
	case ModeProtected:
		return []Side{Protected}
	case ModeUnprotected:
		return []Side{Unprotected}
	}
	return []Side{Protected, Unprotected}
}

// parsePlan reads a form. The error's text is for the page's user.
func parsePlan(form url.Values) (Plan, error) {
	p := Plan{Mode: Mode(form.Get("mode")), Faults: []Fault{}}
	for name, values := range form {
		switch name {
		case "mode", "keys", "copies", "clients", "share":
			if len(values) != 1 {
				return p, fmt.Errorf("%s is given %d times", name, len(values))
			}
		case "fault":
		default:
			return p, errors.New("a field is unknown")
		}
	}
	for name, field := range map[string]struct {
		value    *int
		min, max int
	}{
		"keys": {&p.Keys, 1, KeysMax}, "copies": {&p.Copies, 1, CopiesMax}, "clients": {&p.Clients, 1, ClientsMax},
		"share": {&p.SharePercent, 0, SharePercentMax},
	} {
		value, err := strconv.Atoi(form.Get(name))
		if err != nil || value < field.min || value > field.max {
			return p, fmt.Errorf("%s must be an integer from %d to %d", name, field.min, field.max)
		}
		*field.value = value
	}
	if p.Mode != ModeBoth && p.Mode != ModeProtected && p.Mode != ModeUnprotected {
		return p, errors.New("mode must be both, protected or unprotected")
	}
	for _, value := range form["fault"] {
		if !slices.Contains(Faults(), Fault(value)) {
			return p, errors.New("a fault is unknown")
		}
		if !slices.Contains(p.Faults, Fault(value)) {
			p.Faults = append(p.Faults, Fault(value))
		}
	}
	return p, nil
}

// postStorm answers POST /live/storm, a form: with 202 and the storm, with 303 to the page for a
// browser without scripts, with 400, or with 409 if a storm is running.
func (l *Live) postStorm(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, formBytesMax)
	if err := r.ParseForm(); err != nil {
		invalid(w, "The form can't be read.")
		return
	}
	plan, err := parsePlan(r.PostForm)
	if err != nil {
		invalid(w, "A field of the form is refused: "+err.Error()+".")
		return
	}
	s, err := l.start(plan)
	switch {
	case errors.Is(err, errStormRuns):
		bank.WriteProblem(w, &bank.Problem{Status: http.StatusConflict, Slug: "storm-runs", Title: "A storm is running", Detail: "There is one storm at a time. Stop it, or wait for its end."})
		return
	case err != nil:
		refuse(w, err)
		return
	}
	accepted(w, r, s)
}

// postStop answers POST /live/storm/stop. If no storm runs, it does nothing.
func (l *Live) postStop(w http.ResponseWriter, r *http.Request) {
	l.stopStorm()
	accepted(w, r, l.board.current())
}

func accepted(w http.ResponseWriter, r *http.Request, s *Storm) {
	if r.Header.Get("Accept") != "application/json" {
		http.Redirect(w, r, "/", http.StatusSeeOther)
		return
	}
	bank.WriteJSON(w, http.StatusAccepted, s)
}

func invalid(w http.ResponseWriter, detail string) {
	bank.WriteProblem(w, &bank.Problem{Status: http.StatusBadRequest, Slug: "invalid-storm", Title: "The request is not valid", Detail: detail})
}
