// Command webhook receives the webhooks of a payment service. Such a service signs each event,
// gives it an id, sends it until it gets a 2xx, and may send it twice. The id is the key, so each
// event has one effect.
//
//	go run ./examples/webhook
package main

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"

	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// eventBytesMax is the maximum size of an event.
const eventBytesMax = 64 << 10

// Event is what the payment service sends.
type Event struct {
	ID     string `json:"id"`
	Charge string `json:"charge"`
	State  string `json:"state"`
}

func run(ctx context.Context, databaseURL, address string) error {
	store, err := postgres.Open(ctx, databaseURL, nil)
	if err != nil {
		return err
	}
	defer store.Close()
	if err := migrations.Up(ctx, store, nil); err != nil {
		return err
	}
	if _, err := store.Pool().Exec(ctx, schema); err != nil {
		return err
	}
	go postgres.NewReaper(store, nil).Run(ctx)
	// The scope is the sender, so that its ids can't be equal to keys of clients.
	idem := middleware.New(store, func(*http.Request) (string, error) { return "psp.example", nil }, nil)
	secret := []byte(rand.Text()) // in production: the one that both sides have agreed on
	mux := http.NewServeMux()
	mux.Handle("POST /webhooks", signed(secret, idem.Handler(http.HandlerFunc(handle))))
	return serve(ctx, address, mux, func(url string) { greet(url, secret) })
}

// signed lets only the payment service through, and makes the event's id the request's key. The
// signature is checked before anything in the body is believed.
func signed(secret []byte, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, eventBytesMax))
		if err != nil {
			http.Error(w, "the event can't be read", http.StatusBadRequest)
			return
		}
		if given, err := hex.DecodeString(r.Header.Get("Signature")); err != nil || !hmac.Equal(given, sign(secret, body)) {
			http.Error(w, "the signature is wrong", http.StatusUnauthorized)
			return
		}
		var event Event
		if err := json.Unmarshal(body, &event); err != nil || event.ID == "" {
			http.Error(w, "the event has no id", http.StatusBadRequest)
			return
		}
		r.Header.Set("Idempotency-Key", event.ID)
		r.Body = io.NopCloser(bytes.NewReader(body))
		next.ServeHTTP(w, r)
	})
}

func sign(secret, body []byte) []byte {
	mac := hmac.New(sha256.New, secret)
	mac.Write(body) // a hash never fails
	return mac.Sum(nil)
}

// handle handles one event. Answer 2xx once it is handled; after a 5xx it is sent again.
func handle(w http.ResponseWriter, r *http.Request) {
	var event Event
	if err := json.NewDecoder(r.Body).Decode(&event); err != nil {
		http.Error(w, "the event is no JSON", http.StatusBadRequest)
		return
	}
	ctx := r.Context()
	if _, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO webhook.charges (charge, state) VALUES ($1, $2)", event.Charge, event.State); err != nil {
		http.Error(w, "the event is not handled yet", http.StatusInternalServerError)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

const schema = `
	CREATE SCHEMA IF NOT EXISTS webhook;
	CREATE TABLE IF NOT EXISTS webhook.charges (id bigserial PRIMARY KEY, charge text NOT NULL, state text NOT NULL)`

func main() {
	start("webhook", "127.0.0.1:8081", func(ctx context.Context, address string) error {
		url, stop, err := databaseURL(ctx)
		if err != nil {
			return err
		}
		defer stop()
		return run(ctx, url, address)
	})
}

func greet(url string, secret []byte) {
	event := fmt.Sprintf(`{"id":"evt_%s","charge":"ch_1","state":"captured"}`, rand.Text())
	curl := fmt.Sprintf(`curl -i %s/webhooks -H 'Signature: %x' -d '%s'`, url, sign(secret, []byte(event)), event)
	fmt.Printf(`webhook is at %s

Send an event: 204, Idempotency-Status: executed
  %s
Send it again: 204, Idempotency-Status: replayed
  %s
Send another under its signature: 401
  curl -i %s/webhooks -H 'Signature: %x' -d '{"id":"evt_2"}'
`, url, curl, curl, url, sign(secret, []byte(event)))
}
