package postgres

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

var _ idempotency.EffectReader = (*Store)(nil)

// EffectsByKey implements [idempotency.EffectReader].
func (s *Store) EffectsByKey(ctx context.Context, derivedKeys []string) ([]idempotency.EffectRecord, error) {
	ids := make([]pgtype.UUID, 0, len(derivedKeys))
	for _, key := range derivedKeys {
		if id, err := parseUUID(key); err == nil {
			ids = append(ids, pgtype.UUID{Bytes: id, Valid: true})
		}
	}
	return s.effectRecords(ctx, s.open.byKey, ids)
}

// EffectsBetween implements [idempotency.EffectReader].
func (s *Store) EffectsBetween(ctx context.Context, names []string, from, to time.Time, after string, max int) ([]idempotency.EffectRecord, error) {
	var id pgtype.UUID
	if after != "" {
		var err error
		if id.Bytes, err = parseUUID(after); err != nil {
			return nil, fail("read the effects", idempotency.ErrAborted, err)
		}
		id.Valid = true
	}
	return s.effectRecords(ctx, s.open.between, names, from, to, id, max)
}

func (s *Store) effectRecords(ctx context.Context, sql string, args ...any) ([]idempotency.EffectRecord, error) {
	rows, err := s.pool.Query(ctx, sql, append([]any{pgx.QueryExecModeExec}, args...)...)
	if err != nil {
		return nil, fail("read the effects", idempotency.ErrUnavailable, wire.SQLError(err))
	}
	records, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (r idempotency.EffectRecord, err error) {
		var attempt pgtype.UUID
		err = row.Scan(&r.Key.Scope, &r.Key.Value, &attempt, &r.Name, &r.Kind, &r.State, &r.DerivedKey, &r.Input, &r.Output, &r.Tries, &r.Panics, &r.SentFirst)
		r.Attempt = attempt.Bytes
		return r, err
	})
	if err != nil {
		return nil, fail("read the effects", idempotency.ErrUnavailable, wire.SQLError(err))
	}
	return records, nil
}
