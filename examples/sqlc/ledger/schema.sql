CREATE SCHEMA IF NOT EXISTS ledger;
CREATE TABLE IF NOT EXISTS ledger.accounts (
    name    text PRIMARY KEY,
    balance bigint NOT NULL
);
CREATE TABLE IF NOT EXISTS ledger.transfers (
    id     bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    payer  text NOT NULL REFERENCES ledger.accounts,
    payee  text NOT NULL REFERENCES ledger.accounts,
    amount bigint NOT NULL CHECK (amount > 0)
);
INSERT INTO ledger.accounts VALUES ('alice', 10000), ('bob', 0) ON CONFLICT DO NOTHING;
