package psp

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
	"unicode/utf8"
)

// Limits of the fields of requests, in characters.
const (
	AccountRunesMax   = 64 // a card or an IBAN
	ReferenceRunesMax = 140
	AddressRunesMax   = 320
	TextRunesMax      = 10_000
)

// order is a request that writes. Its JSON is the request's.
type order interface {
	// validate returns an error that tells the client which field is wrong.
	validate() error

	// refusal returns the status and code of a refusal, or an empty code. It is called with the
	// ledger's lock held.
	refusal(l *ledger) (status int, code string)

	// fill sets the status and the item of an entry that has its kind, key and time.
	fill(e *entry)
}

// newOrder returns an empty order of a kind.
func newOrder(k kind) order {
	switch k {
	case charges:
		return new(charge)
	case refunds:
		return new(refund)
	case payouts:
		return new(payout)
	default:
		return new(mail)
	}
}

type charge struct {
	Card      string `json:"card"`
	Amount    int64  `json:"amount"`
	Reference string `json:"reference"`
}

func (c *charge) validate() error {
	return errors.Join(given("card", c.Card, AccountRunesMax), positive(c.Amount), short("reference", c.Reference, ReferenceRunesMax))
}

func (c *charge) refusal(*ledger) (int, string) {
	if strings.HasSuffix(c.Card, refusedSuffix) {
		return http.StatusPaymentRequired, "card_declined"
	}
	return 0, ""
}

func (c *charge) fill(e *entry) {
	e.put(http.StatusCreated, "ch", func(id string) any {
		return struct {
			ID        string    `json:"id"`
			Card      string    `json:"card"`
			Amount    int64     `json:"amount"`
			Reference string    `json:"reference"`
			Key       string    `json:"key"`
			CreatedAt time.Time `json:"created_at"`
		}{id, c.Card, c.Amount, c.Reference, e.Key, e.At}
	})
}

type refund struct {
	Charge    string `json:"charge"`
	Amount    int64  `json:"amount"`
	Reference string `json:"reference"`
}

func (r *refund) validate() error {
	return errors.Join(given("charge", r.Charge, AccountRunesMax), positive(r.Amount), short("reference", r.Reference, ReferenceRunesMax))
}

// refusal does not compare amounts: a charge that is refunded twice must show in the audit.
func (r *refund) refusal(l *ledger) (int, string) {
	if !l.chargeID[r.Charge] {
		return http.StatusNotFound, "charge_not_found"
	}
	return 0, ""
}

func (r *refund) fill(e *entry) {
	e.put(http.StatusCreated, "re", func(id string) any {
		return struct {
			ID     string `json:"id"`
			Charge string `json:"charge"`
			Amount int64  `json:"amount"`
			Key    string `json:"key"`
		}{id, r.Charge, r.Amount, e.Key}
	})
}

type payout struct {
	IBAN      string `json:"iban"`
	Amount    int64  `json:"amount"`
	Reference string `json:"reference"`
}

func (p *payout) validate() error {
	return errors.Join(given("iban", p.IBAN, AccountRunesMax), positive(p.Amount), short("reference", p.Reference, ReferenceRunesMax))
}

func (p *payout) refusal(*ledger) (int, string) {
	if strings.HasSuffix(p.IBAN, refusedSuffix) {
		return http.StatusUnprocessableEntity, "payout_refused"
	}
	return 0, ""
}

func (p *payout) fill(e *entry) {
	e.put(http.StatusCreated, "po", func(id string) any {
		return struct {
			ID     string `json:"id"`
			IBAN   string `json:"iban"`
			Amount int64  `json:"amount"`
			Key    string `json:"key"`
		}{id, p.IBAN, p.Amount, e.Key}
	})
}

// mail has no key: each one is sent. If the request has one all the same, lists show it.
type mail struct {
	To   string `json:"to"`
	Text string `json:"text"`
}

func (m *mail) validate() error {
	return errors.Join(given("to", m.To, AddressRunesMax), given("text", m.Text, TextRunesMax))
}

func (m *mail) refusal(*ledger) (int, string) { return 0, "" }

func (m *mail) fill(e *entry) {
	e.put(http.StatusAccepted, "ma", func(id string) any {
		return struct {
			ID        string    `json:"id"`
			To        string    `json:"to"`
			Text      string    `json:"text"`
			Key       string    `json:"key,omitempty"`
			CreatedAt time.Time `json:"created_at"`
		}{id, m.To, m.Text, e.Key, e.At}
	})
}

// refusedSuffix ends the cards and IBANs that are refused.
const refusedSuffix = "0002"

// put sets the status and a new id, and the item that the function makes from the id.
func (e *entry) put(status int, prefix string, item func(id string) any) {
	e.Status, e.ID = status, newID(prefix)
	text, err := json.Marshal(item(e.ID))
	if err != nil { // only our own types are passed
		panic(err)
	}
	e.Item = text
}

// answer returns the body of the answer to the entry's request.
func (e *entry) answer() any {
	switch {
	case e.Error != "":
		return problem{Error: e.Error}
	case e.Kind == mails:
		return struct {
			ID string `json:"id"`
		}{e.ID}
	default:
		return e.Item
	}
}

func given(name, value string, runesMax int) error {
	if value == "" {
		return fmt.Errorf("%s must be given", name)
	}
	return short(name, value, runesMax)
}

func short(name, value string, runesMax int) error {
	if utf8.RuneCountInString(value) > runesMax {
		return fmt.Errorf("%s must be at most %d characters", name, runesMax)
	}
	return nil
}

func positive(amount int64) error {
	if amount <= 0 {
		return errors.New("amount must be a positive integer of minor units")
	}
	return nil
}

// decodeObject reads one JSON object, and refuses unknown fields and anything after it.
func decodeObject(text []byte, into any) error {
	if !bytes.HasPrefix(bytes.TrimLeft(text, " \t\r\n"), []byte("{")) {
		return errors.New("it is not a JSON object")
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(into); err != nil {
		return fmt.Errorf("it can't be read: %w", err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return errors.New("something follows the object")
	}
	return nil
}
