package bank

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Limits of a page of a list.
const (
	PageLimitDefault = 50
	PageLimitMax     = 1000
)

// Paths of transfers, with and without the middleware.
const (
	TransfersPath            = "/v1/transfers"
	UnprotectedTransfersPath = "/v1/unprotected/transfers"
)

// Paths of requests that call the processor.
const (
	TopUpsPath   = "/v1/topups"
	PayoutsPath  = "/v1/payouts"
	ReceiptsPath = "/v1/receipts"

	// OperationsPath is followed by the id of an open request.
	OperationsPath = "/v1/operations/"
)

// auditTimeout limits an audit, which reads all books: it must not hold a conn longer than its
// client waits.
const auditTimeout = 20 * time.Second

// Mount adds the bank's routes to a router. protect is the idempotency middleware for the routes
// that need a key.
//
// If protect is nil, these routes have no middleware: each request runs in a transaction of its
// own, and its rows carry the key from its header. Tests use that to show what the middleware
// prevents.
func (b *Bank) Mount(r chi.Router, protect func(http.Handler) http.Handler) {
	keyed := func(pattern string, decode decodeFunc) {
		if protect == nil {
			r.With(b.requireTenant).Post(pattern, b.inOwnTransaction(decode, stampOfHeader))
			return
		}
		r.With(protect).Post(pattern, b.inGivenTransaction(decode))
	}
	keyed("/v1/accounts", b.decodeAccount)
	keyed(TransfersPath, b.decodeTransfer)
	keyed("/v1/orders", b.decodeOrder)

	r.Group(func(r chi.Router) {
		r.Use(b.requireTenant)
		noStamp := func(*http.Request) stamp { return stamp{} }
		r.Post(UnprotectedTransfersPath, b.inOwnTransaction(b.decodeTransfer, noStamp))
		r.Get("/v1/accounts", b.getAccounts)
		r.Get("/v1/accounts/{id}", b.get(func(ctx context.Context, id string) (any, error) { return b.account(ctx, id) }))
		r.Get("/v1/transfers", b.getTransfers)
		r.Get("/v1/transfers/{id}", b.get(func(ctx context.Context, id string) (any, error) { return b.oneTransfer(ctx, id) }))
		r.Get("/v1/orders/{id}", b.get(func(ctx context.Context, id string) (any, error) { return b.oneOrder(ctx, id) }))
		r.Get("/v1/products", b.getProducts)
		r.Get("/v1/audit", b.getAudit)
		b.mountMessages(r)
	})
}

// MountCalls adds the routes that call the processor. resumable returns the idempotency middleware
// for a route with this Resumable name.
func (b *Bank) MountCalls(r chi.Router, resumable func(name string) func(http.Handler) http.Handler) {
	r.With(resumable("topup/1")).Post(TopUpsPath, b.calling(b.decodeTopUp))
	r.With(resumable("payout/1")).Post(PayoutsPath, b.calling(b.decodePayout))
	r.With(resumable("receipt/1")).Post(ReceiptsPath, b.calling(b.decodeReceipt))
}

// stamp identifies the request that wrote a row. It is empty for a request without a key.
type stamp struct {
	scope, key *string
	attempt    *[16]byte
	message    *string // id of the message that the request publishes, if it publishes one
}

// stampOfAttempt returns the stamp of the attempt that runs with this context.
func stampOfAttempt(ctx context.Context) stamp {
	key, keyed := idempotency.KeyFrom(ctx)
	id, running := idempotency.AttemptIDFrom(ctx)
	if !keyed || !running {
		return stamp{}
	}
	attempt, published := [16]byte(id), message.ID(ctx, eventName)
	return stamp{scope: &key.Scope, key: &key.Value, attempt: &attempt, message: &published}
}

// stampOfHeader returns the stamp of a request that bypassed the middleware. It has no attempt.
func stampOfHeader(r *http.Request) stamp {
	key := r.Header.Get("Idempotency-Key")
	scope, err := Tenant(r)
	if key == "" || err != nil {
		return stamp{}
	}
	return stamp{scope: &scope, key: &key}
}

// answer is the answer to a successful request that writes.
type answer struct {
	status   int
	location string // empty if nothing can be read there
	body     any
}

func (a *answer) write(w http.ResponseWriter) {
	if a.location != "" {
		w.Header().Set("Location", a.location)
	}
	WriteJSON(w, a.status, a.body)
}

// work writes the effects of a request in the given transaction.
type work func(ctx context.Context, tx pgx.Tx, s stamp) (*answer, error)

// decodeFunc reads a request's body. It does not use the database.
type decodeFunc func(body []byte) (work, error)

// inGivenTransaction runs a request in the middleware's transaction, which commits the answer
// together with the writes.
func (b *Bank) inGivenTransaction(decode decodeFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		ctx := r.Context()
		a, err := decodeAnd(r, decode, func(do work) (*answer, error) {
			return do(ctx, postgres.Tx(ctx), stampOfAttempt(ctx))
		})
		if err != nil {
			b.writeError(w, r, err)
			return
		}
		a.write(w)
	}
}

// call carries out a request that calls the processor, in as many transactions as it needs.
type call func(ctx context.Context) (*answer, error)

// errUnsettled is the error of a request that can't be answered yet: it stays open.
var errUnsettled = errors.New("the request is not settled")

func unsettled(err error) error { return fmt.Errorf("%w: %w", errUnsettled, err) }

// apart returns the context of a read before a call. It has no attempt, because with an attempt the
// pool would refuse a connection. It has the handler's deadline, or readTimeout.
func apart(ctx context.Context) (context.Context, context.CancelFunc) {
	deadline, ok := ctx.Deadline()
	if !ok {
		return context.WithTimeout(context.Background(), readTimeout)
	}
	return context.WithDeadline(context.Background(), deadline)
}

// readTimeout limits a read before a call if the handler has no deadline.
const readTimeout = 5 * time.Second

// calling runs a request that calls the processor. If it is not settled, the middleware answers.
func (b *Bank) calling(decode func(body []byte) (call, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		body, err := readBody(r.Body)
		var do call
		if err == nil {
			do, err = decode(body)
		}
		var a *answer
		if err == nil {
			a, err = do(r.Context())
		}
		switch {
		case errors.Is(err, errUnsettled): // whatever is written now is dropped
		case err != nil:
			b.writeError(w, r, err)
		default:
			a.write(w)
		}
	}
}

// inOwnTransaction runs a request in a transaction of its own, like a service without the
// middleware: a retry runs again.
func (b *Bank) inOwnTransaction(decode decodeFunc, stampOf func(*http.Request) stamp) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		a, err := decodeAnd(r, decode, func(do work) (*answer, error) {
			return b.commit(r.Context(), do, stampOf(r))
		})
		if err != nil {
			b.writeError(w, r, err)
			return
		}
		a.write(w)
	}
}

func decodeAnd(r *http.Request, decode decodeFunc, run func(work) (*answer, error)) (*answer, error) {
	body, err := readBody(r.Body)
	if err != nil {
		return nil, err
	}
	do, err := decode(body)
	if err != nil {
		return nil, err
	}
	return run(do)
}

// rollbackTimeout limits a ROLLBACK, which has a context of its own.
const rollbackTimeout = 2 * time.Second

// commit runs work in a new transaction from the pool, and commits it.
func (b *Bank) commit(ctx context.Context, do work, s stamp) (*answer, error) {
	tx, err := b.pool.Begin(ctx)
	if err != nil {
		return nil, fmt.Errorf("begin: %w", err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackTimeout)
		defer cancel()
		// A no-op after COMMIT. If it fails, PostgreSQL rolls back when the conn closes.
		_ = tx.Rollback(ctx)
	}()
	a, err := do(ctx, tx, s)
	if err != nil {
		return nil, err
	}
	if err := tx.Commit(ctx); err != nil {
		return nil, fmt.Errorf("commit: %w", err)
	}
	return a, nil
}

// get answers with the value that read returns for the id in the path.
func (b *Bank) get(read func(ctx context.Context, id string) (any, error)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		value, err := read(r.Context(), chi.URLParam(r, "id"))
		if err != nil {
			b.writeError(w, r, err)
			return
		}
		WriteJSON(w, http.StatusOK, value)
	}
}

func (b *Bank) getAccounts(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	limit, err := pageLimit(query)
	after := query.Get("after")
	if err == nil && after != "" && !validAccountID(after) {
		err = invalid("invalid-page", "after must be the id of an account.")
	}
	var accounts []Account
	if err == nil {
		accounts, err = b.accounts(r.Context(), after, limit+1)
	}
	if err != nil {
		b.writeError(w, r, err)
		return
	}
	accounts, next := cutPage(accounts, limit, func(a Account) string { return a.ID })
	WriteJSON(w, http.StatusOK, struct {
		Accounts []Account `json:"accounts"`
		Next     *string   `json:"next"`
	}{accounts, next})
}

func (b *Bank) getTransfers(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	limit, err := pageLimit(query)
	account := query.Get("account")
	if err == nil && account != "" && !validAccountID(account) {
		err = invalid("invalid-page", "account must be the id of an account.")
	}
	after := int64(-1)
	if text := query.Get("after"); err == nil && text != "" {
		if after, err = parseID(text); err != nil {
			err = invalid("invalid-page", "after must be the id of a transfer.")
		}
	}
	var transfers []Transfer
	if err == nil {
		transfers, err = b.transfers(r.Context(), account, after, limit+1)
	}
	if err != nil {
		b.writeError(w, r, err)
		return
	}
	transfers, next := cutPage(transfers, limit, func(t Transfer) string { return t.ID })
	WriteJSON(w, http.StatusOK, struct {
		Transfers []Transfer `json:"transfers"`
		Next      *string    `json:"next"`
	}{transfers, next})
}

func (b *Bank) getProducts(w http.ResponseWriter, r *http.Request) {
	products, err := b.products(r.Context())
	if err != nil {
		b.writeError(w, r, err)
		return
	}
	WriteJSON(w, http.StatusOK, struct {
		Products []Product `json:"products"`
	}{products})
}

func (b *Bank) getAudit(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), auditTimeout)
	defer cancel()
	audit, err := b.Audit(ctx)
	if err != nil {
		b.writeError(w, r, err)
		return
	}
	w.Header().Set("Cache-Control", "no-store")
	WriteJSON(w, http.StatusOK, audit)
}

// pageLimit returns the limit of a page from the query.
func pageLimit(query url.Values) (int, error) {
	text := query.Get("limit")
	if text == "" {
		return PageLimitDefault, nil
	}
	limit, err := strconv.Atoi(text)
	if err != nil || limit < 1 || limit > PageLimitMax {
		return 0, invalid("invalid-page", fmt.Sprintf("limit must be an integer from 1 to %d.", PageLimitMax))
	}
	return limit, nil
}

// cutPage cuts list to the page; list was read with one item more than the limit. next is the
// `after` parameter of the next page, or nil for the last page.
func cutPage[T any](list []T, limit int, id func(T) string) (page []T, next *string) {
	if len(list) <= limit {
		return list, nil
	}
	last := id(list[limit-1])
	return list[:limit], &last
}
