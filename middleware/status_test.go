package middleware_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/middleware"
)

var statusSecret, otherStatusSecret = bytes.Repeat([]byte("s"), 32), bytes.Repeat([]byte("t"), 32)

// operations are routes that answer 202 pending, and their status resource.
type operations struct {
	*testBundle
	processor *processor
	completer *idempotency.Completer
	status    http.Handler

	held, release chan struct{} // of POST /hold
}

// setupOperations serves POST /topups/{kind}, which charges a card and answers with a body of that
// kind, and the status resource.
func setupOperations(t *testing.T, options *middleware.Options) *operations {
	t.Helper()
	o := &operations{processor: newProcessor(t), held: make(chan struct{}), release: make(chan struct{})}
	charge := o.processor.charge()
	topUp := func(w http.ResponseWriter, r *http.Request) {
		paid, err := charge.Call(r.Context(), card{Amount: 5})
		switch {
		case errors.Is(err, effect.ErrDeclined):
			http.Error(w, "declined", http.StatusPaymentRequired)
			return
		case err != nil:
			return
		}
		body := []byte(`{ "id": "` + paid.ID + `", "text": "<1.50>" }`)
		switch r.PathValue("kind") {
		case "json":
			w.Header().Set("Content-Type", "application/json; charset=utf-8")
		case "problem":
			w.Header().Set("Content-Type", "application/problem+json")
		case "text":
			w.Header().Set("Content-Type", "text/plain")
		case "broken":
			w.Header().Set("Content-Type", "application/json")
			body = body[1:]
		case "binary":
			w.Header().Set("Content-Type", "application/octet-stream")
			body = []byte{0xff, 0}
		case "empty":
			body = nil
		}
		w.WriteHeader(http.StatusCreated)
		_, _ = w.Write(body)
	}
	if options == nil {
		options = &middleware.Options{}
	}
	options.BackoffMax = 50 * time.Millisecond
	o.testBundle = setup(t, setupOptions{middleware: options, mount: func(idem *middleware.Middleware, _ http.Handler) http.Handler {
		status := middleware.NewStatus("/v1/operations/", statusSecret)
		topUps := idem.With(func(o *middleware.Options) { o.Resumable, o.Accepted = "topup/1", status })
		o.completer, o.status = idem.Completer(nil), status
		mux := http.NewServeMux()
		mux.Handle("POST /topups/{kind}", topUps.Handler(http.HandlerFunc(topUp)))
		mux.Handle("GET /v1/operations/{id}", status)
		mux.Handle("POST /hold", idem.Handler(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			close(o.held)
			<-o.release
			w.WriteHeader(http.StatusOK)
		})))
		return mux
	}}, nil)
	return o
}

// topUp sends a request that prefers an asynchronous answer.
func (o *operations) topUp(t *testing.T, key, kind string, headers ...string) reply {
	t.Helper()
	return o.post(t, "/topups/"+kind, `{"amount":5}`, append([]string{"Idempotency-Key", key, "Prefer", "respond-async"}, headers...)...)
}

// open sends a request that stays open, and returns the path of its operation.
func (o *operations) open(t *testing.T, key, kind string) string {
	t.Helper()
	o.processor.set(func() { o.processor.mute = true })
	got := o.topUp(t, key, kind)
	want(t, got, http.StatusAccepted, idempotency.OutcomePending, "")
	o.processor.set(func() { o.processor.mute = false })
	return got.header.Get("Location")
}

func (o *operations) get(t *testing.T, path string, headers ...string) (reply, middleware.Operation) {
	t.Helper()
	got := o.send(t, http.MethodGet, path, http.NoBody, headers...)
	var operation middleware.Operation
	if got.status == http.StatusOK {
		if err := json.Unmarshal([]byte(got.body), &operation); err != nil {
			t.Errorf("%s: %v", got.body, err)
		}
	}
	if got.header.Get("Cache-Control") != "no-store" || got.outcome != "" {
		t.Errorf("Cache-Control %q, outcome %q", got.header.Get("Cache-Control"), got.outcome)
	}
	return got, operation
}

func TestWhoPrefersNotToWaitGetsPendingAndTheAnswerLater(t *testing.T) {
	t.Parallel()
	o := setupOperations(t, nil)
	const key = "8e03978e-40d5-43dd-bc93-6894a57f9324"
	o.processor.set(func() { o.processor.mute = true })
	pending := o.topUp(t, key, "json")
	want(t, pending, http.StatusAccepted, idempotency.OutcomePending, "")
	location := pending.header.Get("Location")
	id := strings.TrimPrefix(location, "/v1/operations/")
	if pending.body != `{"id":"`+id+`","status":"pending"}`+"\n" || pending.header.Get("Retry-After") == "" ||
		pending.header.Get("Preference-Applied") != "respond-async" || pending.header.Get("Cache-Control") != "no-store" {
		t.Errorf("%s %v", pending.body, pending.header)
	}
	sealed, err := base64.RawURLEncoding.DecodeString(id)
	if err != nil || strings.Contains(string(sealed), key) || strings.Contains(string(sealed), "acme") {
		t.Errorf("the id is %q, %v", sealed, err)
	}
	due := func(in string) {
		t.Helper()
		if _, err := o.pool.Exec(t.Context(), "UPDATE idempotency_open SET next_at = now() + $1::interval", in); err != nil {
			t.Fatal(err)
		}
	}
	due("1 hour") // the retry runs nothing
	if again := o.topUp(t, key, "json"); again.header.Get("Location") != location {
		t.Errorf("the retry is at %q, not %q", again.header.Get("Location"), location)
	}
	if n := strings.Count(o.logs.String(), "request stays open"); n != 1 {
		t.Errorf("one run and one retry, which ran nothing, log %d times that the request stays open", n)
	}
	if other := o.topUp(t, "another", "json"); other.header.Get("Location") == location {
		t.Error("two requests have one operation")
	}
	// A client that does not ask for it gets 503 as before.
	unknown := o.post(t, "/topups/json", `{"amount":5}`, "Idempotency-Key", key, "Prefer", "wait=10")
	want(t, unknown, http.StatusServiceUnavailable, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
	if !strings.Contains(unknown.body, `"accepted":true`) || unknown.header.Get("Location") != "" {
		t.Errorf("%s %v", unknown.body, unknown.header)
	}
	// Another request with the same key does not get the operation.
	want(t, o.post(t, "/topups/json", `{"amount":6}`, "Idempotency-Key", key, "Prefer", "respond-async"), http.StatusUnprocessableEntity, idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)

	got, operation := o.get(t, location)
	if got.status != http.StatusOK || operation.ID != id || operation.Status != middleware.OperationPending || operation.Answer != nil || got.header.Get("Retry-After") == "" {
		t.Errorf("%d %s %v", got.status, got.body, got.header)
	}
	o.processor.set(func() { o.processor.mute = false })
	due("0")
	complete(t, o.testBundle, o.completer)
	got, _ = o.get(t, location)
	if wanted := `{"id":"` + id + `","status":"done","answer":{"status":201,"body":{"id":"ch_1","text":"<1.50>"}}}` + "\n"; got.status != http.StatusOK || got.body != wanted || got.header.Get("Retry-After") != "" {
		t.Errorf("%d %s %v, want %s", got.status, got.body, got.header, wanted)
	}
	want(t, o.topUp(t, key, "json"), http.StatusCreated, idempotency.OutcomeReplayed, "")
	if n := len(o.processor.charges); n != 2 {
		t.Errorf("%d charges of two requests", n)
	}
	if strings.Contains(o.logs.String(), key) || strings.Contains(o.logs.String(), id) {
		t.Errorf("the log shows a key or an id: %s", o.logs)
	}
}

// A request that has ended gets its answer, whatever it prefers.
func TestSettledRequestIsNotPending(t *testing.T) {
	t.Parallel()
	o := setupOperations(t, nil)
	want(t, o.topUp(t, "k", "json"), http.StatusCreated, idempotency.OutcomeExecuted, "")
	o.processor.set(func() { o.processor.decline = true })
	want(t, o.topUp(t, "k2", "json"), http.StatusPaymentRequired, idempotency.OutcomeExecuted, "")
}

// Only a route that asked for it answers 202.
func TestRouteWithoutAcceptedAnswersUnknown(t *testing.T) {
	t.Parallel()
	p := newProcessor(t)
	b, _ := setupTopups(t, p, &middleware.Options{})
	p.set(func() { p.mute = true })
	want(t, b.post(t, "/accounts/alice/topups", "{}", "Idempotency-Key", "k", "Prefer", "respond-async"), http.StatusServiceUnavailable, idempotency.OutcomeUnknown, idempotency.ReasonOutcomeUnknown)
}

func TestOperationIsOnlyItsScopes(t *testing.T) {
	t.Parallel()
	o := setupOperations(t, nil)
	location := o.open(t, "k", "json")
	complete(t, o.testBundle, o.completer)
	id := strings.TrimPrefix(location, "/v1/operations/")
	flipped := []byte(id)
	flipped[len(flipped)/2] ^= 1 // another letter of the alphabet, or none
	other := middleware.NewStatus("/", otherStatusSecret)
	key, fingerprint := idempotency.Key{Scope: "acme", Value: "k"}, idempotency.NewFingerprintV1("POST", "/topups/json", "", "application/json", []byte(`{"amount":5}`))
	same := middleware.NewStatus("/", statusSecret)
	if got := middleware.SealStatusID(same, "topup/1", key, fingerprint); got != id {
		t.Fatalf("the id is %s, want %s", id, got)
	}
	for name, path := range map[string]string{
		"malformed":        "/v1/operations/what",
		"empty":            "/v1/operations/%20",
		"cut":              location[:len(location)-4],
		"changed":          "/v1/operations/" + string(flipped),
		"too long":         "/v1/operations/" + strings.Repeat("a", 2000),
		"another secret":   "/v1/operations/" + middleware.SealStatusID(other, "topup/1", key, fingerprint),
		"another route":    "/v1/operations/" + middleware.SealStatusID(same, "topup/2", key, fingerprint),
		"another key":      "/v1/operations/" + middleware.SealStatusID(same, "topup/1", idempotency.Key{Scope: "acme", Value: "k2"}, fingerprint),
		"an earlier one":   "/v1/operations/" + middleware.SealStatusID(same, "topup/1", key, idempotency.NewFingerprintV1("POST", "/", "", "", nil)),
		"an older program": "/v1/operations/" + middleware.SealStatusID(same, "topup/1", key, idempotency.NewFingerprint(idempotency.FingerprintVersionUserMin, nil)),
	} {
		if got, _ := o.get(t, path); got.status != http.StatusNotFound || got.body != `{"type":"about:blank","title":"Not Found","status":404}` {
			t.Errorf("%s: %d %s", name, got.status, got.body)
		}
	}
	if got, _ := o.get(t, location, "Account", "evil"); got.status != http.StatusNotFound {
		t.Errorf("another scope: %d %s", got.status, got.body)
	}
	if got, _ := o.get(t, location, "Account", ""); got.status != http.StatusUnauthorized || got.problem != string(idempotency.ReasonScope) {
		t.Errorf("an unknown caller: %d %s", got.status, got.body)
	}
	if got, _ := o.get(t, location, "Account", "blocked"); got.status != http.StatusForbidden || got.header.Get("WWW-Authenticate") != "Bearer" {
		t.Errorf("a caller that is refused: %d %s", got.status, got.body)
	}
	if got, operation := o.get(t, location); operation.Status != middleware.OperationDone {
		t.Errorf("its own: %d %s", got.status, got.body)
	}
	if _, err := o.pool.Exec(context.Background(), "DELETE FROM idempotency_keys"); err != nil {
		t.Fatal(err)
	}
	if got, _ := o.get(t, location); got.status != http.StatusNotFound {
		t.Errorf("expired: %d %s", got.status, got.body)
	}
}

func TestOperationThatNeedsAPerson(t *testing.T) {
	t.Parallel()
	o := setupOperations(t, nil)
	location := o.open(t, "k", "json")
	if _, err := o.pool.Exec(context.Background(), "UPDATE idempotency_open SET parked = 'a rule'"); err != nil {
		t.Fatal(err)
	}
	got := o.topUp(t, "k", "json")
	want(t, got, http.StatusAccepted, idempotency.OutcomePending, "")
	if !strings.Contains(got.body, `"status":"needs-attention"`) || got.header.Get("Location") != location {
		t.Errorf("%s %v", got.body, got.header)
	}
	if got, operation := o.get(t, location); operation.Status != middleware.OperationNeedsAttention || got.header.Get("Retry-After") != "" || strings.Contains(got.body, "rule") {
		t.Errorf("%s %v", got.body, got.header)
	}
}

func TestAnswerOfAnOperationIsAuthorizedAsAReplay(t *testing.T) {
	t.Parallel()
	var asked []string
	refuse := false
	o := setupOperations(t, &middleware.Options{AuthorizeReplay: func(r *http.Request, record *idempotency.Record) error {
		asked = append(asked, fmt.Sprint(r.Method, " ", r.URL.Path, " ", record.Answer.Status))
		if refuse {
			return errors.New("has left the company")
		}
		return nil
	}})
	location := o.open(t, "k", "json")
	if _, operation := o.get(t, location); operation.Status != middleware.OperationPending || len(asked) != 0 {
		t.Errorf("%+v, asked %q", operation, asked)
	}
	complete(t, o.testBundle, o.completer)
	if _, operation := o.get(t, location); operation.Status != middleware.OperationDone || len(asked) != 1 || asked[0] != "GET "+location+" 201" {
		t.Errorf("%+v, asked %q", operation, asked)
	}
	refuse = true
	if got, _ := o.get(t, location); got.status != http.StatusForbidden || got.problem != string(idempotency.ReasonReplayDenied) || strings.Contains(got.body, "ch_1") || strings.Contains(got.body, "company") {
		t.Errorf("%d %s", got.status, got.body)
	}
}

func TestBodyOfAnOperation(t *testing.T) {
	t.Parallel()
	o := setupOperations(t, nil)
	const document = `{ "id": "ch_1", "text": "<1.50>" }`
	text := func(s string) string { encoded, _ := json.Marshal(s); return string(encoded) }
	for kind, want := range map[string]middleware.OperationAnswer{
		"json":    {Body: json.RawMessage(`{"id":"ch_1","text":"<1.50>"}`)},
		"problem": {Body: json.RawMessage(`{"id":"ch_1","text":"<1.50>"}`)},
		"text":    {Body: json.RawMessage(text(document))},
		"broken":  {Body: json.RawMessage(text(document[1:]))},
		"binary":  {Body: json.RawMessage(`"/wA="`), Encoding: "base64"},
		"empty":   {Body: json.RawMessage(`""`)},
	} {
		location := o.open(t, kind, kind)
		complete(t, o.testBundle, o.completer)
		got, operation := o.get(t, location)
		if operation.Answer == nil {
			t.Errorf("%s: %d %s", kind, got.status, got.body)
			continue
		}
		var gotBody, wantBody any
		if json.Unmarshal(operation.Answer.Body, &gotBody) != nil || json.Unmarshal(want.Body, &wantBody) != nil ||
			fmt.Sprint(gotBody) != fmt.Sprint(wantBody) || operation.Answer.Encoding != want.Encoding || operation.Answer.Status != http.StatusCreated {
			t.Errorf("%s: %s", kind, got.body)
		}
	}
}

func TestOperationThatCannotBeLookedUp(t *testing.T) {
	t.Parallel()
	o := setupOperations(t, &middleware.Options{InFlightMax: 1})
	location := o.open(t, "k", "json")
	unavailable := func(what string) {
		t.Helper()
		got, _ := o.get(t, location)
		if got.status != http.StatusServiceUnavailable || got.header.Get("Retry-After") == "" || got.problem != string(idempotency.ReasonOutcomeUnknown) {
			t.Errorf("%s: %d %s %v", what, got.status, got.body, got.header)
		}
	}
	// A request in progress leaves no room: polls count for InFlightMax.
	answered := make(chan reply, 1)
	go func() { answered <- o.post(t, "/hold", "{}", "Idempotency-Key", "k2") }()
	<-o.held
	unavailable("one in progress")
	close(o.release)
	want(t, <-answered, http.StatusOK, idempotency.OutcomeExecuted, "")
	if _, operation := o.get(t, location); operation.Status != middleware.OperationPending {
		t.Errorf("none in progress: %+v", operation)
	}
	complete(t, o.testBundle, o.completer)
	if _, err := o.pool.Exec(context.Background(), "UPDATE idempotency_keys SET headers = decode('01010a5365742d436f6f6b69650161', 'hex') WHERE key = 'k'"); err != nil {
		t.Fatal(err)
	}
	if got, _ := o.get(t, location); got.status != http.StatusInternalServerError || got.problem != string(idempotency.ReasonRecordCorrupt) {
		t.Errorf("changed: %d %s", got.status, got.body)
	}
	o.pool.Close()
	unavailable("an outage")
	if !strings.Contains(o.logs.String(), "operation could not be looked up") {
		t.Errorf("the log says %s", o.logs)
	}
}

func TestStatusResourceIsReadOnly(t *testing.T) {
	t.Parallel()
	o := setupOperations(t, nil)
	location := o.open(t, "k", "json")
	for method, status := range map[string]int{"GET": 200, "HEAD": 200, "POST": 405, "DELETE": 405, "QUERY": 405} {
		r, err := http.NewRequestWithContext(t.Context(), method, location, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Account", "acme")
		w := httptest.NewRecorder()
		o.status.ServeHTTP(w, r)
		if w.Code != status || (status == 405) != (w.Header().Get("Allow") == "GET, HEAD") {
			t.Errorf("%s: %d %v", method, w.Code, w.Header())
		}
	}
}

// The first secret makes ids, and each one reads them.
func TestStatusSecretsRotate(t *testing.T) {
	t.Parallel()
	key, fingerprint := idempotency.Key{Scope: "acme", Value: "k"}, idempotency.NewFingerprint(1, []byte("request"))
	before, both := middleware.NewStatus("/", statusSecret), middleware.NewStatus("/", otherStatusSecret, statusSecret)
	after := middleware.NewStatus("/", otherStatusSecret)
	old := middleware.SealStatusID(before, "topup/1", key, fingerprint)
	made := middleware.SealStatusID(both, "topup/1", key, fingerprint)
	if old == made {
		t.Error("the second secret makes ids")
	}
	for name, c := range map[string]struct {
		status *middleware.Status
		id     string
		known  bool
	}{
		"an old id, both secrets": {both, old, true}, "a new id, both secrets": {both, made, true},
		"an old id, the new secret": {after, old, false}, "a new id, the new secret": {after, made, true},
		"a new id, the old secret": {before, made, false},
	} {
		route, got, sum, ok := middleware.OpenStatusID(c.status, c.id)
		if ok != c.known || ok && (route != "topup/1" || got != key || sum != fingerprint) {
			t.Errorf("%s: %v", name, ok)
		}
	}
}

// The longest id is read.
func TestLongestStatusID(t *testing.T) {
	t.Parallel()
	status := middleware.NewStatus("/", statusSecret)
	key := idempotency.Key{Scope: strings.Repeat("s", idempotency.ScopeBytesMax), Value: strings.Repeat("k", idempotency.KeyBytesMax)}
	id := middleware.SealStatusID(status, strings.Repeat("r", idempotency.ResumableBytesMax), key, idempotency.Fingerprint{})
	if _, got, _, ok := middleware.OpenStatusID(status, id); !ok || got != key || len(id) != middleware.StatusIDBytesMax {
		t.Errorf("%v: %d characters, and the limit is %d", ok, len(id), middleware.StatusIDBytesMax)
	}
}

func TestStatusThatCannotWorkPanics(t *testing.T) {
	t.Parallel()
	status := middleware.NewStatus("https://bank.example/v1/operations/", statusSecret)
	middleware.NewStatus("/", statusSecret[:middleware.StatusSecretBytesMin])
	for name, c := range map[string]struct {
		text string
		make func()
	}{
		"no secret":         {"needs a secret of at least 32 bytes", func() { middleware.NewStatus("/v1/operations/") }},
		"a short secret":    {"at least 32", func() { middleware.NewStatus("/v1/operations/", statusSecret[:31]) }},
		"a secret of zeros": {"all zero", func() { middleware.NewStatus("/v1/operations/", make([]byte, 32)) }},
		"a short second":    {"at least 32", func() { middleware.NewStatus("/v1/operations/", statusSecret, nil) }},
		"no slash":          {"ends with a slash", func() { middleware.NewStatus("/v1/operations", statusSecret) }},
		"empty":             {"ends with a slash", func() { middleware.NewStatus("", statusSecret) }},
		"relative":          {"ends with a slash", func() { middleware.NewStatus("operations/", statusSecret) }},
		"a host":            {"ends with a slash", func() { middleware.NewStatus("//evil/", statusSecret) }},
		"another scheme":    {"ends with a slash", func() { middleware.NewStatus("ftp://bank/", statusSecret) }},
		"a query":           {"ends with a slash", func() { middleware.NewStatus("/v1?id=/", statusSecret) }},
		"not resumable":     {"Accepted needs Options.Resumable", func() { middleware.New(testStore{}, byAccount, &middleware.Options{Accepted: status}) }},
		"With, not resumable": {"Accepted needs Options.Resumable", func() {
			middleware.New(testStore{}, byAccount, nil).With(func(o *middleware.Options) { o.Accepted = status })
		}},
		"two routes of one name": {"two routes", func() {
			for range 2 {
				idem := middleware.New(testStore{}, byAccount, &middleware.Options{Accepted: status, Resumable: "topup/1"})
				idem.Handler(http.NotFoundHandler())
			}
		}},
	} {
		t.Run(name, func(t *testing.T) {
			defer func() {
				if text := fmt.Sprint(recover()); !strings.Contains(text, c.text) || strings.Contains(text, "ssss") {
					t.Errorf("%s", text)
				}
			}()
			c.make()
		})
	}
	if text := fmt.Sprintf("%v %+v %#v", status, status, middleware.Options{Accepted: status}); strings.Contains(text, "ssss") || strings.Contains(text, "[115") {
		t.Errorf("it prints %s", text)
	}
}

// testStore is a store that is never asked.
type testStore struct{ idempotency.Keeper }

func TestPreferenceForAnAsynchronousAnswer(t *testing.T) {
	t.Parallel()
	for want, values := range map[bool][][]string{
		true: {
			{"respond-async"}, {"Respond-ASYNC"}, {" respond-async\t"}, {"respond-async, wait=100"}, {"wait=10 , respond-async"},
			{"return=minimal", "respond-async"}, {"respond-async; foo=bar"}, {`respond-async=""; foo`}, {"respond-async="}, {`foo="a, b"; c="\",", respond-async`},
		},
		false: {
			nil, {""}, {","}, {"respond-asynchronously"}, {"wait=respond-async"}, {`foo="a, respond-async"`}, {`foo="\", respond-async`}, {"foo; respond-async"},
			{"respond-async=no"}, {"respond async"}, {"handling=lenient"}, {`"respond-async"`},
		},
	} {
		for _, value := range values {
			if got := middleware.PrefersAsync(http.Header{"Prefer": value}); got != want {
				t.Errorf("%q: %v", value, got)
			}
		}
	}
}

// FuzzPrefer: a preference that is added behind any complete list is found, and one that is inside
// a quoted string is not.
func FuzzPrefer(f *testing.F) {
	f.Add("wait=10", "a,b;c")
	f.Add(`foo="\""`, `\`)
	f.Fuzz(func(t *testing.T, list, quoted string) {
		if !middleware.PrefersAsync(http.Header{"Prefer": {list, "respond-async"}}) {
			t.Errorf("behind %q", list)
		}
		escaped := strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(quoted)
		if middleware.PrefersAsync(http.Header{"Prefer": {`foo="` + escaped + `, respond-async"`}}) {
			t.Errorf("inside %q", quoted)
		}
	})
}

// FuzzOperationID: if an id can be read, its content is encrypted to the same id again.
func FuzzOperationID(f *testing.F) {
	status := middleware.NewStatus("/", statusSecret)
	f.Add(middleware.SealStatusID(status, "topup/1", idempotency.Key{Scope: "acme", Value: "k"}, idempotency.NewFingerprint(1, nil)), "a", "b", "c", int16(1))
	f.Add("", "topup/1", strings.Repeat("s", 255), strings.Repeat("k", 255), int16(-1))
	f.Fuzz(func(t *testing.T, id, route, scope, value string, version int16) {
		if route, key, fingerprint, ok := middleware.OpenStatusID(status, id); ok && middleware.SealStatusID(status, route, key, fingerprint) != id {
			t.Errorf("%q is another's id", id)
		}
		key := idempotency.Key{Scope: scope, Value: value}
		if key.Validate() != nil || len(route) > idempotency.ResumableBytesMax {
			return
		}
		fingerprint := idempotency.NewFingerprint(version, []byte(id))
		gotRoute, gotKey, gotSum, ok := middleware.OpenStatusID(status, middleware.SealStatusID(status, route, key, fingerprint))
		if !ok || gotRoute != route || gotKey != key || gotSum != fingerprint {
			t.Errorf("%v", ok)
		}
	})
}
