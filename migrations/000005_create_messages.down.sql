-- Messages that no broker has yet would be lost.
DO $$
BEGIN
    IF EXISTS (SELECT FROM message_outbox) THEN
        RAISE EXCEPTION 'there are messages that were not delivered: run a relay until the outbox is empty';
    END IF;
END
$$;
DROP TABLE message_outbox;
