package probe

import (
	"encoding/xml"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/paidonce/idempotency/cmd/internal/terminal"
)

// Verdict is the verdict on a rule.
type Verdict string

// The verdicts on a rule.
const (
	VerdictPass Verdict = "pass"
	VerdictFail Verdict = "fail"
	VerdictSkip Verdict = "skip" // it could not be judged
)

// The verdicts on an API.
const (
	ReportOK         = "ok"         // no binding rule is broken, and all are judged
	ReportBroken     = "broken"     // a binding rule is broken
	ReportIncomplete = "incomplete" // a binding rule could not be judged
)

// Result is the verdict on one rule. The names in its JSON are stable.
type Result struct {
	ID      string  `json:"id"`
	Level   Level   `json:"level"`
	Verdict Verdict `json:"verdict"`
	Source  string  `json:"source"`
	Detail  string  `json:"detail"`
	// Requests are curl lines that show a failure. Each ends with the answer's status, as a comment.
	Requests []string `json:"requests,omitempty"`
}

// Report is the result of an examination. Its texts have the names of shell variables in place of
// the values of the configured headers, except for those in publicHeaders, and of those in the
// queries of URLs. The names in its JSON are stable.
type Report struct {
	Verdict string   `json:"verdict"`
	Profile Profile  `json:"profile"`
	URL     string   `json:"url"`
	Rules   []Result `json:"rules"`
	// Stopped is the reason if the examination ended early, and empty otherwise.
	Stopped string `json:"stopped,omitempty"`
}

func (e *examiner) level(id string) Level {
	i := slices.IndexFunc(rules, func(r rule) bool { return r.id == id })
	level, _ := rules[i].in(e.Profile)
	return level
}

// notReached begins the detail of a rule that is not judged because the examination ended early.
const notReached = "not reached: "

// report returns the verdicts on all rules of the profile.
func (e *examiner) report() *Report {
	mask := e.mask.whole
	report := &Report{Verdict: ReportOK, Profile: e.Profile, URL: mask.Replace(maskedURL(e.URL)), Rules: []Result{}, Stopped: mask.Replace(e.stopped)}
	for _, r := range rules {
		level, source := r.in(e.Profile)
		if level == levelNone {
			continue
		}
		result := Result{Verdict: VerdictSkip, Detail: notReached + e.stopped}
		if judged := e.results[r.id]; judged != nil {
			result = *judged
		}
		result.ID, result.Level, result.Source, result.Detail = r.id, level, source, mask.Replace(result.Detail)
		result.Requests = slices.Clone(result.Requests)
		for i := range result.Requests {
			result.Requests[i] = mask.Replace(result.Requests[i])
		}
		switch {
		case level != LevelBinding:
		case result.Verdict == VerdictFail:
			report.Verdict = ReportBroken
		case result.Verdict == VerdictSkip && report.Verdict == ReportOK:
			report.Verdict = ReportIncomplete
		}
		report.Rules = append(report.Rules, result)
	}
	return report
}

// curl returns the request as a line for a shell.
func (r *request) curl() string { return r.curlWith("") }

// curlCut returns the request as a curl line that closes the connection after a time.
func (r *request) curlCut(after time.Duration) string {
	return r.curlWith(fmt.Sprintf(" --max-time %.3f", max(after, time.Millisecond).Seconds())) + "  # cut off without reading an answer"
}

func (r *request) curlWith(options string) string {
	var line strings.Builder
	to := shellQuoted(maskedURL(r.url))
	if r.url.RawQuery != "" { // it has variables
		to = `"` + maskedURL(r.url) + `"`
	}
	fmt.Fprintf(&line, "curl -i%s -X %s %s", options, r.method, to)
	for _, f := range r.fields {
		switch {
		case f.Name == "User-Agent" || f.Name == "Accept" && f.Value == "*/*":
		case !public(f.Name):
			fmt.Fprintf(&line, ` -H "%s: $%s"`, f.Name, variable(of(hasField(r.second, f.Name)), f.Name))
		case f.Value == "":
			line.WriteString(" -H " + shellQuoted(f.Name+";")) // so curl sends an empty one
		default:
			line.WriteString(" -H " + shellQuoted(f.Name+": "+f.Value))
		}
	}
	if len(r.body) > 0 {
		line.WriteString(" --data-binary " + shellQuoted(string(r.body)))
	} else if r.method != http.MethodGet {
		line.WriteString(" -d ''")
	}
	return line.String()
}

// shellQuoted returns text as one word of a shell.
func shellQuoted(text string) string {
	if !strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }) {
		return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
	}
	var quoted strings.Builder
	for i := range len(text) { // bytes
		switch c := text[i]; {
		case c == '\'' || c == '\\':
			quoted.WriteString(`\` + string(rune(c)))
		case c >= ' ' && c < 0x7f:
			quoted.WriteByte(c)
		default:
			fmt.Fprintf(&quoted, `\x%02x`, c)
		}
	}
	return "$'" + quoted.String() + "'"
}

// WriteText writes the report for people.
func (r *Report) WriteText(w io.Writer) error {
	table := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
	fmt.Fprintf(table, "%s, profile %s\n\n", terminal.Clean(r.URL), r.Profile)
	counts := map[string]int{}
	for _, result := range r.Rules {
		mark := string(result.Verdict)
		if result.Verdict == VerdictFail && result.Level == LevelBinding {
			mark = "FAIL"
		}
		counts[string(result.Level)+string(result.Verdict)]++
		detail := result.Detail
		if r.Stopped != "" && detail == notReached+r.Stopped { // it is printed once
			detail = "not reached"
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", mark, result.Level, result.ID, terminal.Clean(detail))
		fmt.Fprintf(table, "\t\t\t[%s]\n", result.Source)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	var text strings.Builder
	for _, result := range r.Rules {
		if len(result.Requests) == 0 {
			continue
		}
		fmt.Fprintf(&text, "\n%s:\n", result.ID)
		for _, request := range result.Requests {
			fmt.Fprintf(&text, "  %s\n", terminal.Clean(request))
		}
	}
	if r.Stopped != "" {
		fmt.Fprintf(&text, "\nended early: %s\n", terminal.Clean(r.Stopped))
	}
	fmt.Fprintf(&text, "\nbinding rules: %d passed, %d broken, %d not judged; advisory: %d passed, %d broken, %d not judged\nverdict: %s\n",
		counts["bindingpass"], counts["bindingfail"], counts["bindingskip"], counts["advisorypass"], counts["advisoryfail"], counts["advisoryskip"], r.Verdict)
	_, err := io.WriteString(w, text.String())
	return err
}

// The elements of a JUnit report.
type (
	junitSuite struct {
		XMLName  xml.Name    `xml:"testsuite"`
		Name     string      `xml:"name,attr"`
		Tests    int         `xml:"tests,attr"`
		Failures int         `xml:"failures,attr"`
		Errors   int         `xml:"errors,attr"`
		Skipped  int         `xml:"skipped,attr"`
		Cases    []junitCase `xml:"testcase"`
	}
	junitCase struct {
		Class   string        `xml:"classname,attr"`
		Name    string        `xml:"name,attr"`
		Failure *junitMessage `xml:"failure,omitempty"`
		Error   *junitMessage `xml:"error,omitempty"`
		Skipped *junitMessage `xml:"skipped,omitempty"`
	}
	junitMessage struct {
		Message string `xml:"message,attr"`
		Text    string `xml:",chardata"`
	}
)

// WriteJUnit writes the report as JUnit XML. A binding rule that is broken is a failure, and one
// that could not be judged an error. Advisory rules never turn a build red: they are skipped.
func (r *Report) WriteJUnit(w io.Writer) error {
	suite := junitSuite{Name: "idemctl probe, profile " + string(r.Profile), Tests: len(r.Rules)}
	for _, result := range r.Rules {
		c := junitCase{Class: "idempotency." + string(result.Level), Name: result.ID}
		message := &junitMessage{Message: result.Detail, Text: strings.Join(append([]string{result.Source}, result.Requests...), "\n")}
		switch {
		case result.Verdict == VerdictPass:
		case result.Level != LevelBinding:
			c.Skipped = message
			suite.Skipped++
		case result.Verdict == VerdictFail:
			c.Failure = message
			suite.Failures++
		default:
			c.Error = message
			suite.Errors++
		}
		suite.Cases = append(suite.Cases, c)
	}
	text, err := xml.MarshalIndent(suite, "", "  ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s%s\n", xml.Header, text)
	return err
}
