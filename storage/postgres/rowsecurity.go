package postgres

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency/storage/postgres/internal/wire"
)

// ErrRowSecurityActive is returned if row-level security applies to one of our tables: a record may
// be there although the look-up does not see it. PostgreSQL does not report whether a policy hides
// a row, so every policy that applies to the role counts.
//
// Each look-up reads row_security_active in the same statement. A connection on which row-level
// security applied no longer caches plans: a plan that was made with policies keeps them after
// ALTER ROLE ... BYPASSRLS, while row_security_active then reports that none applies.
var ErrRowSecurityActive = errors.New("row-level security may hide rows")

// ErrEncodingUnsafe is returned by [Store.Check] if the database's encoding is neither UTF8 nor
// SQL_ASCII: some, such as EUC_JP, convert two different texts of a client to the same one, and two
// scopes would share a record.
var ErrEncodingUnsafe = errors.New("the database's encoding may make one key of two")

// rowSecurity returns the error for a table, with its remedy. An empty role means the connection's.
func rowSecurity(table, role string) error {
	if role == "" {
		role = "..."
	}
	return fmt.Errorf("%w: ALTER TABLE %s DISABLE ROW LEVEL SECURITY, or ALTER ROLE %s BYPASSRLS", ErrRowSecurityActive, table, role)
}

// checkAbsence reports conditions in which a look-up could miss a record: row-level security, and
// an encoding that is not one to one.
func (s *Store) checkAbsence(ctx context.Context) (wrong []error) {
	var role, encoding string
	var hidden *bool
	err := s.pool.QueryRow(ctx, "SELECT current_user::text, current_setting('server_encoding'), row_security_active(to_regclass($1)::oid)",
		pgx.Identifier{s.options.Schema, TableName}.Sanitize()).Scan(&role, &encoding, &hidden)
	if err != nil {
		return []error{wire.SQLError(err)}
	}
	if hidden != nil && *hidden {
		wrong = append(wrong, rowSecurity(s.table, pgx.Identifier{role}.Sanitize()))
	}
	if encoding != "UTF8" && encoding != "SQL_ASCII" {
		wrong = append(wrong, fmt.Errorf("%w: it is %s: dump the database and restore it into one made by CREATE DATABASE ... ENCODING 'UTF8' LOCALE 'C' TEMPLATE template0", ErrEncodingUnsafe, encoding))
	}
	return wrong
}
