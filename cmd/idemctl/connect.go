package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// connectTimeout is the maximum time to make a connection, unless PGCONNECT_TIMEOUT or the URL sets
// one.
const connectTimeout = 5 * time.Second

// connect calls do with a store. The store's pool makes its first connection when it is used,
// because postgres.Open would refuse a database that the doctor must examine. A pooler in between
// may have any mode.
func (a *app) connect(do func(*postgres.Store) error) error {
	if err := validSchema(a.cli.Schema); err != nil {
		return err
	}
	config, err := pgxpool.ParseConfig(a.cli.DatabaseURL)
	if err != nil { // its text may quote a secret
		return errors.New("the database's address can't be read: see --database-url, DATABASE_URL, and the variables of libpq (PGHOST, PGPORT, PGSERVICE, ...)")
	}
	conn := config.ConnConfig
	if conn.RuntimeParams["application_name"] == "" {
		conn.RuntimeParams["application_name"] = "idemctl"
	}
	if conn.ConnectTimeout == 0 {
		conn.ConnectTimeout = connectTimeout
	}
	config.MaxConns, config.MinConns = 4, 0
	options := &postgres.Options{Schema: a.cli.Schema, TransactionPooling: true}
	postgres.Configure(config, options)
	pool, err := pgxpool.NewWithConfig(context.WithoutCancel(a.ctx), config)
	if err != nil {
		return fmt.Errorf("connect: %w", err)
	}
	defer pool.Close()
	return do(postgres.New(pool, options))
}

// operate calls do with an operator.
func (a *app) operate(do func(*operator.Operator) error) error {
	return a.connect(func(store *postgres.Store) error { return do(operator.New(store, nil)) })
}

func validSchema(name string) error {
	invalid := name == "" || len(name) > 63 || name[0] >= '0' && name[0] <= '9' || strings.HasPrefix(name, "pg_")
	for _, c := range name {
		invalid = invalid || (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '_'
	}
	if invalid {
		return fmt.Errorf("%w: --schema is 1 to 63 lower-case letters, digits and underscores, and does not begin with a digit or pg_", operator.ErrInvalid)
	}
	return nil
}

// keyArguments name a key.
type keyArguments struct {
	Scope string `arg:"" help:"The account that owns the key; \"-\" reads it from the standard input."`
	Key   string `arg:"" help:"The key, unquoted; \"-\" reads it from the standard input."`
}

// lineBytesMax exceeds the maximum length of a scope or a key.
const lineBytesMax = 4096

// read returns the key. Each "-" is replaced by the next line of the standard input.
func (k *keyArguments) read(stdin io.Reader) (idempotency.Key, error) {
	key := idempotency.Key{Scope: k.Scope, Value: k.Key}
	lines := bufio.NewReaderSize(io.LimitReader(stdin, 2*lineBytesMax), lineBytesMax)
	for _, part := range []*string{&key.Scope, &key.Value} {
		if *part != "-" {
			continue
		}
		line, err := lines.ReadString('\n')
		if err != nil && (err != io.EOF || line == "") {
			return key, fmt.Errorf("%w: the standard input has no line for it", operator.ErrInvalid)
		}
		*part = strings.TrimRight(line, "\r\n")
	}
	if err := key.Validate(); err != nil {
		return key, fmt.Errorf("%w: %w", operator.ErrInvalid, err)
	}
	return key, nil
}
