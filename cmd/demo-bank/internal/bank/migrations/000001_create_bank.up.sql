-- The books of the demo bank.
--
-- A row that a keyed request wrote carries the request's scope and key and the id of the attempt
-- that wrote it, so that the audit can compare the books with the recorded answers. All three are
-- null in other rows. An unprotected request has no attempt.

CREATE TABLE accounts (
    id              text COLLATE "C" NOT NULL,
    currency        text COLLATE "C" NOT NULL,
    opening_balance bigint      NOT NULL,
    -- No CHECK (balance >= 0): the funds check under the lock must prevent a negative balance, and
    -- the audit must see it if that check fails.
    balance         bigint      NOT NULL,
    created_at      timestamptz NOT NULL DEFAULT transaction_timestamp(),
    scope           text,
    key             text,
    attempt_id      uuid,

    CONSTRAINT accounts_pkey PRIMARY KEY (id)
);

CREATE TABLE products (
    sku      text COLLATE "C" NOT NULL,
    name     text   NOT NULL,
    price    bigint NOT NULL,
    currency text COLLATE "C" NOT NULL,
    stock    bigint NOT NULL,

    CONSTRAINT products_pkey PRIMARY KEY (sku),
    CONSTRAINT products_price_check CHECK (price > 0),
    CONSTRAINT products_stock_check CHECK (stock >= 0)
);

-- No unique constraint on (scope, key), on purpose: it would hide doubles from the audit.
CREATE TABLE transfers (
    id           bigint      NOT NULL,
    amount       bigint      NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT transaction_timestamp(),
    from_account text COLLATE "C" NOT NULL,
    to_account   text COLLATE "C" NOT NULL,
    currency     text COLLATE "C" NOT NULL,
    reference    text        NOT NULL,
    scope        text,
    key          text,
    attempt_id   uuid,

    CONSTRAINT transfers_pkey PRIMARY KEY (id),
    CONSTRAINT transfers_amount_check CHECK (amount > 0),
    CONSTRAINT transfers_from_account_fkey FOREIGN KEY (from_account) REFERENCES accounts (id),
    CONSTRAINT transfers_to_account_fkey FOREIGN KEY (to_account) REFERENCES accounts (id)
);

-- For the list of one account's transfers, page by page.
CREATE INDEX transfers_from_account_id_idx ON transfers (from_account, id);
CREATE INDEX transfers_to_account_id_idx ON transfers (to_account, id);

-- No unique constraint on (scope, key) here either.
CREATE TABLE orders (
    id         bigint      NOT NULL,
    quantity   bigint      NOT NULL,
    amount     bigint      NOT NULL,
    created_at timestamptz NOT NULL DEFAULT transaction_timestamp(),
    account    text COLLATE "C" NOT NULL,
    sku        text COLLATE "C" NOT NULL,
    currency   text COLLATE "C" NOT NULL,
    scope      text,
    key        text,
    attempt_id uuid,

    CONSTRAINT orders_pkey PRIMARY KEY (id),
    CONSTRAINT orders_quantity_check CHECK (quantity > 0),
    CONSTRAINT orders_account_fkey FOREIGN KEY (account) REFERENCES accounts (id),
    CONSTRAINT orders_sku_fkey FOREIGN KEY (sku) REFERENCES products (sku)
);

-- The ledger: two entries for each transfer and each order, one negative and one positive.
CREATE TABLE entries (
    id          bigint GENERATED ALWAYS AS IDENTITY,
    transfer_id bigint,
    order_id    bigint,
    amount      bigint NOT NULL,
    account     text COLLATE "C" NOT NULL,

    CONSTRAINT entries_pkey PRIMARY KEY (id),
    CONSTRAINT entries_transfer_id_fkey FOREIGN KEY (transfer_id) REFERENCES transfers (id),
    CONSTRAINT entries_order_id_fkey FOREIGN KEY (order_id) REFERENCES orders (id),
    CONSTRAINT entries_account_fkey FOREIGN KEY (account) REFERENCES accounts (id),
    CONSTRAINT entries_move_check CHECK (num_nonnulls(transfer_id, order_id) = 1)
);

COMMENT ON TABLE accounts IS 'Accounts, shared by all tenants. balance = opening_balance + the sum of the account''s entries.';
COMMENT ON COLUMN accounts.balance IS 'Minor units. Changes only together with two entries, under a lock on the row.';
COMMENT ON TABLE transfers IS 'Executed transfers. The id is a snowflake.';
COMMENT ON COLUMN transfers.attempt_id IS 'The attempt that made the transfer: the same as in idempotency_keys. Null for an unprotected transfer.';
COMMENT ON TABLE orders IS 'Executed orders. The id is a snowflake.';
COMMENT ON TABLE entries IS 'The ledger. The sum of all entries is 0, and so is the sum of the two of each transfer or order.';
