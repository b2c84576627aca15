-- The opening data. A migration runs once and under a lock, so two banks that start on one database
-- seed it once.
INSERT INTO accounts (id, currency, opening_balance, balance) VALUES
    ('alice', 'EUR', 10000000, 10000000),
    ('bob',   'EUR', 10000000, 10000000);

INSERT INTO accounts (id, currency, opening_balance, balance)
SELECT 'acct-' || lpad(n::text, 4, '0'), 'EUR', 100000, 100000
FROM generate_series(0, 999) AS n;

-- The last teapot shows the out-of-stock answer.
INSERT INTO products (sku, name, price, currency, stock) VALUES
    ('coffee',  'Coffee beans, 1 kg',   1890, 'EUR', 1000000),
    ('mug',     'Enamel mug',           1250, 'EUR', 1000000),
    ('grinder', 'Hand grinder',         8900, 'EUR', 10000),
    ('teapot',  'Teapot, the last one', 4500, 'EUR', 1);
