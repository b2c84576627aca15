package effect_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/storage/postgres"
)

// exampleRequest returns a request, and registers its handler for later runs.
func exampleRequest(engine *idempotency.Engine, run idempotency.RunFunc) idempotency.Request {
	engine.Resumable("topup/1", func(idempotency.Key, []byte) (idempotency.RunFunc, error) { return run, nil })
	return idempotency.Request{
		Key:         idempotency.Key{Scope: "acme", Value: "8e03978e-40d5-43dd-bc93-6894a57f9324"},
		Fingerprint: idempotency.NewFingerprintV1("POST", "/topups", "", "application/json", []byte(`{"token":"tok_1","amount":900}`)),
		Resumable:   "topup/1",
		Stored:      func() []byte { return []byte(`{"token":"tok_1","amount":900}`) },
	}
}

// The processor charges the card, and its reply is lost. The client gets unknown, and goes away.
// The completer sends the call again with the same key, and posts the charge.
func Example() {
	ctx := context.Background()
	store, closeStore := testservice.Example(ctx, "CREATE TABLE postings (amount int NOT NULL)")
	defer closeStore()

	type Card struct {
		Token  string
		Amount int
	}
	type Charge struct{ ID string }
	charges := map[string]Charge{} // at the processor, by key
	charge := effect.New("charge", effect.Effect[Card, Charge]{
		Do: func(_ context.Context, key string, in Card) (Charge, error) {
			fmt.Println("asked to charge", in.Amount)
			if done, ok := charges[key]; ok {
				return done, nil
			}
			charges[key] = Charge{"ch_1"}
			return Charge{}, errors.New("connection reset by peer")
		},
		KeyLifetime: 24 * time.Hour,
	})

	topUp := func(ctx context.Context) (*idempotency.Answer, error) {
		paid, err := charge.Call(ctx, Card{"tok_1", 900})
		switch {
		case errors.Is(err, effect.ErrDeclined):
			return &idempotency.Answer{Status: http.StatusPaymentRequired}, nil
		case err != nil:
			return nil, err // not settled: the request stays open
		}
		if _, err := postgres.Tx(ctx).Exec(ctx, "INSERT INTO postings (amount) VALUES (900)"); err != nil {
			return nil, err
		}
		return &idempotency.Answer{Status: http.StatusCreated, Body: []byte(paid.ID)}, nil
	}
	engine := idempotency.NewEngine(store, nil)
	request := exampleRequest(engine, topUp)
	result := engine.Do(ctx, request, topUp)
	fmt.Println("the client gets", result.Outcome)

	completer := idempotency.NewCompleter(engine, &idempotency.CompleterOptions{Interval: 50 * time.Millisecond})
	for {
		if completed, err := completer.Once(ctx); err != nil || completed > 0 {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	result = engine.Do(ctx, request, topUp)
	fmt.Println("a retry gets", result.Outcome, result.Answer.Status, string(result.Answer.Body))
	var postings int
	if err := store.Pool().QueryRow(ctx, "SELECT count(*) FROM postings").Scan(&postings); err != nil {
		panic(err)
	}
	fmt.Println(len(charges), "charge,", postings, "posting")
	// Output:
	// asked to charge 900
	// the client gets unknown
	// asked to charge 900
	// a retry gets replayed 201 ch_1
	// 1 charge, 1 posting
}

// The reply is lost, and a webhook of the processor brings the result before the next run does.
func ExampleDeclared_Settled() {
	ctx := context.Background()
	store, closeStore := testservice.Example(ctx, "")
	defer closeStore()

	type Charge struct{ ID string }
	sent := "" // the key that the processor got
	charge := effect.New("charge", effect.Effect[int, Charge]{
		Do: func(_ context.Context, key string, _ int) (Charge, error) {
			sent = key
			return Charge{}, errors.New("connection reset by peer")
		},
	})
	topUp := func(ctx context.Context) (*idempotency.Answer, error) {
		paid, err := charge.Call(ctx, 900)
		if err != nil {
			return nil, err
		}
		return &idempotency.Answer{Status: http.StatusCreated, Body: []byte(paid.ID)}, nil
	}
	engine := idempotency.NewEngine(store, nil)
	request := exampleRequest(engine, topUp)
	fmt.Println(engine.Do(ctx, request, topUp).Outcome)

	// The webhook's handler, in its transaction. The webhook has the key that the processor got.
	settlement, err := charge.Settled(sent, Charge{"ch_1"})
	if err != nil {
		panic(err)
	}
	if err := pgx.BeginFunc(ctx, store.Pool(), func(tx pgx.Tx) error {
		return store.Settle(ctx, tx, settlement)
	}); err != nil {
		panic(err)
	}
	result := engine.Do(ctx, request, topUp)
	fmt.Println(result.Outcome, result.Answer.Status, string(result.Answer.Body))
	// Output:
	// unknown
	// executed 201 ch_1
}

// A charge that was made must come back before the request is refused.
func ExampleDeclared_Undo() {
	ctx := context.Background()
	store, closeStore := testservice.Example(ctx, "")
	defer closeStore()

	type Charge struct{ ID string }
	charge := effect.New("charge", effect.Effect[int, Charge]{
		Do: func(context.Context, string, int) (Charge, error) { return Charge{"ch_1"}, nil },
	})
	refund := effect.New("refund", effect.Effect[Charge, string]{
		Do: func(_ context.Context, _ string, in Charge) (string, error) { return "refund of " + in.ID, nil },
	})
	topUp := func(ctx context.Context) (*idempotency.Answer, error) {
		paid, err := charge.Call(ctx, 900)
		if err != nil {
			return nil, err
		}
		// The account was closed in the meantime.
		back, err := refund.Undo(ctx, charge, paid)
		if err != nil {
			return nil, err
		}
		return &idempotency.Answer{Status: http.StatusConflict, Body: []byte(back)}, nil
	}
	engine := idempotency.NewEngine(store, nil)
	result := engine.Do(ctx, exampleRequest(engine, topUp), topUp)
	fmt.Println(result.Outcome, result.Answer.Status, string(result.Answer.Body))
	// Output:
	// executed 409 refund of ch_1
}

// A payout holds the amount, sends it, and posts what it held. The bank refuses the second one, so
// its hold is released. The third account is closed by the time of the posting: the payout is
// called back first.
func Example_payout() {
	ctx := context.Background()
	store, closeStore := testservice.Example(ctx, "CREATE TABLE holds (id serial PRIMARY KEY, iban text NOT NULL, state text NOT NULL DEFAULT 'held')")
	defer closeStore()

	type Hold struct{ ID int }
	type Transfer struct {
		Hold int
		IBAN string
	}
	transfer := effect.New("transfer", effect.Effect[Transfer, string]{
		Do: func(_ context.Context, _ string, in Transfer) (string, error) {
			if in.IBAN == "refused" {
				return "", effect.Declined(errors.New("status 422"), nil)
			}
			return "po_1", nil
		},
	})
	recall := effect.New("recall", effect.Effect[string, string]{
		Do: func(_ context.Context, _ string, in string) (string, error) { return "recall of " + in, nil },
	})

	// end is a phase that ends the hold.
	end := func(ctx context.Context, hold Hold, state string, check error) error {
		_, err := postgres.Phase(ctx, state, func(tx pgx.Tx) (struct{}, error) {
			if check != nil {
				return struct{}{}, effect.Declined(check, nil) // its writes are undone, and later runs decide the same
			}
			_, err := tx.Exec(ctx, "UPDATE holds SET state = $2 WHERE id = $1", hold.ID, state)
			return struct{}{}, err
		})
		return err
	}
	payout := func(iban string) idempotency.RunFunc {
		return func(ctx context.Context) (*idempotency.Answer, error) {
			hold, err := postgres.Phase(ctx, "hold", func(tx pgx.Tx) (hold Hold, err error) {
				return hold, tx.QueryRow(ctx, "INSERT INTO holds (iban) VALUES ($1) RETURNING id", iban).Scan(&hold.ID)
			})
			if err != nil {
				return nil, err // nothing was committed
			}
			sent, err := transfer.Call(ctx, Transfer{hold.ID, iban})
			switch {
			case errors.Is(err, effect.ErrDeclined):
				return &idempotency.Answer{Status: http.StatusUnprocessableEntity}, end(ctx, hold, "released", nil)
			case err != nil:
				return nil, err
			}
			var closed error
			if iban == "closed" {
				closed = errors.New("the account is closed")
			}
			err = end(ctx, hold, "posted", closed)
			switch {
			case errors.Is(err, effect.ErrDeclined):
				if _, err := recall.Undo(ctx, transfer, sent); err != nil {
					return nil, err
				}
				return &idempotency.Answer{Status: http.StatusConflict}, end(ctx, hold, "released", nil)
			case err != nil:
				return nil, err
			}
			return &idempotency.Answer{Status: http.StatusCreated}, nil
		}
	}
	engine := idempotency.NewEngine(store, nil)
	for _, iban := range []string{"open", "refused", "closed"} {
		run := payout(iban)
		engine.Resumable("payout/"+iban, func(idempotency.Key, []byte) (idempotency.RunFunc, error) { return run, nil })
		result := engine.Do(ctx, idempotency.Request{
			Key:         idempotency.Key{Scope: "acme", Value: "payout-" + iban},
			Fingerprint: idempotency.NewFingerprintV1("POST", "/payouts", "", "application/json", []byte(iban)),
			Resumable:   "payout/" + iban, Stored: func() []byte { return []byte(iban) },
		}, run)
		var state string
		if err := store.Pool().QueryRow(ctx, "SELECT state FROM holds WHERE iban = $1", iban).Scan(&state); err != nil {
			panic(err)
		}
		fmt.Println(iban, result.Outcome, result.Answer.Status, state)
	}
	// Output:
	// open executed 201 posted
	// refused executed 422 released
	// closed executed 409 released
}

// A function that charges a card over HTTP, for the Do of an effect.
func ExampleFromHTTP() {
	type Charge struct{ ID string }
	charge := func(ctx context.Context, client *http.Client, key string) (charge Charge, err error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://psp.example/charges", strings.NewReader("{}"))
		if err != nil {
			return charge, effect.NotSent(err)
		}
		req.Header.Set("Idempotency-Key", key)
		resp, err := client.Do(req)
		if err == nil {
			defer resp.Body.Close()
		}
		if err := effect.FromHTTP(resp, err); err != nil {
			return charge, err
		}
		return charge, json.NewDecoder(resp.Body).Decode(&charge) // cut off: unknown
	}
	for _, status := range []int{201, 402, 504} {
		client := &http.Client{Transport: answering(status)}
		made, err := charge(context.Background(), client, "a derived key")
		fmt.Println(made, errors.Is(err, effect.ErrDeclined), err)
	}
	// Output:
	// {ch_1} false <nil>
	// {} true declined: the other service answered 402
	// {} false the other service answered 504
}

// answering returns a transport that answers every request with this status.
type answering int

func (a answering) RoundTrip(*http.Request) (*http.Response, error) {
	return &http.Response{StatusCode: int(a), Header: http.Header{}, Body: io.NopCloser(strings.NewReader(`{"ID":"ch_1"}`))}, nil
}

// The detail of a decline is recorded, and so the same in every run of the handler.
func ExampleDeclined() {
	type Refusal struct{ Code string }
	err := effect.Declined(errors.New("status 402"), Refusal{"insufficient_funds"})

	var declined *effect.DeclinedError
	var refusal Refusal
	if errors.As(err, &declined) && json.Unmarshal(declined.Detail, &refusal) == nil {
		fmt.Println(errors.Is(err, effect.ErrDeclined), refusal.Code)
	}
	// Output:
	// true insufficient_funds
}

// The facts about a known service fill the fields of an effect.
func ExampleProfileOf() {
	stripe := effect.ProfileOf("stripe-v1")
	charge := effect.New("charge", effect.Effect[int, string]{
		Do:            func(context.Context, string, int) (string, error) { return "ch_1", nil },
		KeyLifetime:   stripe.KeyLifetime,
		KeepsDeclines: stripe.KeepsDeclines,
	})
	fmt.Println(charge.Name(), stripe.KeyLifetime, stripe.KeepsDeclines)
	// Output:
	// charge 24h0m0s true
}
