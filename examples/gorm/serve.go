package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// Timeouts of the server. WriteTimeout must exceed ReadTimeout and all of the middleware's Timeouts
// together: with the defaults, the time to read the body and 25 seconds.
const (
	readTimeout     = 10 * time.Second
	writeTimeout    = 40 * time.Second
	shutdownTimeout = 20 * time.Second
)

// start runs a program until Ctrl-C or SIGTERM. Its only flag is the address that it serves on.
func start(name, address string, run func(ctx context.Context, address string) error) {
	flag.StringVar(&address, "listen", address, "address to serve on; port 0 takes any free one")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	if err := run(ctx, address); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		os.Exit(1)
	}
}

// serve serves until ctx ends, and then lets the requests in flight finish. It calls greet with its
// address.
func serve(ctx context.Context, address string, handler http.Handler, greet func(url string)) error {
	listener, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("%w: choose another address with -listen", err)
	}
	server := &http.Server{Handler: handler, ReadTimeout: readTimeout, WriteTimeout: writeTimeout}
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	greet("http://" + listener.Addr().String())
	select {
	case err := <-failed:
		return err
	case <-ctx.Done():
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
	defer cancel()
	return server.Shutdown(ctx)
}
