-- The requests that call the processor: top-ups, payouts and receipts.
--
-- The bank has accounts of its own, one of each kind per currency, which no client can name.
-- bank:processor:EUR has the money that came in or went out, and is negative if more came in.
-- bank:held:EUR has the money that is held for payouts. So the sum of all balances never changes.

-- No unique constraint on (scope, key) or on the processor's id, on purpose: it would hide doubles
-- from the audit.
CREATE TABLE topups (
    id         bigint      NOT NULL,
    amount     bigint      NOT NULL,
    created_at timestamptz NOT NULL DEFAULT transaction_timestamp(),
    account    text COLLATE "C" NOT NULL,
    charge     text COLLATE "C" NOT NULL,
    instance   text COLLATE "C" NOT NULL,
    scope      text,
    key        text,
    attempt_id uuid,

    CONSTRAINT topups_pkey PRIMARY KEY (id),
    CONSTRAINT topups_amount_check CHECK (amount > 0),
    CONSTRAINT topups_account_fkey FOREIGN KEY (account) REFERENCES accounts (id)
);

CREATE TABLE payouts (
    id         bigint      NOT NULL,
    amount     bigint      NOT NULL,
    created_at timestamptz NOT NULL DEFAULT transaction_timestamp(),
    ended_at   timestamptz,
    state      text COLLATE "C" NOT NULL,
    account    text COLLATE "C" NOT NULL,
    payout     text COLLATE "C",
    instance   text COLLATE "C",
    scope      text,
    key        text,
    attempt_id uuid,

    CONSTRAINT payouts_pkey PRIMARY KEY (id),
    CONSTRAINT payouts_amount_check CHECK (amount > 0),
    CONSTRAINT payouts_state_check CHECK (state IN ('held', 'posted', 'released')),
    CONSTRAINT payouts_ended_at_check CHECK ((state = 'held') = (ended_at IS NULL)),
    CONSTRAINT payouts_payout_check CHECK (state <> 'posted' OR payout IS NOT NULL AND instance IS NOT NULL),
    CONSTRAINT payouts_account_fkey FOREIGN KEY (account) REFERENCES accounts (id)
);

CREATE TABLE receipts (
    id          bigint      NOT NULL,
    transfer_id bigint      NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT transaction_timestamp(),
    sent        text COLLATE "C" NOT NULL,
    scope       text,
    key         text,
    attempt_id  uuid,

    CONSTRAINT receipts_pkey PRIMARY KEY (id),
    CONSTRAINT receipts_sent_check CHECK (sent IN ('yes', 'maybe')),
    CONSTRAINT receipts_transfer_id_fkey FOREIGN KEY (transfer_id) REFERENCES transfers (id)
);

-- Secrets that all processes of the bank share.
CREATE TABLE secrets (
    name  text COLLATE "C" NOT NULL,
    value bytea NOT NULL,

    CONSTRAINT secrets_pkey PRIMARY KEY (name)
);
INSERT INTO secrets (name, value)
VALUES ('operations', decode(replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', ''), 'hex'));

ALTER TABLE entries
    ADD COLUMN topup_id  bigint,
    ADD COLUMN payout_id bigint,
    ADD CONSTRAINT entries_topup_id_fkey FOREIGN KEY (topup_id) REFERENCES topups (id),
    ADD CONSTRAINT entries_payout_id_fkey FOREIGN KEY (payout_id) REFERENCES payouts (id),
    DROP CONSTRAINT entries_move_check,
    ADD CONSTRAINT entries_move_check CHECK (num_nonnulls(transfer_id, order_id, topup_id, payout_id) = 1);

COMMENT ON TABLE topups IS 'Top-ups: a card was charged, and the account credited. The id is a snowflake.';
COMMENT ON COLUMN topups.charge IS 'The processor''s id of the charge.';
COMMENT ON COLUMN topups.instance IS 'The instance of the processor that made the charge. Its ids mean nothing to another one.';
COMMENT ON COLUMN topups.attempt_id IS 'The attempt that began the top-up: the same as in idempotency_keys.';
COMMENT ON TABLE payouts IS 'Payouts. The amount is held from the start on. The id is a snowflake.';
COMMENT ON COLUMN payouts.ended_at IS 'When it was posted or released.';
COMMENT ON COLUMN payouts.state IS 'held: it is under way. posted: the processor made it. released: the processor refused it, and the account has the amount back.';
COMMENT ON COLUMN payouts.payout IS 'The processor''s id of the payout, if it was made.';
COMMENT ON TABLE receipts IS 'Mails about transfers, each sent once at most. The id is a snowflake.';
COMMENT ON COLUMN receipts.sent IS 'yes, or maybe: the mail service was asked once, and gave no answer.';
COMMENT ON TABLE secrets IS 'operations: makes the ids of /v1/operations, which nobody can guess.';
COMMENT ON TABLE entries IS 'The ledger. The sum of all entries is 0, and so is the sum of those of each transfer, order, top-up or payout.';
