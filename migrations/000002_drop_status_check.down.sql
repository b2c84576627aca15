-- NOT VALID: PostgreSQL does not check existing rows, which it would do under a lock that blocks
-- requests. The store has checked each of them.
ALTER TABLE idempotency_keys ADD CONSTRAINT idempotency_keys_status_check CHECK (status BETWEEN 200 AND 599) NOT VALID;
