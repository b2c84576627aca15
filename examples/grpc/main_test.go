package main

import (
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/paidonce/idempotency/examples/grpc/bankpb"
	"github.com/paidonce/idempotency/internal/pgtest"
)

func TestMain(m *testing.M) {
	slog.SetDefault(slog.New(slog.DiscardHandler)) // the middleware logs failures
	pgtest.Main(m)
}

func TestTheBankByBothProtocols(t *testing.T) {
	t.Parallel()
	store, err := open(t.Context(), pgtest.Database(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(store.Close)
	web := httptest.NewServer(newHandler(store))
	t.Cleanup(web.Close)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := newServer(store)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	conn, err := grpc.NewClient(listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	stub := bankpb.NewBankClient(conn)

	call := func(key string, r *bankpb.TransferRequest) (string, codes.Code) {
		ctx := metadata.AppendToOutgoingContext(t.Context(), "account", "alice")
		if key != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, "idempotency-key", key)
		}
		var header metadata.MD
		_, err := stub.Transfer(ctx, r, grpc.Header(&header))
		return strings.Join(header.Get("idempotency-status"), "|"), status.Code(err)
	}
	post := func(key, body string) (string, int) {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, web.URL+"/transfers", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Account", "alice")
		r.Header.Set("Idempotency-Key", key)
		response, err := web.Client().Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = response.Body.Close() }()
		_, _ = io.Copy(io.Discard, response.Body)
		return response.Header.Get("Idempotency-Status"), response.StatusCode
	}
	balance := func(want int64) {
		t.Helper()
		reply, err := stub.GetBalance(metadata.AppendToOutgoingContext(t.Context(), "account", "alice"), &bankpb.GetBalanceRequest{})
		if err != nil || reply.GetBalance() != want {
			t.Errorf("alice has %d, %v; want %d", reply.GetBalance(), err, want)
		}
	}
	const body = `{"to":"bob","amount":1250}`
	transfer := func() *bankpb.TransferRequest { return &bankpb.TransferRequest{To: "bob", Amount: 1250} }
	for _, want := range []string{"executed", "replayed"} {
		if outcome, code := call("by-grpc", transfer()); outcome != want || code != codes.OK {
			t.Errorf("gRPC: %s, %v; want %s", outcome, code, want)
		}
		if outcome, code := post("by-http", body); outcome != want || code != http.StatusCreated {
			t.Errorf("HTTP: %s, %d; want %s", outcome, code, want)
		}
	}
	balance(7500)
	if outcome, code := call("by-http", transfer()); outcome != "mismatch" || code != codes.InvalidArgument {
		t.Errorf("gRPC with a key of HTTP: %s, %v", outcome, code)
	}
	if outcome, code := post("by-grpc", body); outcome != "mismatch" || code != http.StatusUnprocessableEntity {
		t.Errorf("HTTP with a key of gRPC: %s, %d", outcome, code)
	}
	for _, want := range []string{"executed", "replayed"} {
		if outcome, code := call("", &bankpb.TransferRequest{RequestId: "too-much", To: "bob", Amount: 20000}); outcome != want || code != codes.FailedPrecondition {
			t.Errorf("too much: %s, %v; want %s", outcome, code, want)
		}
	}
	if outcome, code := call("", transfer()); outcome != "not-executed" || code != codes.InvalidArgument {
		t.Errorf("without a key: %s, %v", outcome, code)
	}
	balance(7500)
	if err := pay(t.Context(), listener.Addr().String(), 500); err != nil {
		t.Error(err)
	}
	balance(7000)
}
