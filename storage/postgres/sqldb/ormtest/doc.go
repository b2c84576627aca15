// Package ormtest tests package sqldb with the libraries that it is for: sqlx, GORM, ent, bun,
// go-jet, sqlc's output for database/sql and River. It is a module of its own, so that users of
// sqldb don't depend on them.
package ormtest
