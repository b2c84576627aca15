package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/go-chi/chi/v5"
)

// paymentTimeout is well within the handler's timeout: the call holds a database connection.
const paymentTimeout = 3 * time.Second

var errCardDeclined = errors.New("card was declined")

// paymentClient calls the payment service.
type paymentClient struct{ url string }

// charge charges a card once per key, however often it is called, and returns the charge's id.
// After any error except errCardDeclined the card may have been charged.
func (c *paymentClient) charge(ctx context.Context, key, card string, amount int64) (name string, err error) {
	body, err := json.Marshal(chargeRequest{Card: card, Amount: amount})
	if err != nil {
		return "", err
	}
	var answer charge
	status, err := c.call(ctx, http.MethodPost, "/charges", key, body, &answer)
	switch {
	case err != nil:
		return "", err
	case status == http.StatusPaymentRequired:
		return "", errCardDeclined
	case status != http.StatusCreated:
		return "", fmt.Errorf("payment service answered %d", status)
	}
	return answer.Name, nil
}

// cancel undoes the charge of a key. It refuses a charge that is still in progress. An unknown key
// is no error.
func (c *paymentClient) cancel(ctx context.Context, key string) error {
	status, err := c.call(ctx, http.MethodPost, "/cancellations", key, nil, nil)
	if err == nil && status != http.StatusNoContent {
		err = fmt.Errorf("payment service answered %d", status)
	}
	return err
}

func (c *paymentClient) call(ctx context.Context, method, path, key string, body []byte, answer any) (status int, err error) {
	ctx, cancel := context.WithTimeout(ctx, paymentTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, method, c.url+path, bytes.NewReader(body))
	if err != nil {
		return 0, err
	}
	request.Header.Set("Idempotency-Key", key)
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return 0, err
	}
	defer func() { _ = response.Body.Close() }()
	if answer != nil && response.StatusCode < 300 {
		err = json.NewDecoder(response.Body).Decode(answer)
	}
	return response.StatusCode, err
}

type chargeRequest struct {
	Card   string `json:"card"`
	Amount int64  `json:"amount"`
}

// charge is the payment service's record of a key.
type charge struct {
	Name   string `json:"charge"`
	Amount int64  `json:"amount"`
	State  string `json:"state"` // charged, declined or cancelled
	Asked  int    `json:"asked"` // number of requests for the charge
}

// paymentService stands for another company's service: this program only knows that it charges once
// per key. It declines the card "empty", and loses the answer to the first charge of the card
// "flaky".
type paymentService struct {
	mu      sync.Mutex
	charges []*charge
	byKey   map[string]*charge
}

func newPaymentService() http.Handler {
	s := &paymentService{byKey: map[string]*charge{}}
	r := chi.NewRouter()
	r.Post("/charges", s.charge)
	r.Post("/cancellations", s.cancel)
	r.Get("/charges", s.list)
	return r
}

// entry returns the record of a key. The caller holds s.mu.
func (s *paymentService) entry(key string) *charge {
	entry := s.byKey[key]
	if entry == nil {
		entry = &charge{Name: fmt.Sprintf("ch_%d", len(s.charges)+1)}
		s.byKey[key] = entry
		s.charges = append(s.charges, entry)
	}
	return entry
}

func (s *paymentService) charge(w http.ResponseWriter, r *http.Request) {
	var request chargeRequest
	if err := json.NewDecoder(r.Body).Decode(&request); err != nil {
		writeProblem(w, http.StatusBadRequest, "send a card and an amount")
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	entry := s.entry(r.Header.Get("Idempotency-Key"))
	entry.Asked++
	if entry.State == "" {
		entry.State, entry.Amount = "charged", request.Amount
		if request.Card == "empty" {
			entry.State = "declined"
		}
	}
	switch {
	case entry.State != "charged":
		writeProblem(w, http.StatusPaymentRequired, "the charge is "+entry.State)
	case request.Card == "flaky" && entry.Asked == 1:
		writeProblem(w, http.StatusGatewayTimeout, "the answer was lost")
	default:
		writeJSON(w, http.StatusCreated, entry)
	}
}

func (s *paymentService) cancel(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.entry(r.Header.Get("Idempotency-Key")).State = "cancelled"
	w.WriteHeader(http.StatusNoContent)
}

func (s *paymentService) list(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	writeJSON(w, http.StatusOK, s.charges)
}
