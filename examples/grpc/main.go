// Command grpc is the bank of the quickstart, which also speaks gRPC: the same transfer by both, on
// the same keys.
//
//	go run -C examples/grpc .
package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"net/http"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	grpcidem "github.com/paidonce/idempotency/contrib/grpc"
	"github.com/paidonce/idempotency/examples/grpc/bankpb"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

func main() {
	grpcAddress := flag.String("grpc", "127.0.0.1:8087", "address to serve gRPC on; port 0 takes any free one")
	amount := flag.Int64("pay", 0, "instead of serving, pay bob this amount by gRPC, with a client that retries")
	start("grpc", "127.0.0.1:8086", func(ctx context.Context, address string) error {
		if *amount != 0 {
			return pay(ctx, *grpcAddress, *amount)
		}
		url, stop, err := databaseURL(ctx)
		if err != nil {
			return err
		}
		defer stop()
		store, err := open(ctx, url)
		if err != nil {
			return err
		}
		defer store.Close()
		listener, err := net.Listen("tcp", *grpcAddress)
		if err != nil {
			return fmt.Errorf("%w: choose another address with -grpc", err)
		}
		server := newServer(store)
		failed := make(chan error, 1)
		go func() { failed <- server.Serve(listener) }()
		err = serve(ctx, address, newHandler(store), func(url string) { greet(url, listener.Addr().String()) })
		server.GracefulStop() // the calls in flight finish
		return errors.Join(err, <-failed)
	})
}

// open connects to the database and migrates it.
func open(ctx context.Context, url string) (*postgres.Store, error) {
	store, err := postgres.Open(ctx, url, nil)
	if err != nil {
		return nil, err
	}
	err = migrations.Up(ctx, store, nil)
	if err == nil {
		_, err = store.Pool().Exec(ctx, schema)
	}
	if err != nil {
		store.Close()
		return nil, err
	}
	return store, nil
}

// newServer returns the bank by gRPC.
func newServer(store *postgres.Store) *grpc.Server {
	idem := grpcidem.New(store, func(ctx context.Context, _ string) (string, error) { return caller(ctx), nil }, nil)
	server := grpc.NewServer(grpc.ChainUnaryInterceptor(idem.Unary), grpc.ChainStreamInterceptor(idem.Stream))
	bankpb.RegisterBankServer(server, &bank{store: store})
	return server
}

// newHandler returns the bank by HTTP. The scopes of both are the accounts, so a key counts once.
func newHandler(store *postgres.Store) http.Handler {
	idem := middleware.New(store, func(r *http.Request) (string, error) { return r.Header.Get("Account"), nil }, nil)
	mux := http.NewServeMux()
	mux.Handle("POST /transfers", idem.Handler(http.HandlerFunc(transfer)))
	return mux
}

// caller returns the account that your authentication has found. If it is empty the call is
// refused.
func caller(ctx context.Context) string {
	if accounts := metadata.ValueFromIncomingContext(ctx, "account"); len(accounts) == 1 {
		return accounts[0]
	}
	return ""
}

type bank struct {
	bankpb.UnimplementedBankServer
	store *postgres.Store
}

// Transfer implements bankpb.BankServer.
func (*bank) Transfer(ctx context.Context, r *bankpb.TransferRequest) (*bankpb.TransferReply, error) {
	balance, err := move(ctx, caller(ctx), r.GetTo(), r.GetAmount())
	switch {
	case errors.Is(err, errAmount):
		return nil, status.Error(codes.InvalidArgument, err.Error())
	case errors.Is(err, errAccount):
		return nil, status.Error(codes.NotFound, err.Error())
	case errors.Is(err, errMoney): // recorded; the writes are undone
		return nil, status.Error(codes.FailedPrecondition, err.Error())
	case err != nil: // forgotten; a retry runs again
		return nil, status.Error(codes.Internal, "the transfer failed")
	}
	return &bankpb.TransferReply{To: r.GetTo(), Amount: r.GetAmount(), Balance: balance}, nil
}

// GetBalance implements bankpb.BankServer.
func (b *bank) GetBalance(ctx context.Context, _ *bankpb.GetBalanceRequest) (*bankpb.GetBalanceReply, error) {
	reply := new(bankpb.GetBalanceReply)
	if err := b.store.Pool().QueryRow(ctx, "SELECT balance FROM grpc_example.accounts WHERE name = $1", caller(ctx)).Scan(&reply.Balance); err != nil {
		return nil, status.Error(codes.NotFound, errAccount.Error())
	}
	return reply, nil
}

// transfer is the same by HTTP.
func transfer(w http.ResponseWriter, r *http.Request) {
	var t struct {
		To     string
		Amount int64
	}
	if err := json.NewDecoder(r.Body).Decode(&t); err != nil {
		http.Error(w, "send to and a positive amount", http.StatusBadRequest)
		return
	}
	balance, err := move(r.Context(), r.Header.Get("Account"), t.To, t.Amount)
	switch {
	case errors.Is(err, errAmount):
		http.Error(w, err.Error(), http.StatusBadRequest)
	case errors.Is(err, errAccount):
		http.Error(w, err.Error(), http.StatusNotFound)
	case errors.Is(err, errMoney):
		http.Error(w, err.Error(), http.StatusPaymentRequired)
	case err != nil:
		http.Error(w, "the transfer failed", http.StatusInternalServerError)
	default:
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(map[string]any{"to": t.To, "amount": t.Amount, "balance": balance})
	}
}

var (
	errAmount  = errors.New("send to and a positive amount")
	errAccount = errors.New("there is no such account")
	errMoney   = errors.New("there is not enough money")
)

// move moves money in the transaction of the request or call, and returns the payer's balance.
func move(ctx context.Context, from, to string, amount int64) (balance int64, err error) {
	if amount <= 0 {
		return 0, errAmount
	}
	var accounts int64
	err = postgres.Tx(ctx).QueryRow(ctx, moveMoney, from, to, amount).Scan(&accounts, &balance)
	switch {
	case err != nil:
		return 0, err
	case accounts != 2:
		return 0, errAccount
	case balance < 0:
		return 0, errMoney
	}
	return balance, nil
}

// moveMoney returns the number of accounts that it found, and the payer's balance.
const moveMoney = `
	WITH moved AS (
		UPDATE grpc_example.accounts SET balance = balance + CASE name WHEN $1 THEN -$3::bigint ELSE $3::bigint END
		WHERE name IN ($1, $2) RETURNING name, balance)
	SELECT count(*), coalesce(min(balance) FILTER (WHERE name = $1), 0) FROM moved`

const schema = `
	CREATE SCHEMA IF NOT EXISTS grpc_example;
	CREATE TABLE IF NOT EXISTS grpc_example.accounts (name text PRIMARY KEY, balance bigint NOT NULL);
	INSERT INTO grpc_example.accounts VALUES ('alice', 10000), ('bob', 0) ON CONFLICT DO NOTHING`

// greet prints lines to try. All but the last have the same key.
func greet(url, grpcAddress string) {
	key := rand.Text()
	call := fmt.Sprintf(`grpcurl -v -plaintext -import-path examples/grpc -proto bankpb/bank.proto -H 'account: alice' -H 'idempotency-key: %s' -d '{"to":"bob","amount":1250}' %s examples.bank.v1.Bank/Transfer`, key, grpcAddress)
	fmt.Printf(`grpc is at %s, and by gRPC at %s

Send a transfer by gRPC: idempotency-status: executed
  %s
Send it again: idempotency-status: replayed, and the same reply
  %s
Send one by HTTP with its key: 422, Idempotency-Status: mismatch, and no second payment
  curl -i %s/transfers -H 'Account: alice' -H 'Idempotency-Key: %s' -d '{"to":"bob","amount":1250}'
Pay by a Go client, which makes a key and retries
  go run -C examples/grpc . -grpc %s -pay 1250
`, url, grpcAddress, call, call, url, key, grpcAddress)
}
