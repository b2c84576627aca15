package server

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/internal/pgtest"
)

// TestMain runs the client that is killed, if the environment says so.
func TestMain(m *testing.M) {
	if os.Getenv(childVariable) != "" {
		os.Exit(child())
	}
	pgtest.Main(m)
}

// startTimeout limits the start and the stop of a bank. It is long because the machine may be
// loaded.
const startTimeout = 60 * time.Second

// bundle is a running bank and its test's tools. Its methods fail the test without stopping it, so
// any goroutine may call them.
type bundle struct {
	t    *testing.T
	url  string
	psp  string // URL of its processor
	db   *pgxpool.Pool
	http *http.Client

	brokers []string
	stop    func() // ends the bank before the test's end
}

// setup runs a bank on its own database.
func setup(t *testing.T, change ...func(*Config)) *bundle {
	t.Helper()
	database := pgtest.Database(t)
	b := setupOn(t, database, change...)
	b.db = connect(t, database)
	return b
}

// testerName is the application_name of the test's own connections.
const testerName = "test"

// connect opens the test's own pool, to read and change the books directly.
func connect(t *testing.T, database string) *pgxpool.Pool {
	t.Helper()
	return pgtest.Pool(t, database, map[string]string{"search_path": bank.Schema, "application_name": testerName})
}

// setupOn runs a bank on the given database.
func setupOn(t *testing.T, database string, change ...func(*Config)) *bundle {
	t.Helper()
	return launch(t, database, change...)()
}

// launch starts a bank and returns a function that waits until it serves, so that a test can start
// two at once.
func launch(t *testing.T, database string, change ...func(*Config)) (await func() *bundle) {
	t.Helper()
	config := Config{Addr: "127.0.0.1:0", DatabaseURL: database, PoolSize: 16}
	for _, f := range change {
		f(&config)
	}
	s := New(config)
	transport := &http.Transport{MaxIdleConnsPerHost: 64}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	stop := sync.OnceFunc(func() {
		transport.CloseIdleConnections()
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("the bank ended with: %v", err)
			}
		case <-time.After(startTimeout):
			t.Error("the bank did not end")
		}
	})
	t.Cleanup(stop)
	return func() *bundle {
		t.Helper()
		select {
		case <-s.Serving():
		case err := <-ended:
			ended <- err
			t.Fatalf("the bank did not start: %v", err)
		case <-time.After(startTimeout):
			t.Fatal("the bank did not start in time")
		}
		return &bundle{t: t, url: s.URL(), psp: s.psp, http: &http.Client{Transport: transport, Timeout: time.Minute}, brokers: s.brokers, stop: stop}
	}
}

// reply is a complete answer.
type reply struct {
	status int
	header http.Header
	body   []byte
}

func (r reply) outcome() string { return r.header.Get("Idempotency-Status") }

// send sends a request; headers are names and values in turn.
func (b *bundle) send(method, path, body string, headers ...string) reply {
	b.t.Helper()
	return b.sendTo(method, b.url+path, body, headers...)
}

func (b *bundle) sendTo(method, url, body string, headers ...string) reply {
	b.t.Helper()
	request, err := http.NewRequestWithContext(b.t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		b.t.Error(err)
		return reply{}
	}
	request.GetBody = nil
	for i := 0; i < len(headers); i += 2 {
		request.Header.Add(headers[i], headers[i+1])
	}
	response, err := b.http.Do(request)
	if err != nil {
		b.t.Errorf("%s %s: %v", method, url, err)
		return reply{}
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		b.t.Errorf("%s %s: %v", method, url, err)
		return reply{}
	}
	return reply{status: response.StatusCode, header: response.Header, body: content}
}

func (b *bundle) get(path string) reply {
	b.t.Helper()
	return b.send(http.MethodGet, path, "")
}

// keyed sends a POST with a new key.
func (b *bundle) keyed(path, body string) reply {
	b.t.Helper()
	return b.send(http.MethodPost, path, body, "Idempotency-Key", uuid.NewString())
}

// into decodes an answer's body.
func (b *bundle) into(r reply, value any) {
	b.t.Helper()
	if err := json.Unmarshal(r.body, value); err != nil {
		b.t.Errorf("%s: %v", r.body, err)
	}
}

func (b *bundle) audit() bank.Audit {
	b.t.Helper()
	var audit bank.Audit
	b.into(b.get("/v1/audit"), &audit)
	return audit
}

func (b *bundle) balance(account string) int64 {
	b.t.Helper()
	var a bank.Account
	b.into(b.get("/v1/accounts/"+account), &a)
	return a.Balance
}

// count returns the number that a query returns.
func (b *bundle) count(sql string, args ...any) (n int) {
	b.t.Helper()
	if err := b.db.QueryRow(b.t.Context(), sql, args...).Scan(&n); err != nil {
		b.t.Fatalf("%s: %v", sql, err)
	}
	return n
}

// exec runs a statement directly on the bank's database.
func (b *bundle) exec(sql string, args ...any) {
	b.t.Helper()
	if _, err := b.db.Exec(b.t.Context(), sql, args...); err != nil {
		b.t.Errorf("%s: %v", sql, err)
	}
}

// expectFields requires that a JSON object has exactly the named fields, each of its kind. A field
// is "name:kind"; the kinds are id, string, text (not empty), int, bool, time, list and
// null-or-string. A number may be null if the field is "name:int?".
func expectFields(t *testing.T, body []byte, spec string) map[string]any {
	t.Helper()
	decoder := json.NewDecoder(bytes.NewReader(body))
	decoder.UseNumber()
	var object map[string]any
	if err := decoder.Decode(&object); err != nil {
		t.Fatalf("%s: %v", body, err)
	}
	expectObject(t, object, spec)
	return object
}

func expectObject(t *testing.T, object map[string]any, spec string) {
	t.Helper()
	fields := strings.Fields(spec)
	for _, field := range fields {
		name, kind, _ := strings.Cut(field, ":")
		value, ok := object[name]
		if !ok {
			t.Errorf("field %s is missing", name)
			continue
		}
		text, isText := value.(string)
		number, isNumber := value.(json.Number)
		switch kind {
		case "id":
			ok = isText && text != "" && strings.Trim(text, "0123456789") == ""
		case "string":
			ok = isText
		case "text":
			ok = isText && text != ""
		case "int":
			ok = isNumber && !strings.ContainsAny(number.String(), ".eE")
		case "int?":
			ok = value == nil || isNumber
		case "bool":
			_, ok = value.(bool)
		case "time":
			_, err := time.Parse(time.RFC3339, text)
			ok = err == nil
		case "list":
			_, ok = value.([]any)
		case "null-or-string":
			ok = value == nil || isText
		default:
			t.Fatalf("kind %q is unknown", kind)
		}
		if !ok {
			t.Errorf("field %s is %v: want a %s", name, value, kind)
		}
	}
	if len(object) != len(fields) {
		t.Errorf("the object has %d fields, want the %d of %q: %v", len(object), len(fields), spec, object)
	}
}

// expectProblem requires a problem document of the given status and type.
func expectProblem(t *testing.T, r reply, status int, slug string) {
	t.Helper()
	if r.status != status || r.header.Get("Content-Type") != "application/problem+json" {
		t.Fatalf("answer is %d %s %s: want a problem with %d", r.status, r.header.Get("Content-Type"), r.body, status)
	}
	document := expectFields(t, r.body, "type:text title:text status:int detail:text")
	if kind, _ := document["type"].(string); !strings.HasSuffix(kind, "#"+slug) {
		t.Errorf("problem type is %v: want one that ends in %s", document["type"], slug)
	}
	if number, _ := document["status"].(json.Number); number.String() != strconv.Itoa(status) {
		t.Errorf("problem status is %v, want %d", document["status"], status)
	}
}

// logTo makes a bank log everything to a buffer.
func logTo(w io.Writer) func(*Config) {
	return func(c *Config) {
		c.Logger = slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
}
