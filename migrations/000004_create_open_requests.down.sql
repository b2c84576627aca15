-- Open requests may have moved money, so they must end first.
DO $$
BEGIN
    IF EXISTS (SELECT FROM idempotency_open) THEN
        RAISE EXCEPTION 'there are open requests: end them first (idemctl effect list)';
    END IF;
END
$$;
DROP TRIGGER idempotency_keys_delete_guard ON idempotency_keys;
DROP TRIGGER idempotency_keys_expire_guard ON idempotency_keys;
DROP TRIGGER idempotency_keys_truncate_guard ON idempotency_keys;
DROP FUNCTION idempotency_keys_guard();
DROP TABLE idempotency_effects;
DROP TABLE idempotency_open;
-- The rows of acts on open requests stay, so the constraint counts only for new ones.
ALTER TABLE idempotency_audit
    DROP CONSTRAINT idempotency_audit_action_check,
    DROP COLUMN effect,
    DROP COLUMN effects,
    ADD CONSTRAINT idempotency_audit_action_check CHECK (action IN ('expire', 'delete')) NOT VALID;
COMMENT ON COLUMN idempotency_audit.action IS 'expire: the record expired at once, and the reaper deletes it. delete: the record was deleted at once. After either deletion a retry runs again.';
COMMENT ON COLUMN idempotency_audit.status IS 'HTTP status of the recorded answer.';
