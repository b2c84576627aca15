-- name: Deposit :one
UPDATE ledger.accounts SET balance = balance + $2 WHERE name = $1 RETURNING name, balance;
