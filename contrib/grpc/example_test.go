package grpcidem_test

import (
	"context"
	"fmt"
	"net"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/paidonce/idempotency/client"
	grpcidem "github.com/paidonce/idempotency/contrib/grpc"
	"github.com/paidonce/idempotency/contrib/grpc/rpctest/rpctestpb"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/storage/postgres"
)

// bank implements a service of protobuf.
type bank struct {
	rpctestpb.UnimplementedProbeServer
}

func (bank) Pay(ctx context.Context, r *rpctestpb.PayRequest) (*rpctestpb.PayReply, error) {
	var balance int64
	err := postgres.Tx(ctx).QueryRow(ctx, "UPDATE balances SET amount = amount - $1 RETURNING amount", r.GetAmount()).Scan(&balance)
	switch {
	case err != nil: // forgotten: a retry runs again
		return nil, status.Error(codes.Internal, "the payment failed")
	case balance < 0: // recorded, and the UPDATE is undone
		return nil, status.Error(codes.FailedPrecondition, "there is not enough money")
	}
	return &rpctestpb.PayReply{Id: fmt.Sprint("balance ", balance)}, nil // committed with the UPDATE
}

// account returns the account that authentication, in an interceptor outside, has found.
func account(ctx context.Context, _ string) (string, error) {
	return strings.Join(metadata.ValueFromIncomingContext(ctx, "account"), ""), nil
}

func Example() {
	ctx := context.Background()
	store, closeStore := testservice.Example(ctx, "CREATE TABLE balances (amount bigint); INSERT INTO balances VALUES (1000)")
	defer closeStore()

	idem := grpcidem.New(store, account, nil)
	server := grpc.NewServer(grpc.ChainUnaryInterceptor(idem.Unary), grpc.ChainStreamInterceptor(idem.Stream))
	rpctestpb.RegisterProbeServer(server, bank{})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	go func() { _ = server.Serve(listener) }()
	defer server.Stop()

	retry := grpcidem.NewClient(&client.Options{Honours: client.Everywhere})
	conn, err := grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithChainUnaryInterceptor(retry))
	if err != nil {
		panic(err)
	}
	defer func() { _ = conn.Close() }()
	ctx = metadata.AppendToOutgoingContext(ctx, "account", "acme")
	for _, amount := range []int64{300, 300, 5000} {
		var header metadata.MD
		request := &rpctestpb.PayRequest{RequestId: fmt.Sprint("order-", amount), Amount: amount} // or metadata idempotency-key
		reply, err := rpctestpb.NewProbeClient(conn).Pay(ctx, request, grpc.Header(&header))
		fmt.Println(header.Get("idempotency-status"), reply.GetId(), status.Code(err))
	}
	// Output:
	// [executed] balance 700 OK
	// [replayed] balance 700 OK
	// [executed]  FailedPrecondition
}
