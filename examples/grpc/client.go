package main

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"

	"github.com/paidonce/idempotency/client"
	grpcidem "github.com/paidonce/idempotency/contrib/grpc"
	"github.com/paidonce/idempotency/examples/grpc/bankpb"
)

// pay is a client of the bank: it pays bob, and retries until it knows the outcome.
func pay(ctx context.Context, address string, amount int64) error {
	retry := grpcidem.NewClient(&client.Options{Honours: client.Everywhere})
	conn, err := grpc.NewClient(address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithChainUnaryInterceptor(retry))
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	ctx = metadata.AppendToOutgoingContext(ctx, "account", "alice")
	reply, err := bankpb.NewBankClient(conn).Transfer(ctx, &bankpb.TransferRequest{To: "bob", Amount: amount})
	switch {
	case errors.Is(err, client.ErrUnknown):
		return fmt.Errorf("it may have been paid: keep the key, and continue with client.WithKey: %w", err)
	case err != nil: // proven: not paid; or the bank's own error
		return err
	}
	fmt.Printf("paid %d to %s, and %d are left\n", reply.GetAmount(), reply.GetTo(), reply.GetBalance())
	return nil
}
