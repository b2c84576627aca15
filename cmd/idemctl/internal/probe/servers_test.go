package probe_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

// waitMax limits every wait. It is long because the machine may be loaded.
const waitMax = 30 * time.Second

// fault is the fault of a server.
type fault string

const (
	nothing                fault = "nothing"
	executesTwice          fault = "a first request is executed twice"
	noFingerprint          fault = "another body gets a replay"
	executesMismatch       fault = "another body is executed"
	executesRefused        fault = "another body is refused, and executed all the same"
	mismatchOverwrites     fault = "another body is refused, and its refusal recorded in place of the answer"
	checkThenAct           fault = "two copies find that there is no record, and both are executed"
	copiesFail             fault = "a copy in progress gets 500"
	copiesOwnAnswer        fault = "a copy in progress gets an answer of its own"
	notScoped              fault = "one caller gets the answer to another"
	notScopedMismatch      fault = "one caller's key is a mismatch for another"
	forgets                fault = "nothing is recorded"
	replayStatus           fault = "a replay has another status"
	replayBody             fault = "a replay has another body"
	replayNoLocation       fault = "a replay has no Location"
	replayExecutes         fault = "a retry is executed, and gets the recorded answer"
	conflictAfterAnswer    fault = "a key is released after its answer is sent"
	expiresAtOnce          fault = "a record is gone after a few other keys"
	answersBeforeRecording fault = "an answer is recorded after it is sent"
	acceptsMissing         fault = "a missing key is accepted"
	failsMissing           fault = "a missing key gets 500"
	executesMissing        fault = "a missing key is refused, after the effect"
	acceptsEmpty           fault = "an empty key is accepted"
	acceptsLong            fault = "a key of 256 characters is accepted"
	takesFirstLine         fault = "of two header lines the first counts"
	joinsLines             fault = "two header lines are joined"
	ignoresCase            fault = "keys are compared without case"
	truncatesKeys          fault = "the first 64 characters of a key count"
	onlySmallLetters       fault = "nothing, and keys in capitals are refused"
	countsLate             fault = "nothing, and effects are counted late"
	forgetsEchoesKey       fault = "nothing is recorded, and answers have the key and no id"
	coarseTimes            fault = "nothing, and answers have no id but a time, which may be equal"
	sameAnswers            fault = "nothing, and all answers are equal"
	cutLosesEffect         fault = "the effect of a request that was cut off is lost, and its answer recorded"
	cutDoublesEffect       fault = "the claim of a request that was cut off ends before its effect"
	cutSticks              fault = "the claim of a request that was cut off stays"
	cutRecorded            fault = "a request that was cut off is recorded as failed"
)

// server is a payment API with a fault. Without one it honours keys as the draft says. It waits for
// conditions and never for times, so that its fault shows on any machine.
type server struct {
	fault fault
	plain bool // refusals are no problem documents, and replays have no mark

	mu       sync.Mutex
	records  map[string]*record // by caller and key
	keys     int                // that were new
	effects  int
	shown    int // effects, at the next reading of countsLate
	ids      int
	step     string
	stepKeys int // new keys in this step
}

// record is a claim, and once there is an answer its record.
type record struct {
	body     string
	caller   string
	born     int // keys that were new before
	arrived  int // requests with the key
	passed   int // requests that found no record
	recorded bool
	sent     bool // the answer is sent, and not recorded yet
	retried  bool
	status   int
	answer   string
	location string
}

func newServer(f fault) *server { return &server{fault: f, records: map[string]*record{}} }

// progress follows the steps of the examination.
func (s *server) progress(step string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.step, s.stepKeys = step, 0
}

// await waits for a condition, with the mutex held while it is checked.
func (s *server) await(ctx context.Context, condition func() bool) {
	for deadline := time.Now().Add(waitMax); time.Now().Before(deadline) && ctx.Err() == nil && !condition(); {
		s.mu.Unlock()
		time.Sleep(time.Millisecond)
		s.mu.Lock()
	}
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method == http.MethodGet {
		s.mu.Lock()
		defer s.mu.Unlock()
		w.Header().Set("Content-Type", "application/json")
		shown := s.effects
		if s.fault == countsLate { // the next reading shows it
			shown, s.shown = s.shown, s.effects
		}
		_, _ = fmt.Fprintf(w, `{"data":{"made/of":[{"effects":%d}]}}`, shown)
		return
	}
	body, _ := io.ReadAll(r.Body)
	s.mu.Lock()
	defer s.mu.Unlock()
	key, refusal := s.key(r.Header.Values("Idempotency-Key"))
	switch {
	case refusal != 0:
		s.refuse(w, refusal)
		return
	case key == "" && s.fault != acceptsEmpty:
		s.execute(&record{})
		s.send(w, &record{status: 201, answer: s.json()}, false)
		return
	}
	caller := r.Header.Get("Authorization")
	name := caller + "\x00" + key
	if s.fault == notScoped || s.fault == notScopedMismatch {
		name = key
	}
	switch s.fault {
	case ignoresCase:
		name = strings.ToLower(name)
	case truncatesKeys:
		name = caller + "\x00" + key[:min(len(key), 64)]
	}
	rec := s.records[name]
	if rec == nil {
		rec = &record{body: string(body), caller: caller, born: s.keys}
		s.records[name] = rec
		s.keys++
		s.stepKeys++
		rec.arrived++
		rec.passed++
		s.first(w, r, name, rec)
		return
	}
	rec.arrived++
	s.again(w, r, name, rec, string(body))
}

// key returns the key, or a status to refuse the request with. Both are zero if a request without
// a key is accepted.
func (s *server) key(values []string) (key string, refusal int) {
	switch {
	case len(values) == 0 && s.fault == acceptsMissing:
		return "", 0
	case len(values) == 0 && s.fault == failsMissing:
		return "", 500
	case len(values) == 0 && s.fault == executesMissing:
		s.effects++
		return "", 400
	case len(values) == 0:
		return "", 400
	case len(values) > 1 && s.fault == joinsLines:
		values = []string{strings.Join(values, ", ")}
	case len(values) > 1 && s.fault != takesFirstLine:
		return "", 400
	}
	key = values[0]
	if inside, ok := strings.CutPrefix(key, `"`); ok && s.fault != joinsLines {
		key = strings.TrimSuffix(inside, `"`)
	}
	switch {
	case key == "" && s.fault != acceptsEmpty:
		return "", 400
	case len(key) > 255 && s.fault != acceptsLong:
		return "", 400
	case s.fault == onlySmallLetters && strings.ToLower(key) != key:
		return "", 400
	case strings.ContainsFunc(key, func(r rune) bool { return r > '~' }):
		return "", 400
	}
	return key, 0
}

// first executes a request with a new key.
func (s *server) first(w http.ResponseWriter, r *http.Request, name string, rec *record) {
	ctx := r.Context()
	copied := func() bool { return rec.arrived > 1 }
	switch {
	case s.step == "copies at once" && s.fault == checkThenAct:
		s.await(ctx, func() bool { return rec.passed > 1 })
	case s.step == "copies at once" && s.fault != forgets && s.fault != forgetsEchoesKey:
		s.await(ctx, copied)
	case s.step == "cut connections" && s.stepKeys == 1: // the first one is cut off at once
		s.cut(ctx, name, rec)
		return
	}
	s.execute(rec)
	if s.fault == forgetsEchoesKey {
		rec.answer, rec.location = fmt.Sprintf(`{"state":"paid","key":%q}`, name[strings.IndexByte(name, 0)+1:]), ""
	}
	if s.fault == executesTwice {
		s.effects++
	}
	switch s.fault {
	case forgets, forgetsEchoesKey:
		delete(s.records, name)
	case answersBeforeRecording:
		rec.sent = true
	default:
		rec.recorded = true
	}
	s.send(w, rec, false)
}

// cut waits until the request is cut off. Without a fault it is executed all the same. If its retry
// comes first, that one is cut off later, by its own timeout.
func (s *server) cut(ctx context.Context, name string, rec *record) {
	s.await(ctx, func() bool { return false })
	f := s.fault
	if ctx.Err() == nil { // it was not
		f = nothing
	}
	switch f {
	case cutLosesEffect:
		s.execute(rec)
		s.effects--
		rec.recorded = true
	case cutDoublesEffect, forgets, forgetsEchoesKey:
		s.effects++
		delete(s.records, name)
	case cutSticks:
	case cutRecorded:
		rec.status, rec.answer, rec.recorded = 499, "client closed request\n", true
	default:
		s.execute(rec)
		rec.recorded = true
	}
}

// answer executes and answers, for a server whose keys are the middleware's.
func (s *server) answer(w http.ResponseWriter) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var rec record
	s.execute(&rec)
	s.send(w, &rec, false)
}

// execute has an effect, and fills in the answer.
func (s *server) execute(rec *record) {
	s.effects++
	s.ids++
	rec.status, rec.answer, rec.location = http.StatusCreated, s.json(), "/payments/"+strconv.Itoa(s.ids)
	if s.fault == coarseTimes || s.fault == sameAnswers {
		rec.location = ""
	}
}

func (s *server) json() string {
	switch s.fault {
	case coarseTimes:
		return fmt.Sprintf(`{"state":"paid","at":%d}`, min(s.ids, 2))
	case sameAnswers:
		return `{"state":"paid"}`
	}
	return fmt.Sprintf(`{"id":"pay_%d","state":"paid"}`, s.ids)
}

// again answers a request with a used key.
func (s *server) again(w http.ResponseWriter, r *http.Request, name string, rec *record, body string) {
	mismatch := body != rec.body
	switch {
	case s.fault == checkThenAct && !rec.recorded && s.step == "copies at once":
		rec.passed++
		other := *rec
		s.execute(&other)
		s.send(w, &other, false)
		return
	case s.fault == copiesFail && !rec.recorded:
		s.refuse(w, 500)
		return
	case s.fault == copiesOwnAnswer && !rec.recorded && s.step == "copies at once":
		s.send(w, &record{status: 201, answer: `{"state":"accepted"}`}, false)
		return
	case rec.sent: // the answer is recorded once another key comes, or a retry
		rec.sent, rec.recorded = false, true
		if s.keys == rec.born+1 {
			s.execute(rec)
			s.send(w, rec, false)
			return
		}
	case !rec.recorded:
		s.refuse(w, 409)
		return
	case s.fault == expiresAtOnce && s.keys > rec.born+20:
		delete(s.records, name)
		rec = &record{body: body, born: s.keys}
		s.execute(rec)
		rec.recorded = true
		s.records[name] = rec
		s.send(w, rec, false)
		return
	case mismatch && s.fault == executesMismatch:
		other := &record{}
		s.execute(other)
		s.send(w, other, false)
		return
	case mismatch && s.fault == executesRefused:
		s.effects++
	case mismatch && s.fault == mismatchOverwrites:
		rec.status, rec.answer, rec.location = 422, "another body\n", ""
	case s.fault == conflictAfterAnswer && !rec.retried && s.step != "copies at once" && s.step != "cut connections":
		rec.retried = true
		s.refuse(w, 409)
		return
	case s.fault == replayExecutes && !mismatch:
		s.effects++
	}
	if mismatch && s.fault != noFingerprint && (s.fault != notScoped || rec.caller == r.Header.Get("Authorization")) {
		s.refuse(w, 422)
		return
	}
	s.send(w, rec, true)
}

// send sends an answer.
func (s *server) send(w http.ResponseWriter, rec *record, replay bool) {
	status, answer, location := rec.status, rec.answer, rec.location
	if replay {
		switch s.fault {
		case replayStatus:
			status = http.StatusOK
		case replayBody:
			answer = strings.Replace(answer, "}", `,"replayed":true}`, 1)
		case replayNoLocation:
			location = ""
		}
		if !s.plain {
			w.Header().Set("Idempotent-Replayed", "true")
		}
	}
	if location != "" {
		w.Header().Set("Location", location)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = io.WriteString(w, answer)
}

// refuse sends a problem document.
func (s *server) refuse(w http.ResponseWriter, status int) {
	if s.plain {
		http.Error(w, http.StatusText(status), status)
		return
	}
	if status == 409 {
		w.Header().Set("Retry-After", "1")
	}
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	_, _ = fmt.Fprintf(w, `{"type":"https://example.com/problems","title":%q}`, http.StatusText(status))
}
