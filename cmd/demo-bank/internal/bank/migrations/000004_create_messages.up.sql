-- The messages about transfers, orders and top-ups, and the tables of their consumers.

-- The id of the row's message. It is null if the row has none: it was written before this
-- migration, or by a request without the middleware.
ALTER TABLE transfers ADD COLUMN message_id uuid;
ALTER TABLE orders ADD COLUMN message_id uuid;
ALTER TABLE topups ADD COLUMN message_id uuid;

-- Where the processes of the bank find each other.
CREATE TABLE addresses (
    name  text COLLATE "C" NOT NULL,
    value text NOT NULL,

    CONSTRAINT addresses_pkey PRIMARY KEY (name)
);

-- Counts of handled and dropped messages that no record shows.
CREATE TABLE consumers (
    name    text COLLATE "C" NOT NULL,
    handled bigint NOT NULL DEFAULT 0,
    copies  bigint NOT NULL DEFAULT 0,

    CONSTRAINT consumers_pkey PRIMARY KEY (name)
);

-- Only the consumer "statements" writes the projection, as if it were another service's.
CREATE SCHEMA demo_statements;

-- No unique constraint, on purpose: it would hide doubles from the audit.
CREATE TABLE demo_statements.entries (
    id       bigint GENERATED ALWAYS AS IDENTITY,
    amount   bigint      NOT NULL,
    at       timestamptz NOT NULL,
    account  text COLLATE "C" NOT NULL,
    transfer text COLLATE "C" NOT NULL,

    CONSTRAINT entries_pkey PRIMARY KEY (id)
);

-- For the statement of one account, in the order of its moves.
CREATE INDEX entries_account_at_idx ON demo_statements.entries (account, at, id);

COMMENT ON COLUMN transfers.message_id IS 'The id of the message about the transfer. Null if there is none.';
COMMENT ON COLUMN orders.message_id IS 'The id of the message about the order. Null if there is none.';
COMMENT ON COLUMN topups.message_id IS 'The id of the message about the top-up. Null if there is none.';
COMMENT ON TABLE addresses IS 'psp: URL of the processor. brokers: host:port of the Kafka brokers, separated by commas. The last bank that was started wrote them.';
COMMENT ON TABLE consumers IS 'Counts of consumers. The messages that were handled with an inbox have a record each instead.';
COMMENT ON COLUMN consumers.handled IS 'Messages that were handled without an inbox, copies included.';
COMMENT ON COLUMN consumers.copies IS 'Messages that were dropped because they had been handled before. A count may be missing after a crash.';
COMMENT ON TABLE demo_statements.entries IS 'Projection of the moves of money, from messages.';
COMMENT ON COLUMN demo_statements.entries.amount IS 'Minor units.';
COMMENT ON COLUMN demo_statements.entries.at IS 'Time of the move, in the books.';
COMMENT ON COLUMN demo_statements.entries.transfer IS 'Id of the transfer, order or top-up.';
