package grpcidem_test

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	grpcidem "github.com/paidonce/idempotency/contrib/grpc"
	"github.com/paidonce/idempotency/contrib/grpc/rpctest"
	"github.com/paidonce/idempotency/contrib/grpc/rpctest/rpctestpb"
	"github.com/paidonce/idempotency/internal/pgtest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

func scope(context.Context, string) (string, error) { return "acme", nil }

// serve serves a service until the test ends, and returns the server's address.
func serve(t testing.TB, service rpctestpb.ProbeServer, options ...grpc.ServerOption) (address string) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(options...)
	rpctestpb.RegisterProbeServer(server, service)
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return listener.Addr().String()
}

// dial returns a conn that ends with the test.
func dial(t testing.TB, address string, options ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(address, append(options, grpc.WithTransportCredentials(insecure.NewCredentials()))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// probe serves the methods of the conformance suite.
type probe struct {
	rpctestpb.UnimplementedProbeServer
	unary  func(context.Context, *rpctestpb.PayRequest) (*rpctestpb.PayReply, error)
	stream func(send func(*rpctestpb.PayReply) error) error
}

func (p *probe) Pay(ctx context.Context, r *rpctestpb.PayRequest) (*rpctestpb.PayReply, error) {
	return p.unary(ctx, r)
}

func (p *probe) Refund(ctx context.Context, r *rpctestpb.PayRequest) (*rpctestpb.PayReply, error) {
	return p.unary(ctx, r)
}

func (p *probe) Look(ctx context.Context, r *rpctestpb.PayRequest) (*rpctestpb.PayReply, error) {
	return p.unary(ctx, r)
}

func (p *probe) Watch(_ *rpctestpb.PayRequest, stream grpc.ServerStreamingServer[rpctestpb.PayReply]) error {
	return p.stream(stream.Send)
}

func TestConformance(t *testing.T) {
	t.Parallel()
	rpctest.Run(t, func(t *testing.T, s *rpctest.Service) rpctest.Client {
		idem := grpcidem.New(s.Store, scope, &grpcidem.Options{
			Optional: s.Options.Optional, RequestBytesMax: s.Options.RequestBytesMax, RefuseStreams: s.Options.RefuseStreams,
			Logger: slog.New(slog.DiscardHandler),
		})
		arrived := func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			s.Arrived(ctx, req)
			return handler(ctx, req)
		}
		service := &probe{stream: s.HandleStream, unary: func(ctx context.Context, r *rpctestpb.PayRequest) (*rpctestpb.PayReply, error) {
			reply, err := s.Handle(ctx, r)
			if own := new(rpctest.Error); errors.As(err, &own) {
				err = status.ErrorProto(own.Status)
			}
			return reply, err
		}}
		conn := dial(t, serve(t, service, grpc.ChainUnaryInterceptor(arrived, idem.Unary), grpc.ChainStreamInterceptor(idem.Stream)))
		return func(ctx context.Context, method string, md map[string]string, r *rpctestpb.PayRequest) rpctest.Reply {
			ctx = metadata.NewOutgoingContext(ctx, metadata.New(md))
			reply, header := new(rpctestpb.PayReply), metadata.MD(nil)
			var err error
			if method == rpctest.Watch {
				header, err = watch(ctx, conn, r, reply)
			} else {
				err = conn.Invoke(ctx, method, r, reply, grpc.Header(&header))
			}
			if err != nil {
				return rpctest.Reply{Error: status.Convert(err).Proto(), Metadata: header}
			}
			return rpctest.Reply{Message: reply, Metadata: header}
		}
	})
}

// watch opens the stream and reads its first message.
func watch(ctx context.Context, conn *grpc.ClientConn, r *rpctestpb.PayRequest, reply *rpctestpb.PayReply) (metadata.MD, error) {
	stream, err := rpctestpb.NewProbeClient(conn).Watch(ctx, r)
	if err != nil {
		return nil, err
	}
	err = stream.RecvMsg(reply)
	header, _ := stream.Header() // as far as it came
	return header, err
}
