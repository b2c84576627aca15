package migrations_test

import (
	"context"
	"fmt"
	"os"

	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
)

// A deployment brings the schema up to date before the service starts.
func ExampleUp() {
	ctx := context.Background()
	store, err := postgres.Open(ctx, os.Getenv("DATABASE_URL"), nil)
	if err != nil {
		panic(err)
	}
	defer store.Close()
	if err := migrations.Up(ctx, store, nil); err != nil {
		panic(err)
	}
	version, err := migrations.Version(ctx, store, nil)
	if err != nil {
		panic(err)
	}
	fmt.Println(version == migrations.Latest)
}
