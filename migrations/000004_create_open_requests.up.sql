-- Requests that call other services. Such a request is open from the commit of its first intent to
-- the commit of its answer: its row in idempotency_keys has status 0 and no answer, and it has one
-- row in idempotency_open, and one in idempotency_effects for each call or phase. Services without
-- such routes need neither table.
--
-- Both tables contain scopes, keys and requests: protect them like idempotency_keys.
CREATE TABLE idempotency_open (
    next_at     timestamptz NOT NULL,
    started_at  timestamptz NOT NULL,
    resumed_at  timestamptz,
    epoch       bigint      NOT NULL,
    lease_ms    bigint      NOT NULL,
    ttl_ms      bigint      NOT NULL,
    runs        integer     NOT NULL,
    owned       boolean     NOT NULL,
    scope       text COLLATE "C" NOT NULL,
    key         text COLLATE "C" NOT NULL,
    route       text COLLATE "C" NOT NULL,
    parked      text,
    last_reason text,
    request     bytea       NOT NULL,

    CONSTRAINT idempotency_open_pkey PRIMARY KEY (scope, key)
) WITH (fillfactor = 60); -- room for updates on the same page

-- For the completer's search for due requests.
CREATE INDEX idempotency_open_next_at_idx ON idempotency_open (next_at) WHERE parked IS NULL;

COMMENT ON TABLE idempotency_open IS 'Requests that have called another service, or were about to, and have no answer yet. Do not delete a row by hand: money may have moved.';
COMMENT ON COLUMN idempotency_open.next_at IS 'Time from which anybody may take the request over.';
COMMENT ON COLUMN idempotency_open.started_at IS 'Time of the first intent''s commit, by this server''s clock.';
COMMENT ON COLUMN idempotency_open.resumed_at IS 'Last time that an operator made it due; NULL if none did. A request is parked for its age from here on, or from started_at.';
COMMENT ON COLUMN idempotency_open.epoch IS 'Differs for each owner, so that a replaced owner can''t write any more.';
COMMENT ON COLUMN idempotency_open.lease_ms IS 'Length of an owner''s lease, in milliseconds.';
COMMENT ON COLUMN idempotency_open.ttl_ms IS 'Time that the record will count after the end of the request, in milliseconds.';
COMMENT ON COLUMN idempotency_open.runs IS 'Number of times that the handler was run.';
COMMENT ON COLUMN idempotency_open.owned IS 'Whether an attempt runs, or died within its lease.';
COMMENT ON COLUMN idempotency_open.scope IS 'The account whose key it is.';
COMMENT ON COLUMN idempotency_open.key IS 'The Idempotency-Key as the client sent it, unquoted.';
COMMENT ON COLUMN idempotency_open.route IS 'Name and version of the handler that a run needs.';
COMMENT ON COLUMN idempotency_open.parked IS 'Why only a person can end the request; NULL if nobody needs to.';
COMMENT ON COLUMN idempotency_open.last_reason IS 'Why the last run left the request open.';
COMMENT ON COLUMN idempotency_open.request IS 'The request that a run starts from.';

CREATE TABLE idempotency_effects (
    sent_first_at timestamptz NOT NULL,
    doubt_at      timestamptz,
    settled_at    timestamptz,
    epoch         bigint      NOT NULL,
    tries         integer     NOT NULL,
    panics        integer     NOT NULL,
    state         smallint    NOT NULL,
    kind          smallint    NOT NULL,
    derived_key   uuid        NOT NULL,
    scope         text COLLATE "C" NOT NULL,
    key           text COLLATE "C" NOT NULL,
    name          text COLLATE "C" NOT NULL,
    input         bytea       NOT NULL,
    output        bytea,

    CONSTRAINT idempotency_effects_pkey PRIMARY KEY (scope, key, name)
) WITH (fillfactor = 70);

-- For results that come in a webhook or in the other service's list.
CREATE INDEX idempotency_effects_derived_key_idx ON idempotency_effects (derived_key);

COMMENT ON TABLE idempotency_effects IS 'Calls to other services that requests made, or were about to make, and committed phases. They are deleted with the record of their request.';
COMMENT ON COLUMN idempotency_effects.sent_first_at IS 'Commit of the intent, just before the first send, by this server''s clock.';
COMMENT ON COLUMN idempotency_effects.doubt_at IS 'Time of the last repeated send without a definite answer.';
COMMENT ON COLUMN idempotency_effects.settled_at IS 'Time at which the result was recorded.';
COMMENT ON COLUMN idempotency_effects.epoch IS 'The owner of the request that wrote the row last.';
COMMENT ON COLUMN idempotency_effects.tries IS 'Number of times that it may have been sent.';
COMMENT ON COLUMN idempotency_effects.panics IS 'Number of times that its send panicked.';
COMMENT ON COLUMN idempotency_effects.state IS '1 intended: it may have been sent. 2 done. 3 declined. 4 maybe: sent once at most, and its result will never be known.';
COMMENT ON COLUMN idempotency_effects.kind IS '1 call, 2 call at most once, 3 undo of another, 4 phase.';
COMMENT ON COLUMN idempotency_effects.derived_key IS 'The key that the other service gets.';
COMMENT ON COLUMN idempotency_effects.scope IS 'The account whose key it is.';
COMMENT ON COLUMN idempotency_effects.key IS 'The Idempotency-Key as the client sent it, unquoted.';
COMMENT ON COLUMN idempotency_effects.name IS 'The name of the effect in the handler.';
COMMENT ON COLUMN idempotency_effects.input IS 'Input of the call, as it is sent every time.';
COMMENT ON COLUMN idempotency_effects.output IS 'Result of the call; of a declined one, its detail. Of an intended one, the result that an operator stated, which the next run checks.';

-- The effects are deleted with the record, whoever deletes it: otherwise they would answer for a
-- new request with the same key. Nobody can expire or delete the key of an open request; a program
-- of an older release that tries gets an error. Foreign keys would run a statement for each deleted
-- record; this function runs two for each statement. It has the owner's rights, because a reaper
-- has none on these tables.
CREATE OR REPLACE FUNCTION idempotency_keys_guard() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    deleted text := CASE TG_OP WHEN 'DELETE' THEN 'deleted' ELSE format('%I.%I', TG_TABLE_SCHEMA, TG_TABLE_NAME) END;
    open boolean := true; -- on UPDATE the trigger's condition says so
BEGIN
    IF TG_OP <> 'UPDATE' THEN
        EXECUTE format('SELECT EXISTS (SELECT FROM %s JOIN %I.idempotency_open USING (scope, key))', deleted, TG_TABLE_SCHEMA) INTO open;
    END IF;
    IF open THEN
        RAISE EXCEPTION 'an open request is neither expired nor deleted, because it may have moved money: end it first (idemctl effect list)'
            USING ERRCODE = 'restrict_violation';
    END IF;
    EXECUTE format('DELETE FROM %I.idempotency_effects AS e USING %s AS d WHERE e.scope = d.scope AND e.key = d.key', TG_TABLE_SCHEMA, deleted);
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION idempotency_keys_guard() FROM PUBLIC; -- so that nobody can put it on their own tables
CREATE TRIGGER idempotency_keys_delete_guard AFTER DELETE ON idempotency_keys
    REFERENCING OLD TABLE AS deleted FOR EACH STATEMENT EXECUTE FUNCTION idempotency_keys_guard();
CREATE TRIGGER idempotency_keys_expire_guard AFTER UPDATE OF expires_at ON idempotency_keys
    FOR EACH ROW WHEN (OLD.status = 0 AND NEW.status = 0) EXECUTE FUNCTION idempotency_keys_guard();
CREATE TRIGGER idempotency_keys_truncate_guard BEFORE TRUNCATE ON idempotency_keys
    FOR EACH STATEMENT EXECUTE FUNCTION idempotency_keys_guard();

-- Acts on open requests.
ALTER TABLE idempotency_audit
    DROP CONSTRAINT idempotency_audit_action_check,
    ADD COLUMN effect  text COLLATE "C",
    ADD COLUMN effects jsonb,
    ADD CONSTRAINT idempotency_audit_action_check CHECK (action IN ('expire', 'delete',
        'settle-done', 'settle-declined', 'settle-not-sent', 'settle-retry', 'resume', 'park', 'abandon'));
COMMENT ON COLUMN idempotency_audit.action IS 'expire: the record expired at once, and the reaper deletes it. delete: the record was deleted at once. After either deletion a retry runs again. On an open request: settle-...: what was known about an effect. resume: it became due. park: it was left to a person. abandon: it was deleted without an answer, and a retry runs again.';
COMMENT ON COLUMN idempotency_audit.status IS 'HTTP status of the recorded answer; 0 for an open request.';
COMMENT ON COLUMN idempotency_audit.effect IS 'Name of the effect that was settled.';
COMMENT ON COLUMN idempotency_audit.effects IS 'The effects of the open request before the act, without their inputs and outputs.';
