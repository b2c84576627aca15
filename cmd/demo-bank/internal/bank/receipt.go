package bank

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"unicode/utf8"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/storage/postgres"
)

// AddressRunesMax is the maximum length of a receipt's address, in characters.
const AddressRunesMax = 320

// Receipt is a receipt as clients see it.
type Receipt struct {
	ID       string `json:"id"`
	Transfer string `json:"transfer"`
	Sent     string `json:"sent"` // yes, or maybe: it was sent once at most
}

// decodeReceipt reads the body of POST /v1/receipts.
func (b *Bank) decodeReceipt(body []byte) (call, error) {
	const slug = "invalid-receipt"
	var transfer, to text
	if err := decodeObject(body, slug, map[string]json.Unmarshaler{"transfer": &transfer, "to": &to}); err != nil {
		return nil, err
	}
	number, err := parseID(string(transfer))
	switch {
	case transfer == "" || to == "":
		return nil, invalid(slug, "transfer and to must be given.")
	case utf8.RuneCountInString(string(to)) > AddressRunesMax:
		return nil, invalid(slug, fmt.Sprintf("to must be at most %d characters.", AddressRunesMax))
	case err != nil:
		return nil, transferNotFound()
	}
	letter := mail{To: string(to), Text: "Receipt of transfer " + string(transfer) + "."}
	return func(ctx context.Context) (*answer, error) { return b.receipt(ctx, number, letter) }, nil
}

// receipt sends a mail, and records whether it was surely sent.
func (b *Bank) receipt(ctx context.Context, transfer int64, letter mail) (*answer, error) {
	if !idempotency.Resumed(ctx) { // transfers stay
		apart, cancel := apart(ctx)
		defer cancel()
		if _, err := b.oneTransfer(apart, strconv.FormatInt(transfer, 10)); err != nil {
			return nil, err
		}
	}
	sent := "yes"
	_, err := b.processor.mail.Call(ctx, letter)
	switch {
	case errors.Is(err, effect.ErrMaybe), errors.Is(err, effect.ErrDeclined): // declined: it could not be sent
		sent = "maybe"
	case err != nil:
		return nil, unsettled(err)
	}
	id, err := b.ids.Next()
	if err != nil {
		return nil, fmt.Errorf("make a receipt id: %w", err)
	}
	s := stampOfAttempt(ctx)
	if _, err := postgres.Tx(ctx).Exec(ctx, `
		INSERT INTO receipts (id, transfer_id, sent, scope, key, attempt_id) VALUES ($1, $2, $3, $4, $5, $6)`,
		id, transfer, sent, s.scope, s.key, s.attempt); err != nil {
		return nil, fmt.Errorf("write the receipt: %w", err)
	}
	return &answer{status: http.StatusCreated, body: Receipt{ID: strconv.FormatInt(id, 10), Transfer: strconv.FormatInt(transfer, 10), Sent: sent}}, nil
}
