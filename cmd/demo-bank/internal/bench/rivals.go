package bench

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
)

// The two designs that most services use instead. Both run the batch form and store the answer as
// it is (no recorder of HTTP, no list of headers), so they cost less than a package with such a
// design does.

// tables of the rivals; the first one's rows are like those of idempotency_keys.
const sqlRivalTables = `
	CREATE TABLE insert_first_keys (
		created_at  timestamptz NOT NULL DEFAULT transaction_timestamp(),
		status      smallint,
		scope       text COLLATE "C" NOT NULL,
		key         text COLLATE "C" NOT NULL,
		fingerprint bytea NOT NULL,
		location    text,
		body        bytea,
		PRIMARY KEY (scope, key)
	);
	CREATE TABLE lease_keys (
		created_at   timestamptz NOT NULL DEFAULT transaction_timestamp(),
		locked_until timestamptz NOT NULL,
		status       smallint,
		scope        text COLLATE "C" NOT NULL,
		key          text COLLATE "C" NOT NULL,
		fingerprint  bytea NOT NULL,
		location     text,
		body         bytea,
		PRIMARY KEY (scope, key)
	)`

const (
	sqlInsertFirst = `INSERT INTO insert_first_keys (scope, key, fingerprint) VALUES ($1, $2, $3) ON CONFLICT (scope, key) DO NOTHING`
	sqlInsertRead  = `SELECT fingerprint, status, location, body FROM insert_first_keys WHERE scope = $1 AND key = $2`
	sqlUpdateLast  = `UPDATE insert_first_keys SET status = $3, location = $4, body = $5 WHERE scope = $1 AND key = $2`

	sqlLeaseClaim = `INSERT INTO lease_keys (scope, key, fingerprint, locked_until) VALUES ($1, $2, $3, statement_timestamp() + interval '30 seconds') ON CONFLICT (scope, key) DO NOTHING`
	sqlLeaseRead  = `SELECT fingerprint, status, location, body FROM lease_keys WHERE scope = $1 AND key = $2`
	sqlLeaseTake  = `UPDATE lease_keys SET locked_until = statement_timestamp() + interval '30 seconds' WHERE scope = $1 AND key = $2 AND fingerprint = $3 AND status IS NULL AND locked_until < statement_timestamp()`
	sqlLeaseStore = `UPDATE lease_keys SET status = $3, location = $4, body = $5 WHERE scope = $1 AND key = $2 AND status IS NULL`
)

var (
	errChanged    = errors.New("another body under the key")
	errInProgress = errors.New("the key is claimed")
)

type querier interface {
	QueryRow(context.Context, string, ...any) pgx.Row
}

// kept reads the stored answer of an earlier request, and refuses a different request.
func kept(ctx context.Context, db querier, sql, key string, sum []byte) (*answer, error) {
	var fingerprint []byte
	var status *int
	var location *string
	var a answer
	if err := db.QueryRow(ctx, sql, scope, key).Scan(&fingerprint, &status, &location, &a.Body); err != nil {
		return nil, fmt.Errorf("read the key: %w", err)
	}
	switch {
	case string(fingerprint) != string(sum):
		return nil, errChanged
	case status == nil || location == nil:
		return nil, errInProgress
	}
	a.Status, a.Location = *status, *location
	return &a, nil
}

func sumOf(r *http.Request, body []byte) []byte {
	f := idempotency.NewFingerprintV1(r.Method, r.URL.EscapedPath(), r.URL.RawQuery, r.Header.Get("Content-Type"), body)
	return f.Sum[:]
}

// insertFirst inserts the claimed key before the work and updates it with the answer afterwards, in
// one transaction. A second request waits at the primary key until the first has ended.
func insertFirst(ctx context.Context, pool *pgxpool.Pool, key string, sum []byte, t *transfer) (*answer, error) {
	return committed(ctx, pool, func(tx pgx.Tx) (*answer, error) {
		tag, err := tx.Exec(ctx, sqlInsertFirst, scope, key, sum)
		if err != nil {
			return nil, fmt.Errorf("insert the key: %w", err)
		}
		if tag.RowsAffected() == 0 {
			return kept(ctx, tx, sqlInsertRead, key, sum)
		}
		a, err := batch(ctx, tx, t)
		if err != nil {
			return nil, err
		}
		if _, err := tx.Exec(ctx, sqlUpdateLast, scope, key, a.Status, a.Location, a.Body); err != nil {
			return nil, fmt.Errorf("update the key: %w", err)
		}
		return a, nil
	})
}

// lease claims the key in one transaction, works in another and stores the answer in a third. If
// the process is killed between the last two, a retry pays twice after the lease has expired.
func lease(ctx context.Context, pool *pgxpool.Pool, key string, sum []byte, t *transfer) (*answer, error) {
	tag, err := pool.Exec(ctx, sqlLeaseClaim, scope, key, sum)
	if err != nil {
		return nil, fmt.Errorf("claim: %w", err)
	}
	if tag.RowsAffected() == 0 {
		a, err := kept(ctx, pool, sqlLeaseRead, key, sum)
		if !errors.Is(err, errInProgress) {
			return a, err
		}
		tag, err := pool.Exec(ctx, sqlLeaseTake, scope, key, sum)
		if err != nil || tag.RowsAffected() == 0 {
			return nil, errors.Join(errInProgress, err)
		}
	}
	a, err := committed(ctx, pool, func(tx pgx.Tx) (*answer, error) { return batch(ctx, tx, t) })
	if err != nil {
		return nil, err
	}
	if _, err := pool.Exec(ctx, sqlLeaseStore, scope, key, a.Status, a.Location, a.Body); err != nil {
		return nil, fmt.Errorf("store: %w", err)
	}
	return a, nil
}
