package migrations_test

import (
	"context"
	"fmt"
	"os"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/migrations"
)

// A deployment brings the schema up to date before the service starts.
func ExampleUp() {
	ctx := context.Background()
	pool, err := pgxpool.New(ctx, os.Getenv("DATABASE_URL"))
	if err != nil {
		panic(err)
	}
	defer pool.Close()
	options := &migrations.Options{Schema: "payments"} // nil is the schema public
	if err := migrations.Up(ctx, pool, options); err != nil {
		panic(err)
	}
	version, err := migrations.Version(ctx, pool, options)
	if err != nil {
		panic(err)
	}
	fmt.Println(version == migrations.Latest)
}
