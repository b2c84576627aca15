module github.com/paidonce/idempotency/contrib/echo4

go 1.26.0

require (
	github.com/labstack/echo/v4 v4.12.0
	github.com/paidonce/idempotency v0.0.0-00010101000000-000000000000
)

require (
	github.com/dunglas/httpsfv v1.1.0 // indirect
	github.com/labstack/gommon v0.4.2 // indirect
	github.com/mattn/go-colorable v0.1.13 // indirect
	github.com/mattn/go-isatty v0.0.20 // indirect
	github.com/valyala/bytebufferpool v1.0.0 // indirect
	github.com/valyala/fasttemplate v1.2.2 // indirect
	golang.org/x/crypto v0.22.0 // indirect
	golang.org/x/net v0.24.0 // indirect
	golang.org/x/sys v0.38.0 // indirect
	golang.org/x/text v0.41.0 // indirect
)

replace github.com/paidonce/idempotency => ../..
