module github.com/paidonce/idempotency/contrib/echo5

go 1.26.0

require (
	github.com/labstack/echo/v5 v5.3.1
	github.com/paidonce/idempotency v0.0.0-00010101000000-000000000000
)

require github.com/dunglas/httpsfv v1.1.0 // indirect

replace github.com/paidonce/idempotency => ../..
