-- An open request may have moved money: it is ended first.
DO $$
BEGIN
    IF EXISTS (SELECT FROM idempotency_open) THEN
        RAISE EXCEPTION 'there are open requests: end them first (idemctl effect list)';
    END IF;
END
$$;
DROP TABLE idempotency_effects;
DROP TABLE idempotency_open;
