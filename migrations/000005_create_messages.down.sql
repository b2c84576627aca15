-- Messages that no broker has yet would be lost.
DO $$
BEGIN
    IF EXISTS (SELECT FROM message_outbox) THEN
        RAISE EXCEPTION 'there are messages that were not delivered: run a relay until the outbox is empty';
    END IF;
    IF EXISTS (SELECT FROM message_parked) THEN
        RAISE EXCEPTION 'there are parked messages: redrive or drop them first (idemctl message parked)';
    END IF;
END
$$;
DROP TABLE message_parked;
DROP TABLE message_offsets;
DROP TABLE message_outbox;
