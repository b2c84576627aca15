-- It would lose messages that no broker has yet, and parked ones.
DO $$
BEGIN
    IF EXISTS (SELECT FROM message_outbox) THEN
        RAISE EXCEPTION 'there are messages that were not delivered: run a relay until the outbox is empty';
    END IF;
    IF EXISTS (SELECT FROM message_parked) THEN
        RAISE EXCEPTION 'there are parked messages: redrive or drop them first (idemctl message parked)';
    END IF;
    -- Without its position a consumer begins with the oldest message that the broker has.
    IF EXISTS (SELECT FROM message_offsets WHERE next_offset >= 0) THEN
        RAISE EXCEPTION 'there are positions of consumers: if none of these will run again, delete the rows of message_offsets first';
    END IF;
END
$$;
DROP TABLE message_parked;
DROP TABLE message_offsets;
DROP TABLE message_outbox;
-- The rows of acts on messages stay, so the constraint applies only to new rows.
ALTER TABLE idempotency_audit
    DROP CONSTRAINT idempotency_audit_action_check,
    DROP COLUMN message,
    ADD CONSTRAINT idempotency_audit_action_check CHECK (action IN ('expire', 'delete',
        'settle-done', 'settle-declined', 'settle-not-sent', 'settle-retry', 'resume', 'park', 'abandon')) NOT VALID;
COMMENT ON COLUMN idempotency_audit.action IS 'expire: the record expired at once, and the reaper deletes it. delete: the record was deleted at once. After either deletion a retry runs again. On an open request: settle-...: what was known about an effect. resume: it became due. park: it was left to a person. abandon: it was deleted without an answer, and a retry runs again.';
COMMENT ON COLUMN idempotency_audit.scope IS 'The account whose key it was.';
COMMENT ON COLUMN idempotency_audit.key IS 'The key as the client sent it, unquoted.';
COMMENT ON COLUMN idempotency_audit.attempt_id IS 'Attempt that made the record. The service''s rows may carry it too: find the effects of the request by it.';
COMMENT ON COLUMN idempotency_audit.status IS 'HTTP status of the recorded answer; 0 for an open request.';
COMMENT ON COLUMN idempotency_audit.record_created_at IS 'Time at which the answer was recorded.';
COMMENT ON COLUMN idempotency_audit.record_expires_at IS 'Time at which the record would have expired.';
