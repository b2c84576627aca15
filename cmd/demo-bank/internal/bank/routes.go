package bank

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
)

// Limits of a page of a list.
const (
	PageLimitDefault = 50
	PageLimitMax     = 1000
)

// Where transfers are sent to, with the middleware and without.
const (
	TransfersPath            = "/v1/transfers"
	UnprotectedTransfersPath = "/v1/unprotected/transfers"
)

// auditTimeout bounds an audit: it reads all books, and must not hold a connection for longer than anybody waits.
const auditTimeout = 20 * time.Second

// Mount puts the bank's requests on a router. protect is the idempotency middleware of those that need a key.
//
// Where protect is nil the middleware is left out of the route: each request runs as it comes, in a transaction of its
// own, and its rows carry the key of its header. That is for showing what the middleware is good for.
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
	})
}

// stamp is what a request's rows say about where they came from. It is empty for a request without a key.
type stamp struct {
	scope, key *string
	attempt    *[16]byte
}

// stampOfAttempt is the stamp of the attempt that runs with this context.
func stampOfAttempt(ctx context.Context) stamp {
	key, keyed := idempotency.KeyFrom(ctx)
	id, running := idempotency.AttemptIDFrom(ctx)
	if !keyed || !running {
		return stamp{}
	}
	attempt := [16]byte(id)
	return stamp{scope: &key.Scope, key: &key.Value, attempt: &attempt}
}

// stampOfHeader is the stamp of a request that no middleware looked at.
func stampOfHeader(r *http.Request) stamp {
	key := r.Header.Get("Idempotency-Key")
	scope, err := Tenant(r)
	if key == "" || err != nil {
		return stamp{}
	}
	return stamp{scope: &scope, key: &key}
}

// answer is what a request that writes has to say when all went well.
type answer struct {
	status   int
	location string
	body     any
}

func (a *answer) write(w http.ResponseWriter) {
	w.Header().Set("Location", a.location)
	WriteJSON(w, a.status, a.body)
}

// work is what a request writes, in whichever transaction it is given.
type work func(ctx context.Context, tx pgx.Tx, s stamp) (*answer, error)

// decodeFunc reads a request's body. It asks no database.
type decodeFunc func(body []byte) (work, error)

// inGivenTransaction answers a request in the middleware's transaction, which commits the answer together with what
// was written.
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

// inOwnTransaction answers a request in a transaction of its own, as a service without the middleware does: a retry
// runs again.
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

// rollbackTimeout bounds ROLLBACK, on a context of its own.
const rollbackTimeout = 2 * time.Second

// commit runs work in a transaction from the pool.
func (b *Bank) commit(ctx context.Context, do work, s stamp) (*answer, error) {
	tx, err := b.pool.Begin(ctx)
	if err != nil {
		return nil, fmt.Errorf("begin: %w", err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackTimeout)
		defer cancel()
		_ = tx.Rollback(ctx) // after a commit there is nothing to undo; else the connection's end does the same
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

// get answers with the one thing that the path names.
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

// pageLimit reads the limit of a page.
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

// cutPage cuts a list that was read one longer than the page, and returns what to pass as `after` for the next page:
// nil after the last.
func cutPage[T any](list []T, limit int, id func(T) string) (page []T, next *string) {
	if len(list) <= limit {
		return list, nil
	}
	last := id(list[limit-1])
	return list[:limit], &last
}
