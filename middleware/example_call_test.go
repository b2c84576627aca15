package middleware_test

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

// The README shows this part, and a test compares the two.

var charge = effect.New("charge", effect.Effect[Card, Charge]{Do: psp.Charge, KeyLifetime: 24 * time.Hour})

func topUp(w http.ResponseWriter, r *http.Request) {
	var card Card
	if err := json.NewDecoder(r.Body).Decode(&card); err != nil || card.Amount <= 0 {
		http.Error(w, "send a token and a positive amount", http.StatusBadRequest)
		return
	}
	ctx := r.Context()
	paid, err := charge.Call(ctx, card) // commits the intent, charges the card, commits the result
	switch {
	case errors.Is(err, effect.ErrDeclined): // a definite no
		http.Error(w, "the card was declined", http.StatusPaymentRequired)
		return
	case err != nil:
		return // not known yet: the client gets 503 unknown, and the request goes on without it
	}
	key, _ := idempotency.KeyFrom(ctx)
	if _, err := postgres.Tx(ctx).Exec(ctx, post, key.Scope, paid.ID, paid.Amount); err != nil {
		http.Error(w, "the charge is not posted yet", http.StatusInternalServerError)
		return // the handler runs again; the card is not charged again
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusCreated)
	_ = json.NewEncoder(w).Encode(paid)
}

type Card struct {
	Token  string
	Amount int64
}

type Charge struct {
	ID     string `json:"id"`
	Amount int64  `json:"amount"`
}

const post = "INSERT INTO postings (account, charge, amount) VALUES ($1, $2, $3)"

// exampleProcessor loses its first reply.
type exampleProcessor struct {
	mu      sync.Mutex
	charges map[string]Charge
}

var psp = &exampleProcessor{charges: map[string]Charge{}}

func (p *exampleProcessor) Charge(_ context.Context, key string, card Card) (Charge, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if made, ok := p.charges[key]; ok {
		return made, nil
	}
	p.charges[key] = Charge{fmt.Sprint("ch_", len(p.charges)+1), card.Amount}
	return Charge{}, errors.New("connection reset by peer")
}

// The processor charges the card, and its reply is lost. The client gets 503 and does not come back
// until much later; the completer has ended its request by then.
func ExampleMiddleware_Completer() {
	ctx, cancel := context.WithCancel(context.Background())
	store, closeStore := testservice.Example(ctx, "CREATE TABLE postings (account text, charge text, amount bigint)")
	defer closeStore()

	idem := middleware.New(store, exampleAccount, nil)
	mux := http.NewServeMux()
	secret := []byte(rand.Text() + rand.Text())
	status := middleware.NewStatus("/v1/operations/", secret)
	mux.Handle("GET /v1/operations/{id}", status)
	topUps := idem.With(func(o *middleware.Options) { o.Resumable, o.Accepted = "topup/1", status })
	mux.Handle("POST /topups", topUps.Handler(http.HandlerFunc(topUp)))
	ended := make(chan struct{}, 1)
	var completer sync.WaitGroup
	completer.Go(func() {
		idem.Completer(&idempotency.CompleterOptions{OnResume: func(_ idempotency.Key, result idempotency.Result) {
			if result.Answer != nil {
				ended <- struct{}{}
			}
		}}).Run(ctx)
	})
	defer completer.Wait()
	defer cancel()

	send := func() {
		r := httptest.NewRequest(http.MethodPost, "/topups", strings.NewReader(`{"token":"tok_1","amount":900}`))
		r.Header.Set("Account", "acme")
		r.Header.Set("Idempotency-Key", "8e03978e")
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, r)
		fmt.Println(w.Code, w.Header().Get("Idempotency-Status"))
		if w.Code == http.StatusCreated {
			fmt.Print(w.Body)
		}
	}
	send()
	<-ended
	send()
	var postings int
	if err := store.Pool().QueryRow(ctx, "SELECT count(*) FROM postings").Scan(&postings); err != nil {
		panic(err)
	}
	fmt.Println(len(psp.charges), "charge,", postings, "posting")
	// Output:
	// 503 unknown
	// 201 replayed
	// {"id":"ch_1","amount":900}
	// 1 charge, 1 posting
}
