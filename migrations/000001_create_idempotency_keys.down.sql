-- Every retry of an executed request runs again after this.
DROP TABLE idempotency_keys;
