package main

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/nodeid"
	"github.com/paidonce/idempotency/storage/postgres"
)

const schema = `
	CREATE SCHEMA IF NOT EXISTS shop;
	CREATE TABLE IF NOT EXISTS shop.stock (
		sku text PRIMARY KEY, price bigint NOT NULL, quantity bigint NOT NULL CHECK (quantity >= 0));
	CREATE TABLE IF NOT EXISTS shop.orders (
		id bigint PRIMARY KEY, account text NOT NULL,
		sku text NOT NULL REFERENCES shop.stock, quantity bigint NOT NULL, total bigint NOT NULL);
	CREATE TABLE IF NOT EXISTS shop.payments (
		order_id bigint PRIMARY KEY REFERENCES shop.orders, charge text NOT NULL UNIQUE, amount bigint NOT NULL);
	INSERT INTO shop.stock VALUES ('tea', 450, 10), ('cup', 1200, 1) ON CONFLICT DO NOTHING`

type shop struct {
	pool     *pgxpool.Pool
	ids      *nodeid.Source // of orders: no other replica makes the same id
	payments *paymentClient
}

// order takes the goods from stock, writes the order, charges the card and writes the payment. The
// three writes are in the middleware's transaction. The charge is not, so it comes after everything
// else that can fail because of the client, and it has a key of its own.
func (s *shop) order(w http.ResponseWriter, r *http.Request) {
	var o struct {
		SKU      string `json:"sku"`
		Quantity int64  `json:"quantity"`
		Card     string `json:"card"`
	}
	if err := json.NewDecoder(r.Body).Decode(&o); err != nil || o.Quantity < 1 || o.Quantity > 100 {
		writeProblem(w, http.StatusBadRequest, "send a sku, a quantity from 1 to 100 and a card")
		return
	}
	order, err := s.ids.Next()
	if err != nil { // before the charge, so that the middleware can prove that nothing happened
		writeProblem(w, http.StatusServiceUnavailable, "no order number can be made now: send the order again with the same key")
		return
	}
	ctx := r.Context()
	tx := postgres.Tx(ctx)
	key, _ := idempotency.KeyFrom(ctx)
	chargeKey := idempotency.DerivedKey(ctx, "charge") // the same in every attempt at this order

	var total int64
	err = tx.QueryRow(ctx, `
		WITH taken AS (
			UPDATE shop.stock SET quantity = quantity - $3 WHERE sku = $2 AND quantity >= $3 RETURNING price)
		INSERT INTO shop.orders (id, account, sku, quantity, total) SELECT $4, $1, $2, $3, price * $3 FROM taken
		RETURNING total`, key.Scope, o.SKU, o.Quantity, order).Scan(&total)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		s.declineOutOfStock(ctx, w, chargeKey)
		return
	case err != nil:
		writeProblem(w, http.StatusInternalServerError, "the order failed")
		return
	}

	charge, err := s.payments.charge(ctx, chargeKey, o.Card, total)
	switch {
	case errors.Is(err, errCardDeclined):
		writeProblem(w, http.StatusPaymentRequired, "the card was declined")
		return
	case err != nil:
		// Not a 4xx, which would be recorded: the card may have been charged, and the retry finds
		// out.
		writeProblem(w, http.StatusServiceUnavailable, "the payment service did not answer: your card may have been charged, so send the order again with the same key")
		return
	}

	if _, err := tx.Exec(ctx, "INSERT INTO shop.payments (order_id, charge, amount) VALUES ($1, $2, $3)", order, charge, total); err != nil {
		writeProblem(w, http.StatusInternalServerError, "the order failed: send it again with the same key")
		return
	}
	id := strconv.FormatInt(order, 10) // a string: JavaScript's numbers have too few digits
	w.Header().Set("Location", "/orders/"+id)
	writeJSON(w, http.StatusCreated, map[string]any{"order": id, "total": total, "charge": charge})
}

// declineOutOfStock answers 409, which is recorded. An earlier attempt at this order may have found
// the goods, charged the card and lost the answer, so that charge is canceled first.
func (s *shop) declineOutOfStock(ctx context.Context, w http.ResponseWriter, chargeKey string) {
	if err := s.payments.cancel(ctx, chargeKey); err != nil {
		writeProblem(w, http.StatusServiceUnavailable, "the payment service did not answer: send the order again with the same key")
		return
	}
	writeProblem(w, http.StatusConflict, "there is not enough in stock")
}

// stock only reads: it is outside the middleware and uses the pool.
func (s *shop) stock(w http.ResponseWriter, r *http.Request) {
	type item struct {
		SKU      string `json:"sku"`
		Price    int64  `json:"price"`
		Quantity int64  `json:"quantity"`
	}
	rows, err := s.pool.Query(r.Context(), "SELECT sku, price, quantity FROM shop.stock ORDER BY sku")
	if err != nil {
		writeProblem(w, http.StatusInternalServerError, "the stock can't be read")
		return
	}
	items, err := pgx.CollectRows(rows, pgx.RowToStructByPos[item])
	if err != nil {
		writeProblem(w, http.StatusInternalServerError, "the stock can't be read")
		return
	}
	writeJSON(w, http.StatusOK, items)
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // a client that is gone will retry
}

func writeProblem(w http.ResponseWriter, status int, detail string) {
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{"title": http.StatusText(status), "status": status, "detail": detail})
}
