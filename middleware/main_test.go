package middleware_test

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// testBundle is a real server on a database of its own.
type testBundle struct {
	pool   *pgxpool.Pool
	store  *postgres.Store
	server *httptest.Server
	client *http.Client
	runs   atomic.Int64 // of any handler
	logs   *strings.Builder
}

type setupOptions struct {
	middleware *middleware.Options
	store      *postgres.Options
	poolMax    int32
	// url defaults to the database's own.
	url func(database string) string
	// mount defaults to only the handler.
	mount  func(idem *middleware.Middleware, handler http.Handler) http.Handler
	server func(*http.Server)
}

// setup serves a handler behind the middleware. The scope is the Account header; without it the
// caller is unknown.
func setup(t testing.TB, opts setupOptions, handler http.HandlerFunc) *testBundle {
	t.Helper()
	database := testservice.Database(t, "")
	if opts.url != nil {
		database = opts.url(database)
	}
	var storeOptions postgres.Options
	if opts.store != nil {
		storeOptions = *opts.store
	}
	storeOptions.PoolConfig = func(config *pgxpool.Config) { config.MaxConns = cmp.Or(opts.poolMax, 10) }
	service := testservice.On(t, database, &storeOptions)
	b := &testBundle{pool: service.Pool, store: service.Store, logs: &strings.Builder{}}

	var o middleware.Options
	if opts.middleware != nil {
		o = *opts.middleware
	}
	if o.Logger == nil {
		o.Logger = slog.New(slog.NewTextHandler(b.logs, nil))
	}
	idem := middleware.New(b.store, func(r *http.Request) (string, error) {
		switch account := r.Header.Get("Account"); account {
		case "":
			return "", errors.New("no account")
		case "blocked":
			return "", &middleware.StatusError{Status: http.StatusForbidden, Detail: "The account is blocked.", Challenge: "Bearer"}
		case "empty":
			return "", nil
		default:
			return account, nil
		}
	}, &o)
	counted := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b.runs.Add(1)
		handler(w, r)
	})
	mounted := idem.Handler(counted)
	if opts.mount != nil {
		mounted = opts.mount(idem, counted)
	}
	b.server = httptest.NewUnstartedServer(mounted)
	b.server.Config.MaxHeaderBytes = 64 << 10
	b.server.Config.ReadTimeout = 10 * time.Second
	b.server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	if opts.server != nil {
		opts.server(b.server.Config)
	}
	b.server.Start()
	t.Cleanup(b.server.Close)
	b.client = b.server.Client()
	b.client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return b
}

// reply is an answer as a client sees it.
type reply struct {
	status  int
	header  http.Header
	body    string
	outcome string
	problem string // the end of the type of a problem document
}

// post sends a request. headers are names and values in turn.
func (b *testBundle) post(t *testing.T, path, body string, headers ...string) reply {
	t.Helper()
	return b.send(t, http.MethodPost, path, strings.NewReader(body), headers...)
}

func (b *testBundle) send(t *testing.T, method, path string, body io.Reader, headers ...string) reply {
	t.Helper()
	r, err := http.NewRequest(method, b.server.URL+path, body)
	if err != nil {
		t.Fatal(err)
	}
	r.GetBody = nil // otherwise Go's client resends keyed requests by itself
	r.Header.Set("Account", "acme")
	r.Header.Set("Content-Type", "application/json")
	for i := 0; i < len(headers); i += 2 {
		if headers[i+1] == "" {
			r.Header.Del(headers[i])
			continue
		}
		r.Header.Add(headers[i], headers[i+1])
		if headers[i] == "Account" || headers[i] == "Content-Type" {
			r.Header.Set(headers[i], headers[i+1])
		}
	}
	response, err := b.client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	return read(t, response)
}

// problemBase is the default of Options.ProblemBase.
const problemBase = "https://github.com/paidonce/idempotency/blob/main/docs/problems.md#"

func read(t *testing.T, response *http.Response) reply {
	t.Helper()
	defer func() { _ = response.Body.Close() }()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	r := reply{status: response.StatusCode, header: response.Header, body: string(body), outcome: response.Header.Get("Idempotency-Status")}
	if response.Header.Get("Content-Type") == "application/problem+json" && strings.Contains(r.body, problemBase) {
		var document struct {
			Type, Title, Detail string
			Status              int
		}
		if err := json.Unmarshal(body, &document); err != nil {
			t.Fatal(err)
		}
		r.problem = strings.TrimPrefix(document.Type, problemBase)
		if document.Status != r.status || document.Title == "" || document.Detail == "" {
			t.Errorf("problem document %s with status %d", r.body, r.status)
		}
		if link := response.Header.Get("Link"); link != "<"+document.Type+`>; rel="describedby"` {
			t.Errorf("Link %q", link)
		}
	}
	return r
}

// settle sends a request again until no attempt holds its key.
func (b *testBundle) settle(t *testing.T, key string) reply {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; {
		got := b.post(t, "/", "{}", "Idempotency-Key", key)
		if got.outcome != string(idempotency.OutcomeInProgress) && got.outcome != "" || time.Now().After(deadline) {
			return got
		}
	}
}

// raw sends bytes as they are and reads one answer.
func (b *testBundle) raw(t *testing.T, text string) reply {
	t.Helper()
	conn := b.dial(t)
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	return b.readFrom(t, conn)
}

// readFrom reads one answer.
func (b *testBundle) readFrom(t *testing.T, conn net.Conn) reply {
	t.Helper()
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	return read(t, response)
}

func (b *testBundle) dial(t *testing.T) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", b.server.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func (b *testBundle) count(t *testing.T, sql string) (n int) {
	t.Helper()
	if err := b.pool.QueryRow(context.Background(), sql).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func (b *testBundle) effects(t *testing.T) int { return b.count(t, "SELECT count(*) FROM effects") }
func (b *testBundle) records(t *testing.T) int {
	return b.count(t, "SELECT count(*) FROM idempotency_keys")
}

// want checks an answer against a row of the table.
func want(t *testing.T, got reply, status int, outcome idempotency.Outcome, problem idempotency.Reason) {
	t.Helper()
	if got.status != status || got.outcome != string(outcome) || got.problem != string(problem) {
		t.Errorf("status %d, outcome %q, problem %q; want %d, %q, %q\n%s", got.status, got.outcome, got.problem, status, outcome, problem, got.body)
	}
}

// transfer is a handler with an effect.
func transfer(w http.ResponseWriter, r *http.Request) {
	var id int64
	if err := postgres.Tx(r.Context()).QueryRow(r.Context(), "INSERT INTO effects DEFAULT VALUES RETURNING id").Scan(&id); err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Location", "/transfers/1")
	w.Header().Set("Set-Cookie", "session=secret")
	w.WriteHeader(http.StatusCreated)
	_ = json.NewEncoder(w).Encode(map[string]int64{"id": id})
}
