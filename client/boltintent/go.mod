module github.com/paidonce/idempotency/client/boltintent

go 1.26.0

require (
	github.com/paidonce/idempotency v0.0.0-00010101000000-000000000000
	go.etcd.io/bbolt v1.4.0
	golang.org/x/sys v0.38.0
)

require (
	github.com/dunglas/httpsfv v1.1.0 // indirect
	github.com/google/uuid v1.6.0 // indirect
)

replace github.com/paidonce/idempotency => ../..
