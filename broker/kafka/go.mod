module github.com/paidonce/idempotency/broker/kafka

go 1.26.0

require github.com/paidonce/idempotency v0.0.0

replace github.com/paidonce/idempotency => ../..
