-- The money is gone after this.
DROP TABLE entries, orders, transfers, products, accounts;
