package probe

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// keyLengthMax is the longest key that the profiles allow, in characters.
const keyLengthMax = 255

// examiner is the state of an examination.
type examiner struct {
	Config

	client  *client
	mask    *masker
	bodies  *bodies
	results map[string]*Result
	stopped string // the reason if the examination ended early

	quoted  bool // keys are sent as quoted strings
	a, b    *logical
	at      time.Time // of the answer to a
	id      identity
	latency time.Duration // the longer one of the first two requests
	lag     time.Duration // until an effect is counted, the longest so far

	refusals  []*answer // of a missing key, of another body, of copies at once
	conflicts []*answer // answers with 409 to copies at once
}

// logical is a logical request: a key, a body, and its first answer. Retries send the same bytes.
type logical struct {
	*request
	key    string // without quotes
	answer *answer
}

func newExaminer(config Config) *examiner {
	return &examiner{
		Config:  config,
		client:  &client{anyHost: config.AnyHost, interval: config.Interval, patience: config.Patience, left: config.RequestsMax},
		mask:    newMasker(&config),
		bodies:  &bodies{template: config.Body},
		results: map[string]*Result{},
	}
}

// oneCase is a part of the examination. An error ends the examination.
type oneCase struct {
	name    string
	examine func(ctx context.Context) error
}

// The names of the cases that the tests need.
const (
	caseCopies = "copies at once"
	caseCut    = "cut connections"
)

func (e *examiner) cases() []oneCase {
	return []oneCase{
		{"two first requests", e.examineFirst},
		{"retries", e.examineRetries},
		{"retries at once", e.examineAtOnce},
		{"another body", e.examineMismatch},
		{"keys that are none", e.examineKeys},
		{"keys in capitals", e.examineCase},
		{"long keys", e.examineWhole},
		{"a second caller", e.examineScope},
		{"quoted keys", e.examineQuoting},
		{caseCopies, e.examineCopies},
		{caseCut, e.examineCuts},
		{"late retries", e.examineLater},
		{"documents", e.examineDocuments},
	}
}

// pass, fail and skip set the verdict on a rule. A failure stays. A skip replaces a pass, and stays
// unless the rule fails.

func (e *examiner) pass(id, format string, args ...any) {
	if e.results[id] == nil {
		e.results[id] = &Result{ID: id, Verdict: VerdictPass, Detail: fmt.Sprintf(format, args...)}
	}
}

func (e *examiner) skip(id, format string, args ...any) {
	if r := e.results[id]; r == nil || r.Verdict == VerdictPass {
		e.results[id] = &Result{ID: id, Verdict: VerdictSkip, Detail: fmt.Sprintf(format, args...)}
	}
}

// fail also takes the requests that show the failure.
func (e *examiner) fail(id string, requests []string, format string, args ...any) {
	if r := e.results[id]; r == nil || r.Verdict != VerdictFail {
		e.results[id] = &Result{ID: id, Verdict: VerdictFail, Detail: fmt.Sprintf(format, args...), Requests: requests}
	}
}

// lines returns the curl lines of requests, each with its answer's status.
func lines(answers ...*answer) (all []string) {
	for _, a := range answers {
		all = append(all, a.line+"  # "+a.String())
	}
	return all
}

// fields returns the header lines of a request of the caller, without a key and a Content-Type.
func (e *examiner) fields(caller []Field) []Field {
	fields := slices.Clone(caller)
	for _, f := range []Field{{"User-Agent", "idemctl-probe"}, {"Accept", "*/*"}} {
		if !hasField(fields, f.Name) {
			fields = append(fields, f)
		}
	}
	return fields
}

func hasField(fields []Field, name string) bool {
	return slices.ContainsFunc(fields, func(f Field) bool { return strings.EqualFold(f.Name, name) })
}

// ofSecond returns a logical request of the second caller.
func (e *examiner) ofSecond(key string, body []byte) *logical {
	caller := slices.DeleteFunc(slices.Clone(e.Header), func(f Field) bool { return hasField(e.SecondHeader, f.Name) })
	l := e.with(append(caller, e.SecondHeader...), key, body)
	l.second = e.SecondHeader
	return l
}

// request returns a request with the given values of Idempotency-Key, each on a line of its own.
func (e *examiner) request(caller []Field, body []byte, keys ...string) *request {
	fields := e.fields(caller)
	if len(body) > 0 && !hasField(fields, "Content-Type") {
		fields = append(fields, Field{"Content-Type", contentType(body)})
	}
	for _, key := range keys {
		fields = append(fields, Field{"Idempotency-Key", key})
	}
	return &request{method: e.Method, url: e.URL, fields: fields, body: body}
}

// spelled returns a key as it is sent: bare or quoted.
func (e *examiner) spelled(key string) string {
	if e.quoted {
		return `"` + key + `"`
	}
	return key
}

// new returns a new logical request of the caller. It is not sent.
func (e *examiner) new() *logical { return e.with(e.Header, newUUID(), e.bodies.next()) }

func (e *examiner) with(caller []Field, key string, body []byte) *logical {
	return &logical{request: e.request(caller, body, e.spelled(key)), key: key}
}

// first sends a logical request for the first time.
func (e *examiner) first(ctx context.Context, l *logical) (err error) {
	l.answer, err = e.client.send(ctx, l.request)
	return err
}

// firstCounted is first, and waits for the effect, so that it does not count in what comes next.
func (e *examiner) firstCounted(ctx context.Context, l *logical) error {
	c, err := e.count(ctx)
	if err != nil {
		return err
	}
	if err := e.first(ctx, l); err != nil || !l.answer.ok() {
		return err
	}
	_, err = c.added(ctx, 1)
	return err
}

// retry sends the same request again and returns its answer.
func (e *examiner) retry(ctx context.Context, l *logical) (*answer, error) {
	return e.client.send(ctx, l.request)
}

// settled retries until an answer is not busy, or Patience has elapsed. It returns the last answer.
func (e *examiner) settled(ctx context.Context, l *logical) (*answer, error) {
	return e.client.sendWhile(ctx, l.request, (*answer).busy)
}

// stop keeps the reason why the remaining rules are not judged.
func (e *examiner) stop(err error) { e.stopped = err.Error() }

// isReplay reports whether a and the first answer tell of the same effect. It compares their ids,
// or if they have none, their status, bytes and Location.
func (e *examiner) isReplay(a, first *answer) bool {
	if same, known := e.id.same(a, first); known {
		return same
	}
	return a.differsFrom(first) == ""
}

const noIDs = "effects can't be seen: the answers to two requests have no ids that differ; set --effects-url"

// judgeEffects fails a rule if the number of effects is not want, and skips it if the number can't
// be known. It counts at the effects URL, or else by the ids in the successful answers. It reports
// false if the rule failed.
func (e *examiner) judgeEffects(ctx context.Context, id string, c *counter, want int64, answers []*answer, what string, requests []string) (bool, error) {
	successes := slices.DeleteFunc(slices.Clone(answers), func(a *answer) bool { return !a.ok() })
	if c.known() {
		n, err := c.added(ctx, want)
		if err != nil {
			return false, err
		}
		if n != want {
			if n < want {
				e.EffectsWait = e.Settle // don't wait as long again
			}
			e.fail(id, requests, "%s: %s at the effects URL, want %d", what, plural(n, "effect"), want)
			return false, nil
		}
		return true, nil
	}
	if len(e.id) == 0 {
		e.skip(id, noIDs)
		return true, nil
	}
	if n, _ := e.id.distinct(successes); int64(n) > want {
		e.fail(id, requests, "%s: the answers tell of %s, want %d (%s)", what, plural(int64(n), "effect"), want, strings.Join(e.id, ", "))
		return false, nil
	}
	return true, nil
}

func plural(n int64, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %ss", n, one)
}

// by returns how effects were counted, for a detail.
func (e *examiner) by() string {
	if e.EffectsURL != nil {
		return "by the effects URL"
	}
	return "by the ids in the answers (" + strings.Join(e.id, ", ") + ")"
}

// byOr is by, with a note that ids don't show unseen effects.
func (e *examiner) byOr(unseen string) string {
	if e.EffectsURL != nil {
		return e.by()
	}
	return e.by() + "; " + unseen + " that no answer tells of is only seen with --effects-url"
}

// slow is the latency, of an answer and its effect's count together, above which a case has fewer
// rounds, to stay within the time.
const slow = 500 * time.Millisecond

// rounds returns the number of rounds of a case: fewer if the API is slow.
func (e *examiner) rounds(n int) int {
	const slowRounds = 3
	if e.latency+e.lag > slow {
		return slowRounds
	}
	return n
}

// examineFirst sends two requests. It finds the spelling of keys that the API accepts, and the ids
// by which effects can be told apart.
func (e *examiner) examineFirst(ctx context.Context) error {
	c, err := e.count(ctx)
	if err != nil {
		return err
	}
	// The draft's form is the quoted string; the other services' keys are bare.
	e.quoted = e.Profile == ProfileIETF
	e.a = e.new()
	if err := e.first(ctx, e.a); err != nil {
		return err
	}
	if e.a.answer.refused() {
		refused := e.a
		e.quoted = !e.quoted
		e.a = e.with(e.Header, e.a.key, e.a.body)
		if err := e.first(ctx, e.a); err != nil {
			return err
		}
		if e.a.answer.ok() {
			e.fail(ruleQuoting, lines(refused.answer, e.a.answer), "%s as the key is refused with %v, and %s is taken", refused.fields[len(refused.fields)-1].Value, refused.answer, e.spelled(e.a.key))
		} else {
			e.a, e.quoted = refused, !e.quoted
		}
	}
	if !e.a.answer.ok() {
		return mustSucceed("the first request", e.a.answer)
	}
	e.at = time.Now()
	e.b = e.new()
	if err := e.first(ctx, e.b); err != nil {
		return err
	}
	if !e.b.answer.ok() {
		return mustSucceed("a second request with another key", e.b.answer)
	}
	e.latency = max(e.a.answer.took, e.b.answer.took)
	e.id = identityOf(e.a.answer, e.b.answer, [][]string{append(slices.Clone(e.bodies.values[0]), e.a.key), append(slices.Clone(e.bodies.values[1]), e.b.key)})
	right, err := e.judgeEffects(ctx, ruleFirst, c, 2, []*answer{e.a.answer, e.b.answer}, "two requests with a key each (unless the number counts something else)", lines(e.a.answer, e.b.answer))
	if err != nil {
		return err
	}
	if right {
		e.pass(ruleFirst, "one effect each, %s", e.by())
	}
	return nil
}

// mustSucceed returns the error that ends the examination if one of the first requests failed.
func mustSucceed(what string, a *answer) error {
	note := ""
	if a.status >= 300 && a.status <= 399 {
		note = " (redirects are not followed)"
	}
	return fmt.Errorf("%s got %v, and must get 2xx%s: %s", what, a, note, a.line)
}

// examineRetries retries the first request twice, a moment after the second one was answered.
func (e *examiner) examineRetries(ctx context.Context) error {
	if err := sleep(ctx, e.Settle); err != nil {
		return err
	}
	c, err := e.count(ctx)
	if err != nil {
		return err
	}
	answers := []*answer{e.a.answer}
	for range 2 {
		again, err := e.retry(ctx, e.a)
		if err != nil {
			return err
		}
		answers = append(answers, again)
		e.judgeReplay(e.a.answer, again)
	}
	right, err := e.judgeEffects(ctx, ruleReplayed, c, e.more(0), answers, "two retries", lines(answers...))
	if err != nil {
		return err
	}
	if right {
		e.pass(ruleReplayed, "two retries had no effect, %s", e.by())
	}
	for id, what := range map[string]string{ruleStatus: "status", ruleBody: "bytes", ruleLocation: "Location"} {
		e.pass(id, "two retries had the %s of the first answer", what)
	}
	if e.a.answer.header.Get("Location") == "" && e.results[ruleLocation].Verdict == VerdictPass {
		e.results[ruleLocation].Detail = "neither the first answer nor two retries had one"
	}
	return nil
}

// examineAtOnce retries requests as soon as their answers are received in full.
func (e *examiner) examineAtOnce(ctx context.Context) error {
	judged := 0
	for range e.rounds(atOnceRounds) {
		c, err := e.count(ctx)
		if err != nil {
			return err
		}
		l := e.new()
		first, second, err := e.client.sendTwice(ctx, l.request)
		if err != nil {
			return err
		}
		l.answer = first
		if first.limited() || second.limited() {
			if err := sleep(ctx, limitPauses*e.Settle); err != nil {
				return err
			}
			continue
		}
		judged++
		if !first.ok() {
			e.skip(ruleAtOnce, declined, first)
			e.skip(ruleNo409, declined, first)
			return nil
		}
		if second.status == http.StatusConflict {
			e.fail(ruleNo409, lines(first, second), "the retry came after the answer was received in full, and got 409")
			e.skip(ruleAtOnce, "the retry got 409")
			again, err := e.settled(ctx, l)
			if err != nil {
				return err
			}
			if again.busy() { // the other rounds would only take as long
				return nil
			}
			continue
		}
		if !second.ok() {
			e.fail(ruleAtOnce, lines(first, second), "a request was answered with %v, and its retry at once with %v", first, second)
		}
		if _, err := e.judgeEffects(ctx, ruleAtOnce, c, 1, []*answer{first, second}, "a request and its retry as soon as it was answered", lines(first, second)); err != nil {
			return err
		}
	}
	if judged == 0 {
		e.skip(ruleAtOnce, "requests with a retry at once got 429: examine the API with a higher rate limit")
	}
	e.pass(ruleAtOnce, "%d retries at once after the answer were replays", judged)
	return nil
}

// limitPauses is the number of pauses after requests that were sent together and got 429. The next
// ones may then get through.
const limitPauses = 10

// notReplayed returns the first rule by which early retries are no replays, or "".
func (e *examiner) notReplayed() string {
	for _, id := range []string{ruleStatus, ruleBody, ruleLocation} {
		if e.results[id].Verdict != VerdictPass {
			return id
		}
	}
	if e.results[ruleReplayed].Verdict == VerdictFail {
		return ruleReplayed
	}
	return ""
}

// more returns the number of effects that judgeEffects has to find if a case must add n, and one of
// its answers tells of an earlier effect: the effects URL shows n, and the ids show n+1.
func (e *examiner) more(n int64) int64 {
	if e.EffectsURL == nil {
		return n + 1
	}
	return n
}

// judgeReplay compares a retry's answer with the first.
func (e *examiner) judgeReplay(first, again *answer) {
	requests := lines(first, again)
	if again.status == http.StatusConflict {
		e.fail(ruleNo409, requests, "the retry came after the answer was received in full, and got 409")
		for _, id := range []string{ruleStatus, ruleBody, ruleLocation} {
			e.skip(id, "the retry got 409")
		}
		return
	}
	if again.status != first.status {
		e.fail(ruleStatus, requests, "the retry got %v, and the first answer was %v", again, first)
		if !again.ok() { // an error has another body by nature
			e.skip(ruleBody, "the retry got %v", again)
			e.skip(ruleLocation, "the retry got %v", again)
			return
		}
	}
	if !bytes.Equal(again.body, first.body) {
		// An excerpt may contain a part of a secret, which can't be found later.
		e.fail(ruleBody, requests, "the retry got another body: %s", difference(e.mask.quoted(string(first.body)), e.mask.quoted(string(again.body))))
	}
	if one, other := first.header.Get("Location"), again.header.Get("Location"); one != other {
		e.fail(ruleLocation, requests, "the retry got the Location %q, and the first answer %q", e.mask.quoted(other), e.mask.quoted(one))
	}
}

// difference describes the first difference between two bodies.
func difference(first, again string) string {
	at := 0
	for at < min(len(first), len(again)) && first[at] == again[at] {
		at++
	}
	const shown = 40
	from := max(0, at-shown/2)
	part := func(body string) string {
		return fmt.Sprintf("%q", body[min(from, len(body)):min(from+shown, len(body))])
	}
	return fmt.Sprintf("from byte %d on %s instead of %s, %d bytes instead of %d", at+1, part(again), part(first), len(again), len(first))
}

// examineMismatch sends another body under the key of an answered request.
func (e *examiner) examineMismatch(ctx context.Context) error {
	other, err := e.otherBody(ctx)
	if err != nil {
		return err
	}
	if other == nil {
		const detail = "no other body was found that the API accepts: put {{int}} or {{uuid}} into the body"
		e.skip(ruleMismatch, detail)
		e.skip(ruleMismatchNone, detail)
		e.skip(ruleMismatchKeeps, detail)
		return nil
	}
	l := e.new()
	if err := e.firstCounted(ctx, l); err != nil {
		return err
	}
	if !l.answer.ok() {
		for _, id := range []string{ruleMismatch, ruleMismatchNone, ruleMismatchKeeps} {
			e.skip(id, declined, l.answer)
		}
		return nil
	}
	c, err := e.count(ctx)
	if err != nil {
		return err
	}
	// An answer that is recorded late is the fault of another rule.
	if err := sleep(ctx, e.Settle); err != nil {
		return err
	}
	reused := e.with(e.Header, l.key, other)
	if err := e.first(ctx, reused); err != nil {
		return err
	}
	got := reused.answer
	requests := lines(l.answer, got)
	if got.refused() {
		e.pass(ruleMismatch, "another body under a used key got %v", got)
		e.refusals = append(e.refusals, got)
		for id, want := range map[string]int{ruleMismatch422: 422, ruleMismatch400: 400} {
			if got.status == want {
				e.pass(id, "another body under a used key got %d", want)
			} else {
				e.fail(id, requests, "another body under a used key got %v", got)
			}
		}
	} else {
		if e.bodies.onlyAdds(other) && got.ok() && e.isReplay(got, l.answer) {
			e.skip(ruleMismatch, "another body under a used key got a replay, and the API may ignore what was added to it: put {{int}} or {{uuid}} into the body")
		} else {
			e.fail(ruleMismatch, requests, "another body under a used key got %v", got)
		}
		e.skip(ruleMismatch422, "it was not refused")
		e.skip(ruleMismatch400, "it was not refused")
	}
	right, err := e.judgeEffects(ctx, ruleMismatchNone, c, e.more(0), []*answer{l.answer, got}, "another body under a used key", requests)
	if err != nil {
		return err
	}
	if right {
		e.pass(ruleMismatchNone, "another body under a used key had no effect, %s", e.byOr("an effect"))
	}
	if c, err = e.count(ctx); err != nil {
		return err
	}
	again, err := e.retry(ctx, l)
	if err != nil {
		return err
	}
	if again.ok() && !e.isReplay(again, l.answer) { // its effect does not count in the next case
		if _, err := c.added(ctx, 1); err != nil {
			return err
		}
	}
	if broken := e.notReplayed(); broken != "" {
		e.skip(ruleMismatchKeeps, "retries are no replays in any case: %s", broken)
	} else if differs := again.differsFrom(l.answer); differs != "" {
		e.fail(ruleMismatchKeeps, append(requests, lines(again)...), "after another body was sent under its key, the first request is retried with another %s", differs)
	} else {
		e.pass(ruleMismatchKeeps, "the first request's answer is still replayed")
	}
	return nil
}

// otherBody returns a body that the API accepts and that differs from the first one, or nil. A
// template with placeholders gets other values. Without placeholders it tries other bodies, each
// under a key of its own.
func (e *examiner) otherBody(ctx context.Context) ([]byte, error) {
	if e.bodies.varies() {
		return e.bodies.next(), nil
	}
	for _, body := range e.bodies.others() {
		l := e.with(e.Header, newUUID(), body)
		if err := e.firstCounted(ctx, l); err != nil {
			return nil, err
		}
		if l.answer.ok() {
			return body, nil
		}
	}
	return nil, nil
}

// examineKeys sends requests with a missing or malformed key, and one with the longest key.
func (e *examiner) examineKeys(ctx context.Context) error {
	long := strings.Repeat("k", keyLengthMax+1)
	for _, one := range []struct {
		id, what string
		keys     []string
	}{
		{ruleMissing, "no key", nil},
		{ruleEmpty, "an empty key", []string{""}},
		{ruleTooLong, fmt.Sprintf("a key of %d characters", len(long)), []string{e.spelled(newUUID() + long[:len(long)-36])}},
		{ruleTwice, "two header lines with a key each", []string{e.spelled(newUUID()), e.spelled(newUUID())}},
		{ruleCharacters, "a key with a character that is not ASCII", []string{e.spelled(newUUID() + "é")}},
	} {
		if e.level(one.id) == levelNone {
			continue
		}
		c, err := e.count(ctx)
		if err != nil {
			return err
		}
		a, err := e.client.send(ctx, e.request(e.Header, e.bodies.next(), one.keys...))
		if err != nil {
			return err
		}
		if one.id == ruleMissing {
			switch {
			case a.status == http.StatusBadRequest:
				e.pass(ruleMissing400, "no key got 400")
			case a.refused():
				e.fail(ruleMissing400, lines(a), "no key got %v", a)
			default:
				e.skip(ruleMissing400, "it was not refused")
			}
			if a.refused() {
				e.refusals = append(e.refusals, a)
			}
		}
		if !a.refused() {
			e.fail(one.id, lines(a), "%s got %v", one.what, a)
			if _, err := c.added(ctx, 0); err != nil { // its effect does not count in the next case
				return err
			}
			continue
		}
		if c.known() {
			n, err := c.added(ctx, 0)
			if err != nil {
				return err
			}
			if n != 0 {
				e.fail(one.id, lines(a), "%s got %v, and had %s all the same", one.what, a, plural(n, "effect"))
			}
		}
		e.pass(one.id, "%s got %v", one.what, a)
	}
	if e.level(ruleLongest) == levelNone {
		return nil
	}
	l := e.with(e.Header, newUUID()+long[:keyLengthMax-36], e.bodies.next())
	if err := e.firstCounted(ctx, l); err != nil {
		return err
	}
	if l.answer.refused() {
		e.fail(ruleLongest, lines(l.answer), "a key of %d characters got %v", keyLengthMax, l.answer)
	} else {
		e.pass(ruleLongest, "a key of %d characters got %v", keyLengthMax, l.answer)
	}
	return nil
}

// declined is the detail of a rule that needs a successful request, if there was none.
const declined = "a request with a new key was answered with %v"

// declines sends a request with a new key. It returns the answer if the API does not accept it any
// more, and nil if it does.
func (e *examiner) declines(ctx context.Context) (*answer, error) {
	l := e.new()
	if err := e.firstCounted(ctx, l); err != nil || l.answer.ok() {
		return nil, err
	}
	return l.answer, nil
}

// examineCase sends a new request under the capitals of a used key.
func (e *examiner) examineCase(ctx context.Context) error {
	// The capitals of a UUID are another spelling of the same UUID (RFC 9562), so the key is none.
	l := e.with(e.Header, newUUID()+"-key", e.bodies.next())
	if err := e.firstCounted(ctx, l); err != nil {
		return err
	}
	if !l.answer.ok() {
		control, err := e.declines(ctx)
		switch {
		case err != nil:
			return err
		case control == nil && l.answer.refused():
			e.pass(ruleCase, "keys that are not UUIDs are refused with %v", l.answer)
		default:
			e.skip(ruleCase, declined, l.answer)
		}
		return nil
	}
	capitals := e.with(e.Header, strings.ToUpper(l.key), e.bodies.next())
	// An API may allow keys in small letters only, such as canonical UUIDs.
	unused := e.with(e.Header, strings.ToUpper(newUUID()+"-key"), e.bodies.next())
	if err := e.firstCounted(ctx, unused); err != nil {
		return err
	}
	if unused.answer.refused() {
		control, err := e.declines(ctx)
		switch {
		case err != nil:
			return err
		case control != nil:
			e.skip(ruleCase, declined, control)
		default:
			e.pass(ruleCase, "keys in capitals are refused: a new one got %v", unused.answer)
		}
		return nil
	}
	return e.judgeOwn(ctx, ruleCase, capitals, l.answer, e.EffectsURL != nil, "a new request under the capitals of a used key")
}

// examineWhole sends two requests whose long keys differ in the last character only.
func (e *examiner) examineWhole(ctx context.Context) error {
	long := newUUID() + strings.Repeat("k", keyLengthMax-37)
	l := e.with(e.Header, long+"a", e.bodies.next())
	if err := e.firstCounted(ctx, l); err != nil {
		return err
	}
	switch {
	case l.answer.refused():
		control, err := e.declines(ctx)
		switch {
		case err != nil:
			return err
		case control != nil:
			e.skip(ruleWhole, declined, control)
		default:
			e.pass(ruleWhole, "a key of %d characters is refused with %v", keyLengthMax, l.answer)
		}
		return nil
	case !l.answer.ok():
		e.skip(ruleWhole, "a key of %d characters got %v", keyLengthMax, l.answer)
		return nil
	}
	return e.judgeOwn(ctx, ruleWhole, e.with(e.Header, long+"b", e.bodies.next()), l.answer, e.EffectsURL != nil,
		fmt.Sprintf("a new request under a key that differs from a used one only in the last of %d characters", keyLengthMax))
}

// judgeOwn sends a request that must be executed, although it resembles an answered one. If counted
// is true the effects URL shows its effect, otherwise its answer does.
func (e *examiner) judgeOwn(ctx context.Context, id string, l *logical, first *answer, counted bool, what string) error {
	c, err := e.count(ctx)
	if err != nil {
		return err
	}
	if err := e.first(ctx, l); err != nil {
		return err
	}
	requests := lines(first, l.answer)
	same, known := e.id.same(first, l.answer)
	switch {
	case !l.answer.ok():
		control, err := e.declines(ctx)
		if err != nil {
			return err
		}
		if control != nil {
			e.skip(id, declined, control)
		} else {
			e.fail(id, requests, "%s got %v, and not an answer of its own", what, l.answer)
		}
	case counted:
		n, err := c.added(ctx, 1)
		if err != nil {
			return err
		}
		if n == 0 {
			e.fail(id, requests, "%s got %v and had no effect of its own", what, l.answer)
		}
	case known && same && !e.id.named():
		e.skip(id, "%s got an answer with the same %s, which need not be an id; set --effects-url", what, strings.Join(e.id, ", "))
	case known && same:
		e.fail(id, requests, "%s got the answer to that one", what)
	case !known && l.answer.differsFrom(first) == "":
		e.skip(id, "%s got the same answer, which has no id; set --effects-url", what)
	}
	e.pass(id, "%s had an answer of its own", what)
	return nil
}

// examineScope sends requests of a second caller under the first one's key.
func (e *examiner) examineScope(ctx context.Context) error {
	if len(e.SecondHeader) == 0 {
		e.skip(ruleScoped, "there is no second caller: set --scope-header 'Authorization: ...' or the like")
		return nil
	}
	const what = "a second caller's request under the first caller's key"
	own, l := e.ofSecond(newUUID(), e.bodies.next()), e.new()
	if err := e.firstCounted(ctx, l); err != nil {
		return err
	}
	if !l.answer.ok() {
		e.skip(ruleScoped, declined, l.answer)
		return nil
	}
	c, err := e.count(ctx)
	if err != nil {
		return err
	}
	if err := e.first(ctx, own); err != nil {
		return err
	}
	counted := false // the effects URL may show only those of the first caller
	if c.known() && own.answer.ok() {
		n, err := c.added(ctx, 1)
		if err != nil {
			return err
		}
		counted = n == 1
	}
	shared := e.ofSecond(l.key, e.bodies.next())
	switch {
	case own.answer.ok():
		return e.judgeOwn(ctx, ruleScoped, shared, l.answer, counted, what)
	case !own.answer.refused() || own.answer.status == http.StatusUnauthorized || own.answer.status == http.StatusForbidden:
		e.skip(ruleScoped, "a request of the second caller under a key of its own got %v", own.answer)
		return nil
	}
	// The API declines the second caller's requests. The rule can still be judged if declines are
	// recorded, because the key is then looked up first. It is if another body under this key gets
	// another status. The texts of refusals may differ in any case, by the id of the request for example.
	other, err := e.otherBody(ctx)
	if err != nil {
		return err
	}
	var reused *logical
	if other != nil {
		reused = e.ofSecond(own.key, other)
		if err := e.first(ctx, reused); err != nil {
			return err
		}
	}
	if reused == nil || !reused.answer.refused() || reused.answer.status == own.answer.status {
		e.skip(ruleScoped, "a request of the second caller under a key of its own got %v, so nothing can be told: give a second caller whose requests succeed", own.answer)
		return nil
	}
	if err := e.first(ctx, shared); err != nil {
		return err
	}
	if shared.answer.status != own.answer.status {
		e.fail(ruleScoped, lines(l.answer, own.answer, shared.answer), "%s got %v, and under a key of its own %v", what, shared.answer, own.answer)
		return nil
	}
	e.pass(ruleScoped, "%s got the answer that it gets under a key of its own, %v", what, own.answer)
	return nil
}

// examineQuoting sends the first request again, under the other spelling of its key.
func (e *examiner) examineQuoting(ctx context.Context) error {
	if e.level(ruleQuoting) == levelNone || e.results[ruleQuoting] != nil {
		return nil
	}
	other := e.a.key
	if !e.quoted {
		other = `"` + other + `"`
	}
	c, err := e.count(ctx)
	if err != nil {
		return err
	}
	a, err := e.client.send(ctx, e.request(e.Header, e.a.body, other))
	if err != nil {
		return err
	}
	replayed := a.ok() && e.isReplay(a, e.a.answer)
	if _, known := e.id.same(a, e.a.answer); replayed && !known { // a second effect may have the same answer
		if !c.known() {
			e.skip(ruleQuoting, noIDs)
			return nil
		}
		n, err := c.added(ctx, 0)
		if err != nil {
			return err
		}
		replayed = n == 0
	}
	switch {
	case a.refused() && e.quoted:
		e.pass(ruleQuoting, "the quoted key is taken, and the bare one gets %v", a)
	case a.refused():
		e.fail(ruleQuoting, lines(e.a.answer, a), "the bare key is taken, and the quoted string of the draft gets %v", a)
	case replayed:
		e.pass(ruleQuoting, "the quoted key and the bare one are the same")
	default:
		e.fail(ruleQuoting, lines(e.a.answer, a), "the quoted key and the bare one are two keys: a client that changes its spelling is executed twice")
		if _, err := c.added(ctx, 1); err != nil { // it does not count in the next case
			return err
		}
	}
	return nil
}

// examineCopies sends copies of requests at once.
func (e *examiner) examineCopies(ctx context.Context) error {
	conflicts, limited, mostRan, rounds := 0, 0, 0, e.rounds(copiesRounds)
	for range rounds {
		c, err := e.count(ctx)
		if err != nil {
			return err
		}
		l := e.new()
		answers, err := e.client.sendTogether(ctx, l.request, copies)
		if err != nil {
			return err
		}
		again, err := e.settled(ctx, l)
		if err != nil {
			return err
		}
		if again.limited() {
			return errLimited
		}
		counts := map[string]int{}
		for _, a := range answers {
			counts[a.String()]++
		}
		requests := []string{fmt.Sprintf("for i in $(seq %d); do %s & done; wait  # %s", copies, answers[0].line, countsText(counts)), lines(again)[0]}
		if again.refused() && !again.busy() && !slices.ContainsFunc(answers, (*answer).ok) {
			e.skip(ruleCopies, declined, again)
			e.skip(ruleCopiesAnswer, declined, again)
			return nil
		}
		ran := copies
		for _, a := range answers {
			switch {
			case a.limited(): // it was refused before it ran
				limited++
				ran--
			case a.status == http.StatusConflict:
				conflicts++
				e.conflicts = append(e.conflicts, a)
			case a.ok() && !again.ok():
				e.fail(ruleCopiesAnswer, requests, "one of %d copies got %v, and a later retry %v", copies, a, again)
			case a.differsFrom(again) != "":
				e.fail(ruleCopiesAnswer, requests, "of %d copies at once one got %v with another %s than a later retry, and must get 409 or the same answer", copies, a, a.differsFrom(again))
			}
		}
		mostRan = max(mostRan, ran)
		if !again.ok() {
			e.fail(ruleCopiesAnswer, requests, "no answer came within %v after %d copies at once, the last was %v", e.Patience, copies, again)
			return nil
		}
		if _, err := e.judgeEffects(ctx, ruleCopies, c, 1, append(answers, again), fmt.Sprintf("%d copies at once", copies), requests); err != nil {
			return err
		}
		if ran < copies {
			if err := sleep(ctx, limitPauses*e.Settle); err != nil {
				return err
			}
		}
	}
	others := ""
	if limited > 0 {
		others = fmt.Sprintf(", %d got 429 (a rate limit)", limited)
	}
	if mostRan < 2 {
		const detail = "all but one of %d copies at once got 429: examine the API with a higher rate limit"
		e.skip(ruleCopies, detail, copies)
		e.skip(ruleCopiesAnswer, detail, copies)
	}
	e.pass(ruleCopies, "%d times %d copies at once had one effect, %s", rounds, copies, e.by())
	e.pass(ruleCopiesAnswer, "of %d copies at once %d got 409%s, and the others the same answer", rounds*copies, conflicts, others)
	return nil
}

func countsText(counts map[string]int) string {
	var parts []string
	for answer, n := range counts {
		parts = append(parts, fmt.Sprintf("%d times %s", n, answer))
	}
	slices.Sort(parts)
	return strings.Join(parts, ", ")
}

// examineCuts sends whole requests, closes their connections at different times without reading an
// answer, and retries them.
func (e *examiner) examineCuts(ctx context.Context) error {
	rounds := e.rounds(cutRounds)
	for i := range rounds {
		c, err := e.count(ctx)
		if err != nil {
			return err
		}
		after := min(e.latency, cutDelayMax) * time.Duration(i) / time.Duration(rounds-1)
		l := e.new()
		if err := e.client.cut(ctx, l.request, after); err != nil {
			return err
		}
		again, err := e.settled(ctx, l)
		if err != nil {
			return err
		}
		requests := append([]string{l.curlCut(after)}, lines(again)...)
		switch {
		case again.limited():
			return errLimited
		case again.busy():
			e.fail(ruleCutAnswered, requests, "the connection was cut after the request was sent; retries get %v, still after %v", again, e.Patience)
			e.skip(ruleCut, "the request has no answer")
			return nil
		case !again.ok():
			control, err := e.declines(ctx)
			if err != nil {
				return err
			}
			if control != nil {
				e.skip(ruleCutAnswered, declined, control)
				e.skip(ruleCut, declined, control)
				return nil
			}
			e.fail(ruleCutAnswered, requests, "the connection was cut after the request was sent; a retry gets %v, and a request with a new key succeeds", again)
			e.skip(ruleCut, "the request was not executed")
			return nil
		}
		third, err := e.retry(ctx, l)
		if err != nil {
			return err
		}
		requests = append(requests, lines(third)...)
		if _, err := e.judgeEffects(ctx, ruleCut, c, 1, []*answer{again, third}, "a request that was cut off, and its retries", requests); err != nil {
			return err
		}
	}
	e.pass(ruleCut, "%d requests that were cut off had one effect with their retries, %s", rounds, e.byOr("a second effect"))
	e.pass(ruleCutAnswered, "retries of %d requests that were cut off were answered", rounds)
	return nil
}

// examineLater retries the first requests once more, as late as possible.
func (e *examiner) examineLater(ctx context.Context) error {
	if broken := e.notReplayed(); broken != "" {
		e.skip(ruleLater, "early retries are no replays either: %s", broken)
		return nil
	}
	if err := sleep(ctx, e.Keep-time.Since(e.at)); err != nil {
		return err
	}
	c, err := e.count(ctx)
	if err != nil {
		return err
	}
	for _, l := range []*logical{e.a, e.b} {
		age := time.Since(e.at).Round(time.Second)
		again, err := e.retry(ctx, l)
		if err != nil {
			return err
		}
		requests := lines(l.answer, again)
		if again.status == http.StatusConflict {
			e.fail(ruleNo409, requests, "a retry got 409, %v after the answer", age)
			e.skip(ruleLater, "the retry got 409")
		} else if differs := again.differsFrom(l.answer); differs != "" {
			e.fail(ruleLater, requests, "a retry %v after the answer got %v with another %s: the key was forgotten", age, again, differs)
		}
		if !c.known() { // another effect would have another answer
			continue
		}
		if right, err := e.judgeEffects(ctx, ruleLater, c, 0, nil, "a late retry", requests); err != nil || !right {
			return err
		}
	}
	e.pass(ruleLater, "retries %v after the answer were replays", time.Since(e.at).Round(time.Second))
	return nil
}

// examineDocuments judges the headers and the documents of earlier answers, and of one more replay.
func (e *examiner) examineDocuments(ctx context.Context) error {
	e.pass(ruleNo409, "no retry got 409 after an answer was received in full")
	again, err := e.retry(ctx, e.a)
	if err != nil {
		return err
	}
	marked := func(a *answer) bool {
		return strings.EqualFold(a.header.Get("Idempotent-Replayed"), "true") || strings.EqualFold(a.header.Get("Idempotency-Status"), "replayed")
	}
	outcome := func(a *answer) string { return e.mask.quoted(a.header.Get("Idempotency-Status")) }
	switch {
	case marked(e.a.answer):
		e.fail(ruleMarker, lines(e.a.answer), "the first answer is marked as a replay")
	case !marked(again):
		e.fail(ruleMarker, lines(e.a.answer, again), "a replay is not marked with Idempotent-Replayed: true")
	default:
		e.pass(ruleMarker, "replays are marked, and first answers are not")
	}
	if outcome(e.a.answer) != "executed" || outcome(again) != "replayed" {
		e.fail(ruleOutcome, lines(e.a.answer, again), "Idempotency-Status is %q in the first answer and %q in a replay, want executed and replayed", outcome(e.a.answer), outcome(again))
	} else {
		e.pass(ruleOutcome, "Idempotency-Status is executed in the first answer, and replayed in a replay")
	}

	e.refusals = append(e.refusals, e.conflicts[:min(1, len(e.conflicts))]...)
	if len(e.refusals) == 0 {
		e.skip(ruleProblem, "nothing was refused")
		e.skip(ruleLink, "nothing was refused")
	}
	for _, a := range e.refusals {
		if mediaType, _, _ := strings.Cut(a.header.Get("Content-Type"), ";"); !strings.EqualFold(strings.TrimSpace(mediaType), "application/problem+json") {
			e.fail(ruleProblem, lines(a), "a refusal with %v is %q and not application/problem+json", a, e.mask.quoted(a.header.Get("Content-Type")))
		}
		if !documented(a) {
			e.fail(ruleLink, lines(a), "a refusal with %v has neither a Link with rel=describedby nor a problem type that is a URL", a)
		}
	}
	e.pass(ruleProblem, "refusals are problem documents")
	e.pass(ruleLink, "refusals link to their documentation")
	if len(e.conflicts) == 0 {
		e.skip(ruleRetryAfter, "no copy got 409")
	}
	for _, a := range e.conflicts {
		if a.header.Get("Retry-After") == "" {
			e.fail(ruleRetryAfter, lines(a), "a 409 of a copy in progress has no Retry-After")
		}
	}
	e.pass(ruleRetryAfter, "409 has Retry-After")
	return nil
}

// documented reports whether a refusal links to its documentation.
func documented(a *answer) bool {
	for _, link := range a.header.Values("Link") {
		if strings.Contains(strings.ReplaceAll(strings.ToLower(link), `"`, ""), "rel=describedby") {
			return true
		}
	}
	var problem struct{ Type string }
	if json.Unmarshal(a.body, &problem) != nil {
		return false
	}
	u, err := url.Parse(problem.Type)
	return err == nil && (u.Scheme == "http" || u.Scheme == "https")
}
