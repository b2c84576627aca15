-- Messages that were published and are not yet with the broker. A row is written by the transaction
-- of the handler, and deleted by a relay after the broker has confirmed the message. Services that
-- publish nothing need no relay.
--
-- The table contains bodies of messages: protect it like idempotency_keys.
CREATE TABLE message_outbox (
    id         bigint      GENERATED ALWAYS AS IDENTITY,
    created_at timestamptz NOT NULL,
    shard      smallint    NOT NULL,
    message_id uuid        NOT NULL,
    topic      text COLLATE "C" NOT NULL,
    key        bytea,
    parked     text,
    headers    bytea       NOT NULL,
    body       bytea       NOT NULL,

    CONSTRAINT message_outbox_pkey PRIMARY KEY (shard, id)
);

-- For the messages that wait behind a parked one.
CREATE INDEX message_outbox_parked_idx ON message_outbox (shard, topic, key) WHERE parked IS NOT NULL;

COMMENT ON TABLE message_outbox IS 'Messages that were published and are not yet with the broker. Do not delete a row by hand: nobody would get the message.';
COMMENT ON COLUMN message_outbox.id IS 'Order of the messages in a shard.';
COMMENT ON COLUMN message_outbox.created_at IS 'Time of the publication, by this server''s clock.';
COMMENT ON COLUMN message_outbox.shard IS 'Part of the outbox, from topic and key. One relay at a time empties a shard.';
COMMENT ON COLUMN message_outbox.message_id IS 'The message''s id, the same for every run of the request that published it.';
COMMENT ON COLUMN message_outbox.topic IS 'Where the message goes.';
COMMENT ON COLUMN message_outbox.key IS 'Messages with one topic and key keep their order; NULL if there is none to keep.';
COMMENT ON COLUMN message_outbox.parked IS 'Why the broker will never take the message; NULL unless it does. Later messages of its topic and key wait behind it.';
COMMENT ON COLUMN message_outbox.headers IS 'The headers, encoded as in idempotency_keys.';
COMMENT ON COLUMN message_outbox.body IS 'The body as it was published.';
