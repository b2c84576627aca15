package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"sync/atomic"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/middleware/chiroute"
	"github.com/paidonce/idempotency/storage/postgres"
)

const (
	scope = "bench" // of all keys

	acquireTimeout = 10 * time.Second // long, because a small pool has a queue
	connectTimeout = 5 * time.Second

	waitMax  = 5 * time.Second        // of the route that waits
	waitWork = 200 * time.Millisecond // the time that its handler takes before it pays
)

// setting tells the serving process which routes to serve.
type setting struct {
	DatabaseURL string   `json:"database_url"`
	Schemas     []string `json:"schemas"` // with tables of records; the first part of each path
	Designs     []string `json:"designs"` // the second part
	PoolSize    int      `json:"pool_size"`
	Partitions  int      `json:"partitions,omitempty"` // of the messages, if a design consumes them
}

// stand is a setting in service: its pools and routes.
type stand struct {
	setting setting
	wire    *wire
	router  *chi.Mux
	pools   []*pgxpool.Pool

	messages *consumption // nil if no design consumes them

	runs    atomic.Int64 // of the slow handler
	holders holders
}

// newStand opens the pools and warms each of their conns.
func newStand(ctx context.Context, s setting, w *wire) (_ *stand, err error) {
	d := &stand{setting: s, wire: w, router: chi.NewRouter()}
	defer func() {
		if err != nil {
			d.close()
		}
	}()
	plain, err := d.open(ctx, nil)
	if err != nil {
		return nil, err
	}
	for _, schema := range s.Schemas {
		if err := d.mount(ctx, schema, plain); err != nil {
			return nil, err
		}
	}
	if d.wants(consuming()...) {
		if d.messages, err = d.consumption(ctx, s.Schemas[0], plain); err != nil {
			return nil, err
		}
	}
	for _, pool := range d.pools {
		if err := d.warm(ctx, pool, pool == plain); err != nil {
			return nil, fmt.Errorf("warm the pool up: %w", err)
		}
	}
	return d, nil
}

func (d *stand) close() {
	d.messages.close()
	for _, pool := range d.pools {
		pool.Close()
	}
}

func (d *stand) wants(names ...string) bool {
	return slices.ContainsFunc(names, func(name string) bool { return slices.Contains(d.setting.Designs, name) })
}

// open opens a pool: with pgx's defaults and synchronous_commit for the bare designs and the
// rivals, and as Configure sets it for a store.
func (d *stand) open(ctx context.Context, opts *postgres.Options) (*pgxpool.Pool, error) {
	config, err := pgxpool.ParseConfig(d.setting.DatabaseURL)
	if err != nil {
		return nil, err
	}
	config.MaxConns = int32(d.setting.PoolSize)
	config.ConnConfig.ConnectTimeout = connectTimeout
	config.ConnConfig.RuntimeParams["search_path"] = bank.Schema
	config.ConnConfig.RuntimeParams["synchronous_commit"] = "on"
	config.ConnConfig.RuntimeParams["application_name"] = "bench-serve"
	d.wire.watch(config)
	if opts != nil {
		if d.wants(routeWait) {
			config.ConnConfig.Tracer = &d.holders
		}
		postgres.Configure(config, opts)
	}
	pool, err := pgxpool.NewWithConfig(ctx, config)
	if err != nil {
		return nil, fmt.Errorf("open a pool: %w", err)
	}
	d.pools = append(d.pools, pool)
	return pool, nil
}

// protect returns a middleware over a store with its own pool.
func (d *stand) protect(ctx context.Context, schema string) (*middleware.Middleware, error) {
	opts := &postgres.Options{Schema: schema, AcquireTimeout: acquireTimeout}
	pool, err := d.open(ctx, opts)
	if err != nil {
		return nil, err
	}
	store := postgres.New(pool, opts)
	if err := store.Check(ctx); err != nil {
		return nil, err
	}
	return middleware.New(store, func(*http.Request) (string, error) { return scope, nil }, &middleware.Options{
		RouterState: chiroute.State,
	}), nil
}

// mount adds the routes of one schema.
func (d *stand) mount(ctx context.Context, schema string, pool *pgxpool.Pool) error {
	at := func(name string) string { return "/" + schema + "/" + name }
	post := func(name string, run func(r *http.Request, t *transfer, body []byte) (*answer, error), around ...func(http.Handler) http.Handler) {
		if d.wants(name) {
			d.router.With(around...).Post(at(name), handler(run))
		}
	}
	bare := func(f form) func(r *http.Request, t *transfer, _ []byte) (*answer, error) {
		return func(r *http.Request, t *transfer, _ []byte) (*answer, error) {
			return committed(r.Context(), pool, func(tx pgx.Tx) (*answer, error) { return f(r.Context(), tx, t) })
		}
	}
	given := func(f form) func(r *http.Request, t *transfer, _ []byte) (*answer, error) {
		return func(r *http.Request, t *transfer, _ []byte) (*answer, error) {
			return f(r.Context(), postgres.Tx(r.Context()), t)
		}
	}
	post("bare-naive", bare(naive))
	post("bare-batch", bare(batch))
	d.router.Post(at(routeMade), handler(bare(batch)))
	post("bare-folded", func(r *http.Request, t *transfer, _ []byte) (*answer, error) { return folded(r.Context(), pool, t) })
	post("insert-first", func(r *http.Request, t *transfer, body []byte) (*answer, error) {
		return insertFirst(r.Context(), pool, r.Header.Get("Idempotency-Key"), sumOf(r, body), t)
	})
	post("lease", func(r *http.Request, t *transfer, body []byte) (*answer, error) {
		return lease(r.Context(), pool, r.Header.Get("Idempotency-Key"), sumOf(r, body), t)
	})
	if d.wants("ours-naive", "ours-batch", "ours-deferred", "replay-database", replayOld, routeWait, routeOther) {
		ours, err := d.protect(ctx, schema)
		if err != nil {
			return err
		}
		post("ours-naive", given(naive), ours.Handler)
		post("ours-batch", given(batch), ours.Handler)
		post("ours-deferred", given(deferred), ours.Handler)
		post("replay-database", given(batch), ours.Handler)
		post(replayOld, given(batch), ours.Handler)
		post(routeOther, given(batch), ours.Handler)
		post(routeWait, d.slowly(given(batch)), d.holders.mark, ours.With(func(o *middleware.Options) { o.Wait = waitMax }).Handler)
	}
	d.router.Get(at("get-by-id")+"/{id}", func(w http.ResponseWriter, r *http.Request) {
		a, err := get(r.Context(), pool, chi.URLParam(r, "id"))
		respond(w, r, a, err)
	})
	example := transfer{From: "acct-0000", To: "acct-0001", Amount: 5, Currency: "EUR", Reference: referenceOf(0)}
	constant, err := example.answer(nextID(), time.Now())
	if err != nil {
		return err
	}
	constant.Status, constant.Location = http.StatusOK, ""
	d.router.Get(at("no-database"), func(w http.ResponseWriter, r *http.Request) { respond(w, r, constant, nil) })
	return nil
}

func handler(run func(r *http.Request, t *transfer, body []byte) (*answer, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, err := readBody(r)
		var t *transfer
		if err == nil {
			t, err = decodeTransfer(body)
		}
		var a *answer
		if err == nil {
			a, err = run(r, t, body)
		}
		respond(w, r, a, err)
	}
}

func respond(w http.ResponseWriter, r *http.Request, a *answer, err error) {
	switch {
	case err == nil:
		a.write(w)
	case errors.Is(err, errInProgress):
		http.Error(w, "in progress", http.StatusConflict)
	case errors.Is(err, errChanged):
		http.Error(w, "another body", http.StatusUnprocessableEntity)
	default:
		slog.WarnContext(r.Context(), "request failed", "error", err)
		http.Error(w, "failed", http.StatusInternalServerError)
	}
}

// slowly counts a handler's runs and delays each.
func (d *stand) slowly(run func(*http.Request, *transfer, []byte) (*answer, error)) func(*http.Request, *transfer, []byte) (*answer, error) {
	return func(r *http.Request, t *transfer, body []byte) (*answer, error) {
		d.runs.Add(1)
		select {
		case <-time.After(waitWork):
		case <-r.Context().Done():
			return nil, r.Context().Err()
		}
		return run(r, t, body)
	}
}

// warm opens all of a pool's conns, and makes each prepare the designs' statements.
func (d *stand) warm(ctx context.Context, pool *pgxpool.Pool, plain bool) error {
	var conns []*pgxpool.Conn
	defer func() {
		for _, conn := range conns {
			conn.Release()
		}
	}()
	for range d.setting.PoolSize {
		conn, err := pool.Acquire(ctx)
		if err != nil {
			return err
		}
		conns = append(conns, conn)
		if err := warmConn(ctx, conn, plain); err != nil {
			return err
		}
	}
	return nil
}

// warmConn sends the designs' statements, and rolls back.
func warmConn(ctx context.Context, conn *pgxpool.Conn, plain bool) error {
	tx, err := conn.Begin(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(ctx) }() // after the rollback below there is nothing to undo
	t := &transfer{From: "acct-0000", To: "acct-0001", Amount: 1, Currency: "EUR"}
	a, err := naive(ctx, tx, t)
	if err != nil {
		return err
	}
	if !plain {
		return tx.Rollback(ctx)
	}
	if _, err := get(ctx, tx, t.ID); err != nil {
		return err
	}
	for _, one := range []struct {
		sql       string
		arguments []any
	}{
		{sqlInsertFirst, []any{scope, "warm", []byte("warm")}},
		{sqlUpdateLast, []any{scope, "warm", a.Status, a.Location, a.Body}},
		{sqlLeaseClaim, []any{scope, "warm", []byte("warm")}},
		{sqlLeaseStore, []any{scope, "warm", a.Status, a.Location, a.Body}},
	} {
		if _, err := tx.Exec(ctx, one.sql, one.arguments...); err != nil {
			return err
		}
	}
	if err := tx.Rollback(ctx); err != nil {
		return err
	}
	var ends pgx.Batch
	ends.Queue("BEGIN")
	ends.Queue("COMMIT")
	return conn.SendBatch(ctx, &ends).Close()
}
