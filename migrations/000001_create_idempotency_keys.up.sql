-- The records of executed attempts: one INSERT per key. The reaper deletes expired rows. Only an
-- operator changes a row's expiry, or deletes a row that has not expired; nothing changes an answer.
--
-- Names are not qualified, so that the table is created in the first schema of the search_path.
-- Fixed widths come first, so that no byte of a row is padding.
CREATE TABLE idempotency_keys (
    created_at          timestamptz NOT NULL,
    expires_at          timestamptz NOT NULL,
    status              smallint    NOT NULL,
    fingerprint_version smallint    NOT NULL,
    attempt_id          uuid        NOT NULL,
    -- "C": an upgrade of the C library can't reorder the index. That would hide a record, and its
    -- handler would run again.
    scope               text COLLATE "C" NOT NULL,
    key                 text COLLATE "C" NOT NULL,
    fingerprint         bytea       NOT NULL,
    headers             bytea       NOT NULL,
    body                bytea       NOT NULL,
    trace_id            text COLLATE "C",

    -- The last guard: even if all else fails, no key is recorded twice.
    CONSTRAINT idempotency_keys_pkey PRIMARY KEY (scope, key),
    CONSTRAINT idempotency_keys_status_check CHECK (status BETWEEN 200 AND 599)
);

-- Bodies over 2 kB are compressed. lz4 is much faster than pglz, but some servers lack it.
DO $$
BEGIN
    ALTER TABLE idempotency_keys ALTER COLUMN body SET COMPRESSION lz4;
EXCEPTION WHEN feature_not_supported OR invalid_parameter_value THEN
    NULL;
END
$$;

-- Rows are inserted and deleted, hardly ever updated: vacuum follows the reaper's deletes.
ALTER TABLE idempotency_keys SET (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_insert_scale_factor = 0.2);

COMMENT ON TABLE idempotency_keys IS 'Answers of executed requests, committed with the writes that they report. A row is a promise to a client until expires_at: do not update or delete it by hand.';
COMMENT ON COLUMN idempotency_keys.created_at IS 'Start of the transaction that recorded the answer, by this server''s clock.';
COMMENT ON COLUMN idempotency_keys.expires_at IS 'From then on the reaper may delete the row. Until it does, the row counts.';
COMMENT ON COLUMN idempotency_keys.status IS 'HTTP status of the answer. 4xx is a declined request: the handler''s writes were undone.';
COMMENT ON COLUMN idempotency_keys.fingerprint_version IS 'The function that made the fingerprint: 1 is built in, 100 and up are the service''s own.';
COMMENT ON COLUMN idempotency_keys.attempt_id IS 'Random id of the attempt that was executed. The service''s rows may carry it too.';
COMMENT ON COLUMN idempotency_keys.scope IS 'The account whose key it is.';
COMMENT ON COLUMN idempotency_keys.key IS 'The Idempotency-Key as the client sent it, unquoted.';
COMMENT ON COLUMN idempotency_keys.fingerprint IS 'SHA-256 of the request: a retry must match it.';
COMMENT ON COLUMN idempotency_keys.headers IS 'Recorded headers of the answer: a version byte, a count, then length-prefixed names and values.';
COMMENT ON COLUMN idempotency_keys.body IS 'Body of the answer, as every replay repeats it.';
COMMENT ON COLUMN idempotency_keys.trace_id IS 'Trace of the attempt that was executed.';
