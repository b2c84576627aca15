-- The acts of operators on records, and the history of keys if a service writes one. No request
-- needs either table: a service of this release runs on version 2 too.
--
-- Both tables contain scopes and keys unchanged: protect them like idempotency_keys.
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

-- The acts on one key.
CREATE INDEX idempotency_audit_key_idx ON idempotency_audit (scope, key, id);

COMMENT ON TABLE idempotency_audit IS 'Acts of operators on records, each committed together with its row here. Rows are added and never changed.';
COMMENT ON COLUMN idempotency_audit.at IS 'Time of the act, by this server''s clock.';
COMMENT ON COLUMN idempotency_audit.action IS 'expire: the record expired at once, and the reaper deletes it. delete: the record was deleted at once. After either deletion a retry runs again.';
COMMENT ON COLUMN idempotency_audit.actor IS 'The person who acted, as given to the tool.';
COMMENT ON COLUMN idempotency_audit.database_role IS 'The role that the session logged in with.';
COMMENT ON COLUMN idempotency_audit.reason IS 'The reason, in the actor''s words.';
COMMENT ON COLUMN idempotency_audit.scope IS 'The account whose key it was.';
COMMENT ON COLUMN idempotency_audit.key IS 'The key as the client sent it, unquoted.';
COMMENT ON COLUMN idempotency_audit.attempt_id IS 'Attempt that made the record. The service''s rows may carry it too: find the effects of the request by it.';
COMMENT ON COLUMN idempotency_audit.status IS 'HTTP status of the recorded answer.';
COMMENT ON COLUMN idempotency_audit.record_created_at IS 'Time at which the answer was recorded.';
COMMENT ON COLUMN idempotency_audit.record_expires_at IS 'Time at which the record would have expired.';

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

-- Rows are inserted and deleted, never updated.
ALTER TABLE idempotency_events SET (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_insert_scale_factor = 0.2);

COMMENT ON TABLE idempotency_events IS 'Ends of requests, if a service writes its history (package observe/history). Written after the request and outside of its transaction, so some may be missing. No decision depends on them, and rows may be deleted.';
COMMENT ON COLUMN idempotency_events.at IS 'Time at which the request ended, by the service''s clock.';
COMMENT ON COLUMN idempotency_events.duration_us IS 'Duration of the request in microseconds.';
COMMENT ON COLUMN idempotency_events.outcome IS 'Outcome sent to the client: executed, replayed, in-progress, mismatch, not-executed or unknown.';
COMMENT ON COLUMN idempotency_events.reason IS 'Reason why there was no answer; NULL if there was one.';
COMMENT ON COLUMN idempotency_events.attempts IS 'Number of attempts that the request began.';
COMMENT ON COLUMN idempotency_events.attempt_id IS 'For a replay, the attempt that recorded the answer. Otherwise the request''s last own attempt; NULL if it began none.';
COMMENT ON COLUMN idempotency_events.scope IS 'The account whose key it is.';
COMMENT ON COLUMN idempotency_events.key IS 'The key as the client sent it, unquoted.';
COMMENT ON COLUMN idempotency_events.trace_id IS 'Trace of this request.';
