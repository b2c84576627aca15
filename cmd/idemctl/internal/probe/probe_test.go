package probe_test

import (
	"cmp"
	"context"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/paidonce/idempotency/cmd/idemctl/internal/probe"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/memory"
)

const (
	secret      = "Bearer canary-secret-of-acme"
	otherSecret = "Bearer canary-secret-of-globex"
)

// configOf returns a configuration for a server of these tests, with short pauses.
func configOf(t *testing.T, handler http.Handler) probe.Config {
	t.Helper()
	running := httptest.NewServer(handler)
	t.Cleanup(running.Close)
	config := probe.Config{
		URL: parse(t, running.URL+"/payments"), Method: http.MethodPost, Profile: probe.ProfileIETF,
		Body:         `{"amount":{{int}},"reference":"{{uuid}}"}`,
		Header:       []probe.Field{{Name: "Authorization", Value: secret}},
		SecondHeader: []probe.Field{{Name: "Authorization", Value: otherSecret}},
		EffectsURL:   parse(t, running.URL+"/effects"), EffectsPath: "/data/made~1of/0/effects",
		Keep: time.Nanosecond, Patience: waitMax, EffectsWait: 50 * time.Millisecond, Settle: 5 * time.Millisecond, Interval: time.Nanosecond,
	}
	if s, ok := handler.(*server); ok {
		config.Progress = s.progress
		if s.fault == cutSticks {
			config.Patience = 50 * time.Millisecond
		}
	}
	return config
}

func parse(t *testing.T, text string) *url.URL {
	t.Helper()
	u, err := url.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func run(t *testing.T, config probe.Config) *probe.Report {
	t.Helper()
	report, err := probe.Run(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	return report
}

// text returns the report for people.
func text(t *testing.T, report *probe.Report) string {
	t.Helper()
	var b strings.Builder
	if err := report.WriteText(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// verdicts returns the ids of the rules of a level with a verdict.
func verdicts(report *probe.Report, level probe.Level, verdict probe.Verdict) []string {
	ids := []string{}
	for _, r := range report.Rules {
		if r.Level == level && r.Verdict == verdict {
			ids = append(ids, r.ID)
		}
	}
	return ids
}

// TestEachFaultIsFound: each server breaks the rules that its fault breaks, and no others. All other
// binding rules pass or, if the fault makes that impossible, are skipped.
func TestEachFaultIsFound(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		fault    fault
		broken   []string // exactly these
		byCount  []string // these too if effects are counted: ids don't always show them
		chance   []string // of these, the ones that ids show if two retries come at once
		unjudged []string // could not be judged
		// could not be judged either if effects are counted
		unjudgedByCount []string
	}{
		{fault: executesTwice, byCount: []string{"first-one-effect", "replay-at-once", "copies-one-effect", "cut-one-effect"}},
		{fault: noFingerprint, broken: []string{"mismatch-refused"}},
		{fault: executesMismatch, broken: []string{"mismatch-refused", "mismatch-no-effect"}},
		{fault: executesRefused, byCount: []string{"mismatch-no-effect"}},
		{fault: mismatchOverwrites, broken: []string{"mismatch-keeps-answer"}},
		{fault: checkThenAct, broken: []string{"copies-one-effect", "copies-answer"}},
		{fault: copiesFail, broken: []string{"copies-answer"}},
		{fault: copiesOwnAnswer, broken: []string{"copies-answer"}},
		{fault: notScoped, broken: []string{"key-scoped"}},
		{fault: notScopedMismatch, broken: []string{"key-scoped"}},
		{
			fault:    forgets,
			broken:   []string{"replay-body", "replay-location", "replay-one-effect", "replay-at-once", "mismatch-refused", "mismatch-no-effect", "copies-one-effect", "copies-answer", "cut-one-effect"},
			unjudged: []string{"replay-later", "mismatch-keeps-answer"},
		},
		{fault: replayStatus, broken: []string{"replay-status", "copies-answer"}, unjudged: []string{"replay-later", "mismatch-keeps-answer"}},
		{fault: replayBody, broken: []string{"replay-body", "copies-answer"}, unjudged: []string{"replay-later", "mismatch-keeps-answer"}},
		{fault: replayNoLocation, broken: []string{"replay-location", "copies-answer"}, unjudged: []string{"replay-later", "mismatch-keeps-answer"}},
		{
			fault: replayExecutes, byCount: []string{"replay-one-effect", "replay-at-once", "copies-one-effect", "cut-one-effect"},
			unjudgedByCount: []string{"replay-later", "mismatch-keeps-answer"},
		},
		{
			fault: conflictAfterAnswer, broken: []string{"no-409-after-answer"},
			unjudged: []string{"replay-status", "replay-body", "replay-location", "replay-at-once", "replay-later", "mismatch-keeps-answer"},
		},
		{fault: expiresAtOnce, broken: []string{"replay-later"}},
		{
			fault:   answersBeforeRecording, // whatever comes at once is executed
			broken:  []string{"replay-at-once", "mismatch-refused", "mismatch-no-effect", "mismatch-keeps-answer", "copies-one-effect", "copies-answer"},
			byCount: []string{"cut-one-effect"},
			chance:  []string{"cut-one-effect"},
		},
		{fault: acceptsMissing, broken: []string{"key-missing"}},
		{fault: failsMissing, broken: []string{"key-missing"}},
		{fault: executesMissing, byCount: []string{"key-missing"}},
		{fault: acceptsEmpty, broken: []string{"key-empty"}},
		{fault: acceptsLong, broken: []string{"key-too-long"}},
		{fault: takesFirstLine, broken: []string{"key-twice"}},
		{fault: joinsLines, broken: []string{"key-twice"}},
		{fault: ignoresCase, broken: []string{"key-case-sensitive"}},
		{fault: truncatesKeys, broken: []string{"key-whole"}},
		{fault: onlySmallLetters},
		{fault: countsLate},
		{fault: cutLosesEffect, byCount: []string{"cut-one-effect"}},
		{fault: cutDoublesEffect, byCount: []string{"cut-one-effect"}},
		{fault: cutSticks, broken: []string{"cut-answered"}, unjudged: []string{"cut-one-effect"}},
		{fault: cutRecorded, broken: []string{"cut-answered"}, unjudged: []string{"cut-one-effect"}},
		{fault: nothing},
	} {
		for _, counted := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/counted=%v", test.fault, counted), func(t *testing.T) {
				t.Parallel()
				config := configOf(t, newServer(test.fault))
				want, unjudged := slices.Clone(test.broken), slices.Clone(test.unjudged)
				if counted {
					want, unjudged = append(want, test.byCount...), append(unjudged, test.unjudgedByCount...)
				} else {
					config.EffectsURL, config.EffectsPath = nil, ""
				}
				report := run(t, config)
				for verdict, want := range map[probe.Verdict][]string{probe.VerdictFail: want, probe.VerdictSkip: unjudged} {
					got := verdicts(report, probe.LevelBinding, verdict)
					if !counted {
						got = slices.DeleteFunc(got, func(id string) bool { return slices.Contains(test.chance, id) })
					}
					slices.Sort(got)
					want = slices.Sorted(slices.Values(want))
					if !slices.Equal(got, want) {
						t.Errorf("%s: %q, want %q\n%s", verdict, got, want, text(t, report))
					}
				}
				verdict := probe.ReportOK
				if len(want) > 0 {
					verdict = probe.ReportBroken
				}
				if report.Verdict != verdict {
					t.Errorf("the verdict is %s, want %s", report.Verdict, verdict)
				}
				for _, r := range report.Rules {
					if (r.Verdict == probe.VerdictFail) != (len(r.Requests) > 0) || r.Source == "" || r.Detail == "" {
						t.Errorf("%s %s, source %q, detail %q, %d requests", r.ID, r.Verdict, r.Source, r.Detail, len(r.Requests))
					}
				}
			})
		}
	}
}

// protected is a payment API with this module's middleware.
func protected(t *testing.T) http.Handler {
	t.Helper()
	s := newServer(nothing) // counts effects
	scope := func(r *http.Request) (string, error) { return r.Header.Get("Authorization"), nil }
	idem := middleware.New(memory.New(nil), scope, nil)
	return idem.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			s.ServeHTTP(w, r)
			return
		}
		s.answer(w)
	}))
}

// The middleware passes every rule of every profile, if effects are counted and if they aren't.
func TestTheMiddlewarePasses(t *testing.T) {
	t.Parallel()
	for _, profile := range probe.Profiles {
		for _, counted := range []bool{true, false} {
			for name, body := range map[string]string{"placeholders": `{"amount":{{int}}}`, "none": `{"amount":1250}`, "form": "amount=1250", "empty": ""} {
				t.Run(fmt.Sprintf("%s/%v/%s", profile, counted, name), func(t *testing.T) {
					t.Parallel()
					config := configOf(t, protected(t))
					config.Profile, config.Body = profile, body
					if !counted {
						config.EffectsURL, config.EffectsPath = nil, ""
					}
					report := run(t, config)
					failed := append(verdicts(report, probe.LevelBinding, probe.VerdictFail), verdicts(report, probe.LevelAdvisory, probe.VerdictFail)...)
					if profile == probe.ProfileStripe { // Stripe says 400
						failed = slices.DeleteFunc(failed, func(id string) bool { return id == "mismatch-is-400" })
					}
					if report.Verdict != probe.ReportOK || len(failed) > 0 {
						t.Errorf("the verdict is %s, failed %q\n%s", report.Verdict, failed, text(t, report))
					}
				})
			}
		}
	}
}

// Advisory rules are reported, and never break an API.
func TestAdvisoryRulesBreakNothing(t *testing.T) {
	t.Parallel()
	s := newServer(nothing)
	s.plain = true
	report := run(t, configOf(t, s))
	if report.Verdict != probe.ReportOK {
		t.Errorf("the verdict is %s\n%s", report.Verdict, text(t, report))
	}
	want := []string{"problem-json", "refusal-link", "retry-after", "replay-marker"}
	if got := verdicts(report, probe.LevelAdvisory, probe.VerdictFail); !slices.Equal(got, want) {
		t.Errorf("advisory rules that fail: %q, want %q", got, want)
	}
	var junit strings.Builder
	if err := report.WriteJUnit(&junit); err != nil || strings.Contains(junit.String(), "<failure") || strings.Count(junit.String(), "<skipped") != len(want) {
		t.Errorf("%v in the JUnit report\n%s", err, junit.String())
	}
}

// A key in an answer is no id: it differs between requests without any effect.
func TestEchoOfTheKeyIsNoID(t *testing.T) {
	t.Parallel()
	config := configOf(t, newServer(forgetsEchoesKey))
	config.EffectsURL, config.EffectsPath = nil, ""
	report := run(t, config)
	if got := verdicts(report, probe.LevelBinding, probe.VerdictSkip); !slices.Contains(got, "replay-one-effect") || !slices.Contains(got, "copies-one-effect") {
		t.Errorf("not judged: %q\n%s", got, text(t, report))
	}
}

// A rule that can't be judged is not ok, if it is binding.
func TestWhatCanNotBeJudged(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		change   func(c *probe.Config)
		wrap     func(next http.Handler) http.Handler
		unjudged []string // nil: all
		says     string
	}{
		"no second caller": {change: func(c *probe.Config) { c.SecondHeader = nil }, unjudged: []string{"key-scoped"}, says: "--scope-header"},
		"the second caller is refused": {
			wrap: func(next http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if r.Header.Get("Authorization") == otherSecret {
						http.Error(w, "who are you?", http.StatusUnauthorized)
						return
					}
					next.ServeHTTP(w, r)
				})
			}, unjudged: []string{"key-scoped"}, says: "401",
		},
		"no ids": {
			change: func(c *probe.Config) { c.EffectsURL, c.EffectsPath = nil, "" },
			wrap: func(next http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					recorder := httptest.NewRecorder()
					next.ServeHTTP(recorder, r)
					if recorder.Code == http.StatusCreated {
						w.WriteHeader(http.StatusCreated)
						return
					}
					w.WriteHeader(recorder.Code)
				})
			},
			unjudged: []string{"first-one-effect", "replay-one-effect", "replay-at-once", "mismatch-no-effect", "key-case-sensitive", "key-whole", "key-scoped", "copies-one-effect", "cut-one-effect"},
			says:     "--effects-url",
		},
		"all but the first are declined": {
			wrap: func(next http.Handler) http.Handler {
				var mu sync.Mutex
				var paid []string
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					// What is no key is refused by next.
					if key := r.Header.Values("Idempotency-Key"); len(key) == 1 && len(key[0]) > 2 && len(key[0]) <= len(`""`)+255 {
						mu.Lock()
						if len(paid) < 2 {
							paid = append(paid, key[0])
						}
						declined := !slices.Contains(paid, key[0])
						mu.Unlock()
						if !declined {
							next.ServeHTTP(w, r)
							return
						}
						http.Error(w, "no money is left", http.StatusPaymentRequired)
						return
					}
					next.ServeHTTP(w, r)
				})
			},
			unjudged: []string{"replay-at-once", "no-409-after-answer", "mismatch-refused", "mismatch-no-effect", "mismatch-keeps-answer", "key-case-sensitive", "key-whole", "key-scoped", "copies-one-effect", "copies-answer", "cut-one-effect", "cut-answered"},
			says:     "answered with 402",
		},
		"everything is refused": {
			wrap: func(http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no", http.StatusForbidden) })
			}, says: "got 403",
		},
		"the effects URL is another one": {change: func(c *probe.Config) { c.EffectsPath = "/nowhere" }, says: "nothing at --effects-path"},
		"the effects are no number":      {change: func(c *probe.Config) { c.EffectsPath = "/data" }, says: "neither an integer nor an array"},
		"redirects": {
			wrap: func(http.Handler) http.Handler {
				return http.RedirectHandler("/elsewhere", http.StatusTemporaryRedirect)
			},
			change: func(c *probe.Config) { c.EffectsURL, c.EffectsPath = nil, "" }, says: "redirects are not followed",
		},
		"no HTTP": {
			wrap: func(http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
					if conn, _, err := w.(http.Hijacker).Hijack(); err == nil {
						_, _ = conn.Write([]byte("SSH-2.0-x\r\n\r\n"))
						_ = conn.Close()
					}
				})
			}, says: "it is not HTTP/1.1",
		},
		"closes": {
			wrap: func(http.Handler) http.Handler {
				return http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
			}, says: "the connection was closed",
		},
		"another certificate": {change: func(c *probe.Config) {
			server := httptest.NewTLSServer(http.NotFoundHandler())
			server.Config.ErrorLog = log.New(io.Discard, "", 0)
			t.Cleanup(server.Close)
			c.URL = parse(t, server.URL)
			c.EffectsURL, c.EffectsPath = nil, ""
		}, says: "certificate"},
		"no time":                          {change: func(c *probe.Config) { c.TimeMax = time.Nanosecond }, says: "used up"},
		"no requests":                      {change: func(c *probe.Config) { c.RequestsMax = 2 }, says: "the number of requests is used up"},
		"nobody listens":                   {change: func(c *probe.Config) { c.URL.Host = "127.0.0.1:1" }, says: "can't be reached"},
		"the host is another one, unasked": {change: func(c *probe.Config) { c.URL.Host = "192.0.2.1:80" }, says: "is not this machine"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newServer(nothing)
			var handler http.Handler = s
			if test.wrap != nil {
				handler = test.wrap(s)
			}
			config := configOf(t, handler)
			config.Progress = s.progress
			if test.change != nil {
				test.change(&config)
			}
			report := run(t, config)
			if got := verdicts(report, probe.LevelBinding, probe.VerdictFail); report.Verdict != probe.ReportIncomplete || len(got) > 0 {
				t.Errorf("the verdict is %s, %q fail\n%s", report.Verdict, got, text(t, report))
			}
			got := verdicts(report, probe.LevelBinding, probe.VerdictSkip)
			if test.unjudged == nil && len(verdicts(report, probe.LevelBinding, probe.VerdictPass)) > 0 || test.unjudged != nil && !slices.Equal(got, test.unjudged) {
				t.Errorf("not judged: %q, want %q", got, test.unjudged)
			}
			if !strings.Contains(text(t, report), test.says) {
				t.Errorf("there is no %q in\n%s", test.says, text(t, report))
			}
		})
	}
}

// A second caller with declined requests tells something if declines are recorded.
func TestSecondCallerThatIsDeclined(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		scoped, recorded bool
		want             probe.Verdict
	}{
		"scoped": {true, true, probe.VerdictPass}, "not scoped": {false, true, probe.VerdictFail},
		"not recorded": {true, false, probe.VerdictSkip},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newServer(nothing)
			scope := func(r *http.Request) (string, error) { return "all", nil }
			if test.scoped {
				scope = func(r *http.Request) (string, error) { return r.Header.Get("Authorization"), nil }
			}
			handler := middleware.New(memory.New(nil), scope, nil).Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("Authorization") == otherSecret {
					http.Error(w, "you have no account", http.StatusNotFound)
					return
				}
				s.answer(w)
			}))
			if next := handler; !test.recorded {
				var n atomic.Int64
				handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if r.Header.Get("Authorization") == otherSecret {
						http.Error(w, fmt.Sprint("you have no account, request ", n.Add(1)), http.StatusNotFound)
						return
					}
					next.ServeHTTP(w, r)
				})
			}
			config := configOf(t, handler)
			config.EffectsURL, config.EffectsPath = nil, ""
			report := run(t, config)
			i := slices.IndexFunc(report.Rules, func(r probe.Result) bool { return r.ID == "key-scoped" })
			if got := report.Rules[i]; got.Verdict != test.want {
				t.Errorf("key-scoped: %s, %s", got.Verdict, got.Detail)
			}
		})
	}
}

// A server that knows only bare keys, or only the draft's quoted strings, is examined all the same.
func TestSpellingsOfKeys(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		profile probe.Profile
		refuse  func(key string) bool
		want    []string // broken, binding or not
	}{
		"draft, bare only":      {probe.ProfileIETF, func(key string) bool { return strings.HasPrefix(key, `"`) }, []string{"key-quoting"}},
		"draft, quoted only":    {probe.ProfileIETF, func(key string) bool { return key != "" && !strings.HasPrefix(key, `"`) }, nil},
		"paidonce, bare only":   {probe.ProfilePaidonce, func(key string) bool { return strings.HasPrefix(key, `"`) }, []string{"key-quoting"}},
		"paidonce, quoted only": {probe.ProfilePaidonce, func(key string) bool { return key != "" && !strings.HasPrefix(key, `"`) }, []string{"key-quoting"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			next := protected(t)
			config := configOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if test.refuse(r.Header.Get("Idempotency-Key")) {
					w.Header().Set("Content-Type", "application/problem+json")
					w.Header().Set("Link", `<https://example.com/>; rel="describedby"`)
					w.WriteHeader(http.StatusBadRequest)
					return
				}
				next.ServeHTTP(w, r)
			}))
			config.Profile = test.profile
			report := run(t, config)
			broken := append(verdicts(report, probe.LevelBinding, probe.VerdictFail), verdicts(report, probe.LevelAdvisory, probe.VerdictFail)...)
			if !slices.Equal(broken, test.want) && len(broken)+len(test.want) > 0 {
				t.Errorf("broken: %q, want %q\n%s", broken, test.want, text(t, report))
			}
		})
	}
}

// If all answers are equal, only the effects tell whether a quoted key and the bare one are two keys.
func TestSpellingsWithEqualAnswers(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		two, counted bool
		want         probe.Verdict
	}{
		"one key":            {false, true, probe.VerdictPass},
		"two keys":           {true, true, probe.VerdictFail},
		"nobody can tell":    {false, false, probe.VerdictSkip},
		"two, nobody counts": {true, false, probe.VerdictSkip},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newServer(sameAnswers)
			config := configOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if key := r.Header.Get("Idempotency-Key"); test.two && strings.HasPrefix(key, `"`) {
					r.Header.Set("Idempotency-Key", "quoted-"+strings.Trim(key, `"`))
				}
				s.ServeHTTP(w, r)
			}))
			config.Progress, config.Profile = s.progress, probe.ProfilePaidonce
			if !test.counted {
				config.EffectsURL, config.EffectsPath = nil, ""
			}
			report := run(t, config)
			if !slices.Contains(verdicts(report, probe.LevelBinding, test.want), "key-quoting") {
				t.Errorf("key-quoting is not %s\n%s", test.want, text(t, report))
			}
		})
	}
}

// Right APIs of many kinds are never said to be broken. If effects can't be seen the rules that need
// them are skipped.
func TestRightServersAreNotBroken(t *testing.T) {
	t.Parallel()
	keys := func(next http.Handler, accept func(key string) bool, spell func(key string) string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if all := r.Header.Values("Idempotency-Key"); len(all) == 1 && all[0] != "" {
				if !accept(all[0]) {
					http.Error(w, "not a key", http.StatusBadRequest)
					return
				}
				r.Header.Set("Idempotency-Key", spell(all[0]))
			}
			next.ServeHTTP(w, r)
		})
	}
	byEffects := []string{"first-one-effect", "replay-one-effect", "replay-at-once", "mismatch-no-effect", "key-case-sensitive", "key-whole", "key-scoped", "copies-one-effect", "cut-one-effect"}
	for name, test := range map[string]struct {
		fault    fault
		wrap     func(next http.Handler) http.Handler
		body     string
		profile  probe.Profile
		unjudged []string // in any case
		unseen   []string // without an effects URL
	}{
		"quoted keys only": {wrap: func(next http.Handler) http.Handler {
			return keys(next, func(key string) bool { return key[0] == '"' }, strings.Clone)
		}},
		"bare keys only": {profile: probe.ProfileStripe, wrap: func(next http.Handler) http.Handler {
			return keys(next, func(key string) bool { return key[0] != '"' }, strings.Clone)
		}},
		"keys are UUIDs": {wrap: func(next http.Handler) http.Handler {
			uuid := regexp.MustCompile(`^"?[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"?$`)
			return keys(next, uuid.MatchString, strings.ToLower)
		}},
		"equal answers":    {fault: sameAnswers, unseen: byEffects},
		"times and no ids": {fault: coarseTimes, unseen: []string{"key-case-sensitive", "key-whole", "key-scoped"}},
		"unknown fields are ignored": {
			body: `{"to":"bob"}`, unjudged: []string{"mismatch-refused"},
			wrap: func(next http.Handler) http.Handler {
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					_, _ = io.Copy(io.Discard, r.Body) // so the server notices a connection that is cut
					r.Body = io.NopCloser(strings.NewReader(`{"to":"bob"}`))
					next.ServeHTTP(w, r)
				})
			},
		},
	} {
		for _, counted := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/counted=%v", name, counted), func(t *testing.T) {
				t.Parallel()
				s := newServer(cmp.Or(test.fault, nothing))
				s.plain = true
				var handler http.Handler = s
				if test.wrap != nil {
					handler = test.wrap(s)
				}
				config := configOf(t, handler)
				config.Progress = s.progress
				config.Body, config.Profile = cmp.Or(test.body, config.Body), cmp.Or(test.profile, config.Profile)
				want := slices.Clone(test.unjudged)
				if !counted {
					config.EffectsURL, config.EffectsPath = nil, ""
					want = append(want, test.unseen...)
				}
				report := run(t, config)
				if got := verdicts(report, probe.LevelBinding, probe.VerdictSkip); !slices.Equal(got, append([]string{}, want...)) {
					t.Errorf("not judged: %q, want %q\n%s", got, want, text(t, report))
				}
				if got := verdicts(report, probe.LevelBinding, probe.VerdictFail); len(got) > 0 {
					t.Errorf("broken: %q\n%s", got, text(t, report))
				}
			})
		}
	}
}

// 429 tells nothing about keys. The request is sent again, and copies with 429 were refused before
// they ran.
func TestRateLimits(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		limited  func(n int, step string, ofKey int) bool // the nth request, and the nth in this step with its key
		verdict  string
		unjudged []string // nil: all
		says     string
	}{
		"each second request": {
			limited: func(n int, step string, _ int) bool { return n%2 == 0 && step != stepCopies && step != stepAtOnce },
			verdict: probe.ReportOK, unjudged: []string{},
		},
		"all copies but two": {
			limited: func(_ int, step string, ofKey int) bool { return step == stepCopies && ofKey > 2 && ofKey <= 8 },
			verdict: probe.ReportOK, unjudged: []string{}, says: "30 got 429 (a rate limit)",
		},
		"all copies but one": {
			limited: func(_ int, step string, ofKey int) bool { return step == stepCopies && ofKey > 1 && ofKey <= 8 },
			verdict: probe.ReportIncomplete, unjudged: []string{"copies-one-effect", "copies-answer"}, says: "all but one of 8 copies at once got 429",
		},
		"retries at once": {
			limited: func(_ int, step string, ofKey int) bool { return step == stepAtOnce && ofKey > 1 },
			verdict: probe.ReportIncomplete, unjudged: []string{"replay-at-once"}, says: "a retry at once got 429",
		},
		"all": {
			limited: func(n int, _ string, _ int) bool { return true },
			verdict: probe.ReportIncomplete, says: "the API answers with 429",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newServer(nothing)
			var mu sync.Mutex
			var n int
			var step string
			ofKey := map[string]int{}
			config := configOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				mu.Lock()
				n++
				key := step + r.Header.Get("Idempotency-Key")
				ofKey[key]++
				limited := r.Method == http.MethodPost && test.limited(n, step, ofKey[key])
				mu.Unlock()
				if limited {
					http.Error(w, "slower, please", http.StatusTooManyRequests)
					return
				}
				s.ServeHTTP(w, r)
			}))
			config.Progress = func(name string) {
				mu.Lock()
				defer mu.Unlock()
				step = name
				if name != stepCopies || test.verdict == probe.ReportOK { // the only copy must not wait for others
					s.progress(name)
				}
			}
			if test.unjudged == nil {
				config.Patience = time.Millisecond
			}
			report := run(t, config)
			if got := verdicts(report, probe.LevelBinding, probe.VerdictFail); report.Verdict != test.verdict || len(got) > 0 {
				t.Errorf("the verdict is %s, want %s, %q fail\n%s", report.Verdict, test.verdict, got, text(t, report))
			}
			if got := verdicts(report, probe.LevelBinding, probe.VerdictSkip); test.unjudged != nil && !slices.Equal(got, test.unjudged) {
				t.Errorf("not judged: %q, want %q", got, test.unjudged)
			}
			if !strings.Contains(text(t, report), test.says) {
				t.Errorf("there is no %q in\n%s", test.says, text(t, report))
			}
		})
	}
}

// The steps that these tests know.
const (
	stepAtOnce = "retries at once"
	stepCopies = "copies at once"
)

// Credentials are in no output, even if an answer quotes them. The curl lines name variables.
func TestCredentialsAreMasked(t *testing.T) {
	t.Parallel()
	s := newServer(notScoped)
	answers := 0
	config := configOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		recorder := httptest.NewRecorder()
		s.ServeHTTP(recorder, r)
		for name, values := range recorder.Header() {
			w.Header()[name] = values
		}
		if r.Method == http.MethodPost {
			w.Header().Set("Location", "/of/"+strings.TrimPrefix(r.Header.Get("Authorization"), "Bearer "))
		}
		w.WriteHeader(recorder.Code)
		s.mu.Lock()
		defer s.mu.Unlock()
		answers++
		if r.Method == http.MethodGet {
			_, _ = w.Write(recorder.Body.Bytes())
			return
		}
		_, _ = fmt.Fprint(w, r.Header.Get("Cookie"), r.Header.Get("Authorization")[:20], answers, recorder.Body, r.Header.Get("Authorization"), r.Header.Get("X-Api-Key"), r.URL.Query(), r.URL)
	}))
	config.Progress = s.progress
	config.Header = append(config.Header, probe.Field{Name: "X-Api-Key", Value: "canary-key"}, probe.Field{Name: "Cookie", Value: "a=canary-one; b=canary-two"}, probe.Field{Name: "Prefer", Value: "wait=1"})
	config.URL = parse(t, config.URL.String()+"?api_key=canary%2Fquery&id=7")
	config.EffectsURL = parse(t, config.EffectsURL.String()+"?token=canary-effects")
	report := run(t, config)
	asJSON, err := json.Marshal(report)
	if err != nil {
		t.Fatal(err)
	}
	var junit strings.Builder
	if err := report.WriteJUnit(&junit); err != nil {
		t.Fatal(err)
	}
	for name, output := range map[string]string{"text": text(t, report), "JSON": string(asJSON), "JUnit": junit.String()} {
		if strings.Contains(output, "canary") {
			t.Errorf("the %s shows a credential:\n%s", name, output)
		}
		for _, want := range []string{`-H "Authorization: $AUTHORIZATION"`, `-H "X-Api-Key: $X_API_KEY"`, `-H "Authorization: $OTHER_AUTHORIZATION"`, `-H "Cookie: $COOKIE"`, "-H 'Prefer: wait=1'", `/payments?api_key=$URL_API_KEY&id=$URL_ID" -H`} {
			if name == "text" && !strings.Contains(output, want) {
				t.Errorf("the %s has no %q:\n%s", name, want, output)
			}
		}
	}
}

// An examination that is interrupted reports the rules that are judged by then.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s := newServer(acceptsEmpty)
	config := configOf(t, s)
	config.Progress = func(step string) {
		s.progress(step)
		if step == "copies at once" {
			cancel()
		}
	}
	report, err := probe.Run(ctx, config)
	if err != nil {
		t.Fatal(err)
	}
	if got := verdicts(report, probe.LevelBinding, probe.VerdictFail); report.Verdict != probe.ReportBroken || !slices.Equal(got, []string{"key-empty"}) {
		t.Errorf("the verdict is %s, broken %q", report.Verdict, got)
	}
	want := []string{"replay-later", "no-409-after-answer", "copies-one-effect", "copies-answer", "cut-one-effect", "cut-answered"}
	if got := verdicts(report, probe.LevelBinding, probe.VerdictSkip); !slices.Equal(got, want) {
		t.Errorf("not judged: %q, want %q", got, want)
	}
	if !strings.Contains(text(t, report), "it was interrupted") {
		t.Errorf("the report does not say that it was interrupted:\n%s", text(t, report))
	}
}

// The JUnit report has a test case for each rule.
func TestJUnit(t *testing.T) {
	t.Parallel()
	config := configOf(t, newServer(acceptsEmpty))
	config.SecondHeader = nil
	report := run(t, config)
	var text strings.Builder
	if err := report.WriteJUnit(&text); err != nil {
		t.Fatal(err)
	}
	var suite struct {
		Tests    int `xml:"tests,attr"`
		Failures int `xml:"failures,attr"`
		Errors   int `xml:"errors,attr"`
		Cases    []struct {
			Name    string    `xml:"name,attr"`
			Failure *struct{} `xml:"failure"`
			Error   *struct{} `xml:"error"`
		} `xml:"testcase"`
	}
	if err := xml.Unmarshal([]byte(text.String()), &suite); err != nil {
		t.Fatal(err)
	}
	if suite.Tests != len(report.Rules) || suite.Failures != 1 || suite.Errors != 1 || len(suite.Cases) != len(report.Rules) {
		t.Errorf("%+v", suite)
	}
	for _, c := range suite.Cases {
		if (c.Failure != nil) != (c.Name == "key-empty") || (c.Error != nil) != (c.Name == "key-scoped") {
			t.Errorf("%+v", c)
		}
	}
}

func TestConfigIsRefused(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(c *probe.Config){
		"no host":               func(c *probe.Config) { c.URL = parse(t, "/payments") },
		"another scheme":        func(c *probe.Config) { c.URL.Scheme = "ftp" },
		"credentials in it":     func(c *probe.Config) { c.URL.User = url.UserPassword("canary", "canary") },
		"spaces in it":          func(c *probe.Config) { c.URL.RawQuery = "a=b c" },
		"in the effects URL":    func(c *probe.Config) { c.EffectsURL.User = url.UserPassword("canary", "canary") },
		"no URL":                func(c *probe.Config) { c.URL, c.EffectsURL, c.EffectsPath = nil, nil, "" },
		"method":                func(c *probe.Config) { c.Method = "PO ST" },
		"profile":               func(c *probe.Config) { c.Profile = "canary" },
		"two lines":             func(c *probe.Config) { c.Header = []probe.Field{{Name: "A", Value: "canary\r\nB: c"}} },
		"the key":               func(c *probe.Config) { c.Header = []probe.Field{{Name: "idempotency-key", Value: "canary"}} },
		"length":                func(c *probe.Config) { c.SecondHeader = []probe.Field{{Name: "Content-Length", Value: "1"}} },
		"pointer":               func(c *probe.Config) { c.EffectsPath = "data" },
		"pointer without URL":   func(c *probe.Config) { c.EffectsURL = nil },
		"effects with a scheme": func(c *probe.Config) { c.EffectsURL.Scheme = "file" },
	} {
		config := configOf(t, newServer(nothing))
		change(&config)
		if _, err := probe.Run(t.Context(), config); err == nil || strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
