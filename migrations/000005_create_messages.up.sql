-- Messages that were published and are not yet with the broker. The transaction of the handler writes
-- a row, and a relay deletes it after the broker has confirmed the message. If the topic is a queue,
-- the transaction of its consumer deletes the row. Services that publish nothing need no relay.
--
-- The table contains bodies of messages: protect it like idempotency_keys.
CREATE TABLE message_outbox (
    id         bigint      GENERATED ALWAYS AS IDENTITY,
    created_at timestamptz NOT NULL,
    shard      smallint    NOT NULL,
    message_id uuid        NOT NULL,
    topic      text COLLATE "C" NOT NULL,
    key        bytea,
    refused    text,
    headers    bytea       NOT NULL,
    body       bytea       NOT NULL,

    CONSTRAINT message_outbox_pkey PRIMARY KEY (shard, id)
);

-- For the messages that wait behind a refused one. An index can't hold a key of 3 KiB, so it has the
-- key's hash.
CREATE INDEX message_outbox_refused_idx ON message_outbox (shard, topic, sha256(key)) WHERE refused IS NOT NULL;

COMMENT ON TABLE message_outbox IS 'Messages that were published and are not yet with the broker. Do not delete a row by hand: nobody would get the message.';
COMMENT ON COLUMN message_outbox.id IS 'Order of the messages in a shard.';
COMMENT ON COLUMN message_outbox.created_at IS 'Time of the publication, by this server''s clock.';
COMMENT ON COLUMN message_outbox.shard IS 'Part of the outbox, from topic and key. One relay at a time empties a shard.';
COMMENT ON COLUMN message_outbox.message_id IS 'The message''s id, the same for every run of the request that published it.';
COMMENT ON COLUMN message_outbox.topic IS 'Topic at the broker.';
COMMENT ON COLUMN message_outbox.key IS 'Messages with one topic and key keep their order; NULL if there is none to keep.';
COMMENT ON COLUMN message_outbox.refused IS 'The broker''s reason for which it will never take the message; NULL unless it refused it. Later messages of its topic and key wait behind it.';
COMMENT ON COLUMN message_outbox.headers IS 'The headers, encoded as in idempotency_keys.';
COMMENT ON COLUMN message_outbox.body IS 'The body as it was published.';

-- The position of each consumer in each partition of its sources. The transaction that has the effects
-- of the messages moves it, so it is never ahead of the effects or behind them.
CREATE TABLE message_offsets (
    next_offset bigint      NOT NULL,
    updated_at  timestamptz NOT NULL,
    incarnation uuid        NOT NULL,
    attempt_id  uuid        NOT NULL,
    partition   integer     NOT NULL,
    deaths      integer     NOT NULL,
    consumer    text COLLATE "C" NOT NULL,
    source      text COLLATE "C" NOT NULL,

    CONSTRAINT message_offsets_pkey PRIMARY KEY (consumer, source, partition)
) WITH (fillfactor = 50); -- room for updates on the same page

COMMENT ON TABLE message_offsets IS 'The position of each consumer in each partition. It goes back with a restore of the database, as the effects do; then the messages are consumed again.';
COMMENT ON COLUMN message_offsets.next_offset IS 'Offset of the next message; negative until the first commit.';
COMMENT ON COLUMN message_offsets.updated_at IS 'Time at which the position was moved.';
COMMENT ON COLUMN message_offsets.incarnation IS 'The source''s own id, which differs if it was recreated; zero if it has none.';
COMMENT ON COLUMN message_offsets.attempt_id IS 'The batch that moved the position last.';
COMMENT ON COLUMN message_offsets.partition IS 'Number of the partition.';
COMMENT ON COLUMN message_offsets.deaths IS 'Number of processes that began a batch here and did not end it, since the position was moved last.';
COMMENT ON COLUMN message_offsets.consumer IS 'Name of the consumer.';
COMMENT ON COLUMN message_offsets.source IS 'Topic or stream.';

-- Messages that a consumer could not handle, and those that wait behind them.
CREATE TABLE message_parked (
    id         bigint      GENERATED ALWAYS AS IDENTITY,
    parked_at  timestamptz NOT NULL,
    not_before timestamptz,
    position   bigint      NOT NULL,
    partition  integer     NOT NULL,
    attempts   integer     NOT NULL,
    state      smallint    NOT NULL,
    consumer   text COLLATE "C" NOT NULL,
    message_id text COLLATE "C" NOT NULL,
    source     text COLLATE "C" NOT NULL,
    topic      text COLLATE "C" NOT NULL,
    error      text        NOT NULL,
    key        bytea,
    headers    bytea       NOT NULL,
    body       bytea       NOT NULL,

    CONSTRAINT message_parked_pkey PRIMARY KEY (consumer, message_id)
);

-- For the order within a key, of which the index has a hash, and for the search for due messages.
CREATE INDEX message_parked_key_idx ON message_parked (consumer, topic, sha256(key), id);
CREATE INDEX message_parked_due_idx ON message_parked (consumer, not_before) WHERE state = 1;

COMMENT ON TABLE message_parked IS 'Messages that a consumer could not handle. They wait for another try, behind another message, or for a person. Do not delete a row by hand: the message would be lost.';
COMMENT ON COLUMN message_parked.id IS 'Order of the messages of a key.';
COMMENT ON COLUMN message_parked.parked_at IS 'Time at which the message was parked.';
COMMENT ON COLUMN message_parked.not_before IS 'Time of the next try; NULL unless the message waits for one.';
COMMENT ON COLUMN message_parked.position IS 'Offset of the message.';
COMMENT ON COLUMN message_parked.partition IS 'Number of its partition.';
COMMENT ON COLUMN message_parked.attempts IS 'Number of tries that have failed or begun, since the message came or was redriven last; or of processes that died in it.';
COMMENT ON COLUMN message_parked.state IS '1: waiting for its next try. 2: behind another parked message of its key. 3: dead, until a person redrives or drops it.';
COMMENT ON COLUMN message_parked.consumer IS 'Name of the consumer.';
COMMENT ON COLUMN message_parked.message_id IS 'The message''s id.';
COMMENT ON COLUMN message_parked.source IS 'Topic or stream that it came from.';
COMMENT ON COLUMN message_parked.topic IS 'The message''s topic.';
COMMENT ON COLUMN message_parked.error IS 'Why the last try failed.';
COMMENT ON COLUMN message_parked.key IS 'The message''s key; NULL if it has none.';
COMMENT ON COLUMN message_parked.headers IS 'The headers, encoded as in idempotency_keys.';
COMMENT ON COLUMN message_parked.body IS 'The body as it came.';

-- Acts on messages. The scope of such an act is message: and the consumer's name, or for a message in
-- the outbox its topic. The key is the message's id.
ALTER TABLE idempotency_audit
    DROP CONSTRAINT idempotency_audit_action_check,
    ADD COLUMN message jsonb,
    ADD CONSTRAINT idempotency_audit_action_check CHECK (action IN ('expire', 'delete',
        'settle-done', 'settle-declined', 'settle-not-sent', 'settle-retry', 'resume', 'park', 'abandon',
        'redrive', 'drop', 'outbox-retry', 'outbox-drop'));
COMMENT ON COLUMN idempotency_audit.action IS 'expire: the record expired at once, and the reaper deletes it. delete: the record was deleted at once. After either deletion a retry runs again. On an open request: settle-...: what was known about an effect. resume: it became due. park: it was left to a person. abandon: it was deleted without an answer, and a retry runs again. On a message that a consumer had parked: redrive: it became due, under its id. drop: it was deleted, and is never handled. On one in the outbox: outbox-retry: the broker gets it again. outbox-drop: it was deleted, and is never published.';
COMMENT ON COLUMN idempotency_audit.scope IS 'The account whose key it was; of a message: message: and its consumer, or its topic in the outbox.';
COMMENT ON COLUMN idempotency_audit.key IS 'The key as the client sent it, unquoted; or the id of the message.';
COMMENT ON COLUMN idempotency_audit.attempt_id IS 'Attempt that made the record. The service''s rows may carry it too: find the effects of the request by it. Zero for a message.';
COMMENT ON COLUMN idempotency_audit.status IS 'HTTP status of the recorded answer; 0 for an open request and for a message.';
COMMENT ON COLUMN idempotency_audit.record_created_at IS 'Time at which the answer was recorded; of a message, the time at which it was parked or published.';
COMMENT ON COLUMN idempotency_audit.record_expires_at IS 'Time at which the record would have expired; of a message, the time at which it was parked or published.';
COMMENT ON COLUMN idempotency_audit.message IS 'The message before the act, without its key, headers and body.';
