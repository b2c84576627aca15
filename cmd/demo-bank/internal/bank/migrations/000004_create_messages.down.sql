DROP SCHEMA demo_statements CASCADE;
DROP TABLE consumers, addresses;
ALTER TABLE topups DROP COLUMN message_id;
ALTER TABLE orders DROP COLUMN message_id;
ALTER TABLE transfers DROP COLUMN message_id;
