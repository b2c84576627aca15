package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/paidonce/idempotency/admin"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// tokenVariable names the environment variable that holds the token of serve.
const tokenVariable = "IDEMCTL_TOKEN"

// Limits of the token, in bytes.
const (
	tokenBytesMin = 16
	tokenBytesMax = 255
)

// Timeouts of the server. An action of an operator may take 15 seconds.
const (
	readHeaderTimeout = 5 * time.Second
	readTimeout       = 10 * time.Second
	writeTimeout      = 30 * time.Second
	idleTimeout       = time.Minute
	shutdownTimeout   = 20 * time.Second
	headerBytesMax    = 16 << 10
)

type serveCommand struct {
	Addr      string `placeholder:"HOST:PORT" default:"127.0.0.1:8484" help:"Address to listen on; port 0 takes any free one. (default: ${default})"`
	TokenFile string `placeholder:"FILE" help:"File with the token that the page asks for. Without it ${tokenVariable} applies; if that is unset, a token is made and printed."`
	Actor     string `placeholder:"NAME" help:"Name that is recorded with each act; the page asks for none. (default: your account on this machine)"`
	ReadOnly  bool   `help:"Leave out expire and delete."`
	Anywhere  bool   `help:"Allow addresses that other machines can reach. The page speaks plain HTTP: put TLS in front of it."`
}

// Run is called by kong.
func (c *serveCommand) Run(a *app) error {
	if err := c.checkAddr(a.ctx); err != nil {
		return err
	}
	actor, err := actorOr(c.Actor)
	if err != nil {
		return err
	}
	// The reasons come with the actions.
	if err := (operator.Act{Actor: actor, Reason: "-"}).Validate(); err != nil {
		return err
	}
	token, made, err := c.token()
	if err != nil {
		return err
	}
	return a.connect(func(store *postgres.Store) error {
		// Without a database there is no page.
		if _, _, err := operator.New(store, nil).Version(a.ctx); err != nil {
			return err
		}
		listener, err := (&net.ListenConfig{}).Listen(a.ctx, "tcp", c.Addr)
		if err != nil {
			return fmt.Errorf("serve: %w", err)
		}
		logger := slog.New(slog.NewTextHandler(a.stderr, nil))
		server := &http.Server{
			Handler:           c.handler(store, actor, token, logger),
			ReadHeaderTimeout: readHeaderTimeout, ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout,
			MaxHeaderBytes: headerBytesMax, ErrorLog: slog.NewLogLogger(logger.Handler(), slog.LevelWarn),
		}
		if err := c.say(a, listener.Addr().String(), token, made); err != nil {
			return errors.Join(err, listener.Close())
		}
		return serve(a.ctx, server, listener)
	})
}

// checkAddr returns an error if other machines can reach the address, unless a flag allows that.
func (c *serveCommand) checkAddr(ctx context.Context) error {
	host, _, err := net.SplitHostPort(c.Addr)
	if err != nil {
		return fmt.Errorf("%w: --addr is HOST:PORT", operator.ErrInvalid)
	}
	if c.Anywhere {
		return nil
	}
	addresses, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if host == "" || err != nil || len(addresses) == 0 {
		addresses = []netip.Addr{netip.IPv4Unspecified()}
	}
	for _, address := range addresses {
		if !address.Unmap().IsLoopback() {
			return fmt.Errorf("%w: --addr is not this machine's own (127.0.0.1, [::1] or localhost): --anywhere says that it is meant", operator.ErrInvalid)
		}
	}
	return nil
}

// token returns the token that the page asks for, and whether it was generated.
func (c *serveCommand) token() (token string, made bool, err error) {
	switch value, set := os.LookupEnv(tokenVariable); {
	case c.TokenFile != "":
		content, err := os.ReadFile(c.TokenFile)
		if err != nil {
			return "", false, fmt.Errorf("read the token: %w", err)
		}
		token = strings.TrimRight(string(content), "\r\n")
	case set:
		token = value
	default:
		return rand.Text(), true, nil
	}
	printable := !strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r >= 0x7f })
	if len(token) < tokenBytesMin || len(token) > tokenBytesMax || !printable {
		return "", false, fmt.Errorf("%w: the token must be %d to %d visible ASCII characters", operator.ErrInvalid, tokenBytesMin, tokenBytesMax)
	}
	return token, false, nil
}

// handler serves the pages to clients with the token. The token is the password of Basic
// authentication, which a browser asks for once and sends with every request, or a bearer token.
func (c *serveCommand) handler(store *postgres.Store, actor, token string, logger *slog.Logger) http.Handler {
	want := sha256.Sum256([]byte(token))
	return admin.New(store, func(r *http.Request, _ admin.Permission) (string, error) {
		_, password, _ := r.BasicAuth()
		if bearer, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); ok {
			password = bearer
		}
		got := sha256.Sum256([]byte(password)) // equal lengths: the comparison takes constant time
		if subtle.ConstantTimeCompare(got[:], want[:]) != 1 {
			return "", admin.ErrUnauthenticated
		}
		return actor, nil
	}, &admin.Options{ReadOnly: c.ReadOnly, Title: "idemctl", Challenge: `Basic realm="idemctl: any name, and the token", charset="UTF-8"`, Logger: logger})
}

// say prints the page's address, and the token if it was generated.
func (c *serveCommand) say(a *app, address, token string, made bool) error {
	if !made {
		token = ""
	}
	if a.cli.JSON {
		return a.printJSON(struct {
			URL   string `json:"url"`
			Token string `json:"token,omitempty"`
		}{"http://" + address + "/", token})
	}
	text := "the page is at http://" + address + "/; Ctrl-C ends it\n"
	if made {
		text += "it asks for any name and this token: " + token + "\n"
	}
	return a.printf("%s", text)
}

// serve serves until ctx ends, and then lets requests in progress finish.
func serve(ctx context.Context, server *http.Server, listener net.Listener) error {
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	select {
	case err := <-ended:
		return fmt.Errorf("serve: %w", err)
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
	defer cancel()
	if err := server.Shutdown(stop); err != nil {
		return fmt.Errorf("serve: stop: %w", errors.Join(err, server.Close()))
	}
	return nil
}
