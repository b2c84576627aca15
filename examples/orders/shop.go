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
	"github.com/paidonce/idempotency/effect"
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
	INSERT INTO shop.stock VALUES ('tea', 450, 1000), ('cup', 1200, 1) ON CONFLICT DO NOTHING`

type shop struct {
	pool   *pgxpool.Pool
	ids    *nodeid.Source // makes ids of orders that no other replica makes
	charge *effect.Declared[payment, charge]
}

// reserved is an order that is not paid yet.
type reserved struct {
	Order int64 `json:"order"`
	Total int64 `json:"total"`
}

var errOutOfStock = errors.New("out of stock")

// order reserves the goods, charges the card, and writes the payment. The call to the payment
// service is between two commits, so it holds neither a connection nor a lock. A later run, for the
// client or after a crash, finds the reservation and the charge.
func (s *shop) order(w http.ResponseWriter, r *http.Request) {
	var o struct {
		SKU      string `json:"sku"`
		Quantity int64  `json:"quantity"`
		Card     string `json:"card"`
	}
	if err := json.NewDecoder(r.Body).Decode(&o); err != nil || o.Quantity < 1 || o.Quantity > 100 || len(o.Card) > 100 {
		writeProblem(w, http.StatusBadRequest, "send a sku, a quantity from 1 to 100 and a card")
		return
	}
	ctx := r.Context()
	key, _ := idempotency.KeyFrom(ctx) // not the caller: a run without a client has only the key

	order, err := postgres.Phase(ctx, "reserve", func(tx pgx.Tx) (order reserved, err error) {
		if order.Order, err = s.ids.Next(); err != nil {
			return order, err
		}
		err = tx.QueryRow(ctx, `
			WITH taken AS (
				UPDATE shop.stock SET quantity = quantity - $3 WHERE sku = $2 AND quantity >= $3 RETURNING price)
			INSERT INTO shop.orders (id, account, sku, quantity, total) SELECT $4, $1, $2, $3, price * $3 FROM taken
			RETURNING total`, key.Scope, o.SKU, o.Quantity, order.Order).Scan(&order.Total)
		if errors.Is(err, pgx.ErrNoRows) {
			err = errOutOfStock
		}
		return order, err
	})
	switch {
	case errors.Is(err, errOutOfStock):
		writeProblem(w, http.StatusConflict, "there is not enough in stock")
		return
	case err != nil: // nothing was reserved
		writeProblem(w, http.StatusServiceUnavailable, "the order failed: send it again with the same key")
		return
	}

	paid, err := s.charge.Call(ctx, payment{Card: o.Card, Amount: order.Total})
	switch {
	case errors.Is(err, effect.ErrDeclined):
		if err := s.release(ctx, order.Order); err != nil {
			return // a later run releases the goods
		}
		writeProblem(w, http.StatusPaymentRequired, "the card was declined")
		return
	case err != nil:
		return // not settled: the middleware answers, and the request goes on without us
	}

	// This is committed with the answer. The charged amount is booked.
	tx := postgres.Tx(ctx)
	if _, err := tx.Exec(ctx, "INSERT INTO shop.payments (order_id, charge, amount) VALUES ($1, $2, $3)", order.Order, paid.Name, paid.Amount); err != nil {
		writeProblem(w, http.StatusInternalServerError, "the payment is not booked yet")
		return
	}
	id := strconv.FormatInt(order.Order, 10) // a string: JavaScript's numbers have too few digits
	w.Header().Set("Location", "/orders/"+id)
	writeJSON(w, http.StatusCreated, map[string]any{"order": id, "total": paid.Amount, "charge": paid.Name})
}

// release puts the goods of an order back, in a commit of its own: a 4xx undoes the writes of the
// last phase.
func (s *shop) release(ctx context.Context, order int64) error {
	_, err := postgres.Phase(ctx, "release", func(tx pgx.Tx) (struct{}, error) {
		_, err := tx.Exec(ctx, `
			WITH released AS (DELETE FROM shop.orders WHERE id = $1 RETURNING sku, quantity)
			UPDATE shop.stock SET quantity = stock.quantity + released.quantity FROM released WHERE stock.sku = released.sku`, order)
		return struct{}{}, err
	})
	return err
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
