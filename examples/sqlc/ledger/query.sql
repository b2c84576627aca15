-- name: MoveMoney :many
UPDATE ledger.accounts
SET balance = balance + CASE name WHEN @payer::text THEN -@amount::bigint ELSE @amount::bigint END
WHERE name IN (@payer::text, @payee::text)
RETURNING name, balance;

-- name: CreateTransfer :one
INSERT INTO ledger.transfers (payer, payee, amount) VALUES ($1, $2, $3) RETURNING id, payer, payee, amount;

-- name: ListTransfers :many
SELECT id, payer, payee, amount FROM ledger.transfers WHERE payer = $1 OR payee = $1 ORDER BY id;
