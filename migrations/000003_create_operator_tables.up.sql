-- What operators did to records, and, where a service writes it, the history of its keys. No request needs either: a
-- service of this release runs on version 2 as well.
--
-- Both tables hold scopes and keys as they are, and so want the same protection as idempotency_keys.
CREATE TABLE idempotency_audit (
    id                bigint      GENERATED ALWAYS AS IDENTITY,
    at                timestamptz NOT NULL DEFAULT clock_timestamp(),
    action            text COLLATE "C" NOT NULL,
    actor             text        NOT NULL,
    database_role     text        NOT NULL DEFAULT session_user,
    reason            text        NOT NULL,
    scope             text COLLATE "C" NOT NULL,
    key               text COLLATE "C" NOT NULL,
    attempt_id        uuid        NOT NULL,
    status            smallint    NOT NULL,
    record_created_at timestamptz NOT NULL,
    record_expires_at timestamptz NOT NULL,

    CONSTRAINT idempotency_audit_pkey PRIMARY KEY (id),
    CONSTRAINT idempotency_audit_action_check CHECK (action IN ('expire', 'delete')),
    CONSTRAINT idempotency_audit_actor_check CHECK (actor <> ''),
    CONSTRAINT idempotency_audit_reason_check CHECK (reason <> '')
);

-- What was done to one key.
CREATE INDEX idempotency_audit_key_idx ON idempotency_audit (scope, key, id);

COMMENT ON TABLE idempotency_audit IS 'What operators did to records by hand, committed together with the deed. Rows are added and never changed.';
COMMENT ON COLUMN idempotency_audit.at IS 'When, by this server''s clock.';
COMMENT ON COLUMN idempotency_audit.action IS 'expire: the record''s time was ended, and the reaper takes it. delete: it was deleted at once. A retry runs again after either.';
COMMENT ON COLUMN idempotency_audit.actor IS 'Who, as the tool was told.';
COMMENT ON COLUMN idempotency_audit.database_role IS 'The role that the session logged in with.';
COMMENT ON COLUMN idempotency_audit.reason IS 'Why, in the actor''s words.';
COMMENT ON COLUMN idempotency_audit.scope IS 'The account whose key it was.';
COMMENT ON COLUMN idempotency_audit.key IS 'The key as the client sent it, unquoted.';
COMMENT ON COLUMN idempotency_audit.attempt_id IS 'Attempt whose record it was. The service''s rows may carry it too: this is how to find what the request did.';
COMMENT ON COLUMN idempotency_audit.status IS 'HTTP status of the answer that was recorded.';
COMMENT ON COLUMN idempotency_audit.record_created_at IS 'When the answer was recorded.';
COMMENT ON COLUMN idempotency_audit.record_expires_at IS 'When the record would have expired.';

CREATE TABLE idempotency_events (
    id          bigint      GENERATED ALWAYS AS IDENTITY,
    at          timestamptz NOT NULL,
    duration_us bigint      NOT NULL,
    outcome     text COLLATE "C" NOT NULL,
    reason      text COLLATE "C",
    attempts    integer     NOT NULL,
    attempt_id  uuid,
    scope       text COLLATE "C" NOT NULL,
    key         text COLLATE "C" NOT NULL,
    trace_id    text COLLATE "C",

    CONSTRAINT idempotency_events_pkey PRIMARY KEY (id)
);

-- The history of one key.
CREATE INDEX idempotency_events_key_idx ON idempotency_events (scope, key, id);

-- Rows only come and go: nothing is updated.
ALTER TABLE idempotency_events SET (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_insert_scale_factor = 0.2);

COMMENT ON TABLE idempotency_events IS 'Requests as services saw them end, where one writes its history (package observe/history). Written after the fact and not in the request''s transaction: some may be missing. Nothing is decided by it, and rows may be deleted.';
COMMENT ON COLUMN idempotency_events.at IS 'When the request ended, by the service''s clock.';
COMMENT ON COLUMN idempotency_events.duration_us IS 'How long it took, in microseconds.';
COMMENT ON COLUMN idempotency_events.outcome IS 'What the client was told: executed, replayed, in-progress, mismatch, not-executed or unknown.';
COMMENT ON COLUMN idempotency_events.reason IS 'Why there was no answer; NULL where there was one.';
COMMENT ON COLUMN idempotency_events.attempts IS 'How many attempts the request began.';
COMMENT ON COLUMN idempotency_events.attempt_id IS 'Of a replay: the attempt whose answer was repeated. Else the request''s last own one; NULL where it began none.';
COMMENT ON COLUMN idempotency_events.scope IS 'The account whose key it is.';
COMMENT ON COLUMN idempotency_events.key IS 'The key as the client sent it, unquoted.';
COMMENT ON COLUMN idempotency_events.trace_id IS 'Trace of this request.';
