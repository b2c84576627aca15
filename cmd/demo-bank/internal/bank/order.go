package bank

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
)

// merchant is the account that receives the payments for orders. The first order opens it.
const merchant = "merchant"

// Order is an order as clients see it. Money is in minor units.
type Order struct {
	ID        string    `json:"id"`
	Account   string    `json:"account"`
	SKU       string    `json:"sku"`
	Quantity  int64     `json:"quantity"`
	Amount    int64     `json:"amount"`
	Currency  string    `json:"currency"`
	CreatedAt time.Time `json:"created_at"`
}

// Product is a product that can be ordered.
type Product struct {
	SKU      string `json:"sku"`
	Name     string `json:"name"`
	Price    int64  `json:"price"`
	Currency string `json:"currency"`
	Stock    int64  `json:"stock"`
}

func invalidOrder(detail string) *Problem { return invalid("invalid-order", detail) }

// decodeOrder reads the body of POST /v1/orders.
func (b *Bank) decodeOrder(body []byte) (work, error) {
	var account, sku text
	var quantity integer
	if err := decodeObject(body, "invalid-order", map[string]json.Unmarshaler{
		"account": &account, "sku": &sku, "quantity": &quantity,
	}); err != nil {
		return nil, err
	}
	switch {
	case account == "" || sku == "":
		return nil, invalidOrder("account and sku must be given.")
	case account == merchant:
		return nil, invalidOrder("The merchant can't order from itself.")
	case !quantity.set || quantity.value <= 0:
		return nil, invalidOrder("quantity must be a positive integer.")
	case !validAccountID(string(account)):
		return nil, accountNotFound()
	case !validAccountID(string(sku)): // a sku has the same form
		return nil, productNotFound()
	}
	o := Order{Account: string(account), SKU: string(sku), Quantity: quantity.value}
	return func(ctx context.Context, tx pgx.Tx, s stamp) (*answer, error) { return b.order(ctx, tx, s, o) }, nil
}

// order takes stock, moves the price from the account to the merchant and writes the order, in the
// given transaction and two round trips: one locks and reads, one writes. Every order locks the
// product before the accounts.
func (b *Bank) order(ctx context.Context, tx pgx.Tx, s stamp, o Order) (*answer, error) {
	var price, stock int64
	locked := make(map[string]lockedAccount, 2)
	var look pgx.Batch
	look.Queue(`SELECT price, currency, stock FROM products WHERE sku = $1 FOR NO KEY UPDATE`, o.SKU).
		QueryRow(func(row pgx.Row) error { return row.Scan(&price, &o.Currency, &stock) })
	// Opened here and not by the seed, which holds only customers. If the row exists, this takes no
	// lock.
	look.Queue(`
		INSERT INTO accounts (id, currency, opening_balance, balance) VALUES ($1, 'EUR', 0, 0)
		ON CONFLICT (id) DO NOTHING`, merchant)
	look.Queue(lockAccounts, o.Account, merchant).Query(readLocked(locked))
	err := tx.SendBatch(ctx, &look).Close()
	switch {
	// Of the product: missing accounts cause no error here.
	case errors.Is(err, pgx.ErrNoRows):
		return nil, productNotFound()
	case err != nil:
		return nil, fmt.Errorf("lock product and accounts: %w", err)
	}
	account, found := locked[o.Account]
	switch {
	case !found:
		return nil, accountNotFound()
	case account.currency != o.Currency || locked[merchant].currency != o.Currency:
		return nil, invalidOrder("The account's currency differs from that of the product.")
	case stock < o.Quantity:
		return nil, refusal(http.StatusConflict, "out-of-stock", "Out of stock", "The stock is lower than the quantity.")
	case o.Quantity > math.MaxInt64/price || account.balance < o.Quantity*price:
		return nil, insufficientFunds()
	case locked[merchant].balance > math.MaxInt64-o.Quantity*price:
		return nil, balanceLimit()
	}
	o.Amount = o.Quantity * price

	id, err := b.ids.Next()
	if err != nil {
		return nil, fmt.Errorf("make an order id: %w", err)
	}
	var write pgx.Batch
	write.Queue(`UPDATE products SET stock = stock - $2 WHERE sku = $1`, o.SKU, o.Quantity)
	write.Queue(moveBalance, o.Account, merchant, o.Amount)
	write.Queue(`
		INSERT INTO orders (id, account, sku, quantity, amount, currency, scope, key, attempt_id, message_id)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
		RETURNING created_at`,
		id, o.Account, o.SKU, o.Quantity, o.Amount, o.Currency, s.scope, s.key, s.attempt, s.message).
		QueryRow(func(row pgx.Row) error { return row.Scan(&o.CreatedAt) })
	write.Queue(`
		INSERT INTO entries (order_id, account, amount) VALUES ($1, $2, -$4::bigint), ($1, $3, $4)`,
		id, o.Account, merchant, o.Amount)
	if err := tx.SendBatch(ctx, &write).Close(); err != nil {
		return nil, fmt.Errorf("write the order: %w", err)
	}
	o.ID, o.CreatedAt = strconv.FormatInt(id, 10), o.CreatedAt.UTC()
	if err := publish(ctx, s, orderEvent, o.Account, o); err != nil {
		return nil, err
	}
	return &answer{status: http.StatusCreated, location: "/v1/orders/" + o.ID, body: o}, nil
}

func productNotFound() *Problem {
	return notFound("product-not-found", "There is no product with this sku.")
}

// oneOrder reads an order by its id. The error is an `order-not-found` problem if there is none.
func (b *Bank) oneOrder(ctx context.Context, id string) (*Order, error) {
	absent := notFound("order-not-found", "There is no order with this id.")
	number, err := parseID(id)
	if err != nil {
		return nil, absent
	}
	o := Order{ID: id}
	err = b.pool.QueryRow(ctx, `
		SELECT account, sku, quantity, amount, currency, created_at FROM orders WHERE id = $1`, number).
		Scan(&o.Account, &o.SKU, &o.Quantity, &o.Amount, &o.Currency, &o.CreatedAt)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil, absent
	case err != nil:
		return nil, fmt.Errorf("read order: %w", err)
	}
	o.CreatedAt = o.CreatedAt.UTC()
	return &o, nil
}

// products reads all products.
func (b *Bank) products(ctx context.Context) ([]Product, error) {
	rows, err := b.pool.Query(ctx, `SELECT sku, name, price, currency, stock FROM products ORDER BY sku`)
	if err != nil {
		return nil, fmt.Errorf("list products: %w", err)
	}
	products, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (p Product, err error) {
		err = row.Scan(&p.SKU, &p.Name, &p.Price, &p.Currency, &p.Stock)
		return p, err
	})
	if err != nil {
		return nil, fmt.Errorf("list products: %w", err)
	}
	return products, nil
}
