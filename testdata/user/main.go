// Command user imports what most users import. Its go.mod and go.sum are those of a user's module:
// see TestUsersModuleGainsNothing.
package main

import (
	_ "github.com/paidonce/idempotency/middleware"
	_ "github.com/paidonce/idempotency/storage/postgres"
)

func main() {}
