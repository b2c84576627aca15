package main

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/paidonce/idempotency/cmd/internal/terminal"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// The JSON of the commands. Names are stable: fields are added but never renamed.
type (
	recordJSON struct {
		Scope              string              `json:"scope"`
		Key                string              `json:"key"`
		Status             int                 `json:"status"`
		Attempt            string              `json:"attempt_id"`
		TraceID            string              `json:"trace_id,omitempty"`
		CreatedAt          time.Time           `json:"created_at"`
		ExpiresAt          time.Time           `json:"expires_at"`
		Expired            bool                `json:"expired"`
		Fingerprint        string              `json:"fingerprint"`
		FingerprintVersion int16               `json:"fingerprint_version"`
		BodyBytes          int64               `json:"body_bytes"`
		Headers            map[string][]string `json:"headers,omitempty"`
		HeadersError       string              `json:"headers_error,omitempty"`
		Body               []byte              `json:"body,omitempty"` // base64
	}

	holderJSON struct {
		PID         int        `json:"pid"`
		Since       *time.Time `json:"since,omitempty"`
		AgeMS       int64      `json:"age_ms"`
		State       string     `json:"state,omitempty"`
		WaitEvent   string     `json:"wait_event,omitempty"`
		Application string     `json:"application,omitempty"`
		Client      string     `json:"client,omitempty"`
	}

	eventJSON struct {
		At         time.Time   `json:"at"`
		Kind       string      `json:"kind"`
		Attempt    string      `json:"attempt_id,omitempty"`
		TraceID    string      `json:"trace_id,omitempty"`
		Status     int         `json:"status,omitempty"`
		Reason     string      `json:"reason,omitempty"`
		DurationUS int64       `json:"duration_us,omitempty"`
		Attempts   int         `json:"attempts,omitempty"`
		Effect     string      `json:"effect,omitempty"`
		Consumer   string      `json:"consumer,omitempty"`
		Actor      string      `json:"actor,omitempty"`
		Role       string      `json:"database_role,omitempty"`
		Holder     *holderJSON `json:"holder,omitempty"`
	}
)

func recordOf(r *operator.Record) *recordJSON {
	if r == nil {
		return nil
	}
	j := &recordJSON{
		Scope: r.Key.Scope, Key: r.Key.Value, Status: r.Status, Attempt: r.Attempt.String(), TraceID: r.TraceID,
		CreatedAt: r.CreatedAt, ExpiresAt: r.ExpiresAt, Expired: r.Expired,
		Fingerprint: fmt.Sprintf("%x", r.Fingerprint.Sum), FingerprintVersion: r.Fingerprint.Version,
		BodyBytes: r.BodyBytes, Headers: r.Header,
	}
	if r.HeaderErr != nil {
		j.HeadersError = r.HeaderErr.Error()
	}
	return j
}

func holderOf(h *operator.Holder) *holderJSON {
	if h == nil {
		return nil
	}
	j := &holderJSON{PID: h.PID, AgeMS: h.Age.Milliseconds(), State: h.State, WaitEvent: h.WaitEvent, Application: h.Application, Client: h.Client}
	if !h.Since.IsZero() {
		j.Since = &h.Since
	}
	return j
}

func eventOf(e *operator.Event) eventJSON {
	j := eventJSON{
		At: e.At, Kind: string(e.Kind), TraceID: e.TraceID, Status: e.Status, Reason: e.Reason, DurationUS: e.Duration.Microseconds(),
		Attempts: e.Attempts, Effect: e.Effect, Consumer: e.Consumer, Actor: e.Actor, Role: e.Role, Holder: holderOf(e.Holder),
	}
	if !e.Attempt.IsZero() {
		j.Attempt = e.Attempt.String()
	}
	return j
}

// printJSON prints value as one line of JSON.
func (a *app) printJSON(value any) error {
	if err := terminal.WriteJSON(a.out, value, ""); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

// table prints lines of tab-separated cells in columns.
func (a *app) table(lines []string) error {
	w := tabwriter.NewWriter(a.out, 0, 8, 2, ' ', 0)
	for _, line := range lines {
		_, _ = io.WriteString(w, strings.TrimRight(line, "\t")+"\n") // Flush returns the error
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

func (a *app) printf(format string, arguments ...any) error {
	if _, err := fmt.Fprintf(a.out, format, arguments...); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

func orDash(text string) string {
	if text == "" {
		return "-"
	}
	return text
}

func stamp(at time.Time) string {
	if at.IsZero() {
		return "-"
	}
	return at.UTC().Format("2006-01-02 15:04:05.000Z")
}

// sizeText returns a size with its unit, in powers of 1024, like PostgreSQL.
func sizeText(bytes int64) string {
	switch {
	case bytes < 10<<10:
		return fmt.Sprintf("%d B", bytes)
	case bytes < 10<<20:
		return fmt.Sprintf("%d kB", bytes>>10)
	}
	return fmt.Sprintf("%d MB", bytes>>20)
}

func holderText(h *operator.Holder) string {
	parts := []string{fmt.Sprintf("process %d", h.PID)}
	if !h.Since.IsZero() {
		parts = append(parts, "for "+h.Age.String())
	}
	for _, part := range []string{h.State, h.WaitEvent, h.Application, h.Client} {
		if part != "" {
			parts = append(parts, terminal.Clean(part))
		}
	}
	return strings.Join(parts, ", ")
}

func eventText(e *operator.Event) string {
	var parts []string
	add := func(name, value string) {
		if value != "" {
			parts = append(parts, name+terminal.Clean(value))
		}
	}
	if e.Status != 0 {
		add("status ", strconv.Itoa(e.Status))
	}
	add("effect ", e.Effect)
	add("by ", e.Actor)
	if e.Role != "" && e.Role != e.Actor {
		add("as ", e.Role)
	}
	add("", e.Reason)
	if e.Duration > 0 {
		add("in ", e.Duration.Round(time.Microsecond).String())
	}
	if e.Attempts > 1 {
		add("", fmt.Sprintf("%d attempts", e.Attempts))
	}
	if !e.Attempt.IsZero() {
		add("attempt ", e.Attempt.String())
	}
	add("trace ", e.TraceID)
	if e.Holder != nil {
		parts = append(parts, holderText(e.Holder))
	}
	return stamp(e.At) + "\t" + string(e.Kind) + "\t" + strings.Join(parts, ", ")
}

// counted returns a number and a noun.
func counted(n int64, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %ss", n, one)
}
