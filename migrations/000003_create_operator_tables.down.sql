-- This deletes the operators' acts and the history of keys, but no record.
DROP TABLE idempotency_events;
DROP TABLE idempotency_audit;
