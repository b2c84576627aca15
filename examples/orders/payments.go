package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/go-chi/chi/v5"

	"github.com/paidonce/idempotency/effect"
)

// payment is the request to the payment service. It is kept in the database until its order has an
// answer, so it must not hold a card's number: send a card's token.
type payment struct {
	Card   string `json:"card"`
	Amount int64  `json:"amount"`
}

// paymentTimeout bounds one request to the payment service.
const paymentTimeout = 3 * time.Second

// newCharge declares the call to the payment service. The service keeps each key for a day with its
// answer, declines included.
func newCharge(url string, timeout time.Duration) *effect.Declared[payment, charge] {
	// A redirect would be a second request under the same key.
	client := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return effect.New("charge", effect.Effect[payment, charge]{
		Do: func(ctx context.Context, key string, in payment) (made charge, err error) {
			body, err := json.Marshal(in)
			if err != nil {
				return made, effect.NotSent(err)
			}
			request, err := http.NewRequestWithContext(ctx, http.MethodPost, url+"/charges", bytes.NewReader(body))
			if err != nil {
				return made, effect.NotSent(err)
			}
			request.Header.Set("Idempotency-Key", key)
			response, err := client.Do(request)
			if err == nil {
				defer func() { _ = response.Body.Close() }()
			}
			if err := effect.FromHTTP(response, err); err != nil {
				return made, err
			}
			return made, json.NewDecoder(response.Body).Decode(&made)
		},
		Timeout: timeout, KeyLifetime: 24 * time.Hour, KeepsDeclines: true,
	})
}

// charge is the payment service's record of a key.
type charge struct {
	Name   string `json:"charge"`
	Amount int64  `json:"amount"`
	State  string `json:"state"` // charged or declined
	Asked  int    `json:"asked"` // number of requests for the charge
}

// paymentService stands for another company's service: this program only knows that it charges once
// per key. It declines the card "empty", and loses the answer to the first charge of a card that
// begins with "flaky".
type paymentService struct {
	mu      sync.Mutex
	charges []*charge
	byKey   map[string]*charge
}

func newPaymentService() http.Handler {
	s := &paymentService{byKey: map[string]*charge{}}
	r := chi.NewRouter()
	r.Post("/charges", s.charge)
	r.Get("/charges", s.list)
	return r
}

func (s *paymentService) charge(w http.ResponseWriter, r *http.Request) {
	var request payment
	if err := json.NewDecoder(r.Body).Decode(&request); err != nil {
		writeProblem(w, http.StatusBadRequest, "send a card and an amount")
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	key := r.Header.Get("Idempotency-Key")
	entry := s.byKey[key]
	if entry == nil {
		entry = &charge{Name: fmt.Sprintf("ch_%d", len(s.charges)+1), Amount: request.Amount, State: "charged"}
		if request.Card == "empty" {
			entry.State = "declined"
		}
		s.byKey[key] = entry
		s.charges = append(s.charges, entry)
	}
	entry.Asked++
	switch {
	case entry.State != "charged":
		writeProblem(w, http.StatusPaymentRequired, "the charge is "+entry.State)
	case strings.HasPrefix(request.Card, "flaky") && entry.Asked == 1:
		writeProblem(w, http.StatusGatewayTimeout, "the answer was lost")
	default:
		writeJSON(w, http.StatusCreated, entry)
	}
}

func (s *paymentService) list(w http.ResponseWriter, _ *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	writeJSON(w, http.StatusOK, s.charges)
}
