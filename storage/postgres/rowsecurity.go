package postgres

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// ErrRowSecurity is returned where row-level security applies to a table of ours, and so to what is looked for in it: a
// record that is not seen may be there. PostgreSQL does not say whether a policy hides anything, so each policy counts
// that applies to the role.
//
// A statement that looks is asked for this in the same breath, and is not taken from a plan that was made before: one that
// was made with policies goes on with them after ALTER ROLE ... BYPASSRLS, while row_security_active says that none applies.
var ErrRowSecurity = errors.New("row-level security may hide rows")

// ErrEncoding is what [Store.Check] returns for a database in an encoding other than UTF8 and SQL_ASCII: some, such as
// EUC_JP, convert two texts of a client to one, and two scopes would share a record.
var ErrEncoding = errors.New("the database's encoding may make one key of two")

// rowSecurity is the error for a table, with its remedy. An empty role stands for that of the connection.
func rowSecurity(table, role string) error {
	if role == "" {
		role = "..."
	}
	return fmt.Errorf("%w: ALTER TABLE %s DISABLE ROW LEVEL SECURITY, or ALTER ROLE %s BYPASSRLS", ErrRowSecurity, table, role)
}

// checkAbsence reports what could make a look for a record miss one: row-level security, and an encoding that is not
// one to one.
func (s *Store) checkAbsence(ctx context.Context) (wrong []error) {
	var role, encoding string
	var hidden *bool
	err := s.pool.QueryRow(ctx, "SELECT current_user::text, current_setting('server_encoding'), row_security_active(to_regclass($1)::oid)",
		pgx.Identifier{s.options.Schema, TableName}.Sanitize()).Scan(&role, &encoding, &hidden)
	if err != nil {
		return []error{sqlError(err)}
	}
	if hidden != nil && *hidden {
		wrong = append(wrong, rowSecurity(s.table, pgx.Identifier{role}.Sanitize()))
	}
	if encoding != "UTF8" && encoding != "SQL_ASCII" {
		wrong = append(wrong, fmt.Errorf("%w: it is %s: dump the database and restore it into one made by CREATE DATABASE ... ENCODING 'UTF8' LOCALE 'C' TEMPLATE template0", ErrEncoding, encoding))
	}
	return wrong
}
