-- What operators did, and the history of keys, is lost by this. No record is.
DROP TABLE idempotency_events;
DROP TABLE idempotency_audit;
