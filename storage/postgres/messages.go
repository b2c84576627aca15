package postgres

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// MessageUse is something that a service does with messages: see [Store.CheckMessages].
type MessageUse string

// The uses.
const (
	UsePublish MessageUse = "publish" // message.Publish in its handlers
	UseRelay   MessageUse = "relay"   // a relay of the outbox: [Store.Outbox]
	UseConsume MessageUse = "consume" // a consumer of a broker: [Store.Inbox]
	UseQueue   MessageUse = "queue"   // a consumer of a topic of the outbox: [Store.Queue]
)

// messageRights are the rights that a use needs, by table.
var messageRights = []struct {
	use    MessageUse
	table  string
	rights []string
}{
	{UsePublish, OutboxTable, []string{"INSERT"}},
	{UseRelay, OutboxTable, []string{"SELECT", "UPDATE", "DELETE"}},
	{UseConsume, TableName, []string{"SELECT", "INSERT"}},
	{UseConsume, OffsetsTable, []string{"SELECT", "INSERT", "UPDATE"}},
	{UseConsume, ParkedTable, []string{"SELECT", "INSERT", "UPDATE", "DELETE"}},
	{UseQueue, TableName, []string{"SELECT", "INSERT"}},
	{UseQueue, OutboxTable, []string{"SELECT", "DELETE"}},
	{UseQueue, OffsetsTable, []string{"SELECT", "INSERT", "UPDATE"}},
	{UseQueue, ParkedTable, []string{"SELECT", "INSERT", "UPDATE", "DELETE"}},
}

// CheckMessages returns an error if messages could be lost in this database, or if the pool's role
// lacks a right for a use of the service. It requires the tables of migration 5: plain logged
// ones with their primary keys, without rules and BEFORE ROW triggers, and without row-level
// security that hides rows from the role; and the role's rights for each use. Without a use it
// checks only the tables.
//
// The error joins all faults that it finds, and wraps [ErrSchemaOutdated], [ErrTableUnlogged],
// [ErrTableUnsafe], [ErrRowSecurityActive] or [ErrRightMissing]. A service with messages calls it
// in addition to [Store.Check]; others need neither the tables nor the rights.
func (s *Store) CheckMessages(ctx context.Context, uses ...MessageUse) error {
	ctx, cancel := context.WithTimeout(ctx, s.options.AcquireTimeout+s.options.StatementTimeout)
	defer cancel()
	needed := map[string][]string{} // rights, by table
	for _, use := range uses {
		known := false
		for _, r := range messageRights {
			if r.use == use {
				known = true
				needed[r.table] = append(needed[r.table], r.rights...)
			}
		}
		if !known {
			return fmt.Errorf("check: %q is no use of messages: publish, relay, consume or queue", use)
		}
	}
	var wrong []error
	for _, table := range []string{TableName, OutboxTable, OffsetsTable, ParkedTable} {
		if table == TableName && len(needed[table]) == 0 {
			continue
		}
		found, err := s.checkMessageTable(ctx, table, needed[table])
		if err != nil {
			return fmt.Errorf("check: %w", reachError(err))
		}
		wrong = append(wrong, found...)
	}
	return errors.Join(wrong...)
}

// checkMessageTable returns the faults of a table. Those of the records' table itself are
// [Store.Check]'s.
func (s *Store) checkMessageTable(ctx context.Context, table string, needed []string) (wrong []error, err error) {
	name := pgx.Identifier{s.options.Schema, table}.Sanitize()
	var there, plain, logged, keyed, hidden bool
	var rules, triggers, missing []string
	var role string
	err = s.pool.QueryRow(ctx, `
		SELECT c.oid IS NOT NULL, COALESCE(c.relkind = 'r', false), COALESCE(c.relpersistence = 'p', false),
		       EXISTS (SELECT FROM pg_constraint AS k WHERE k.conrelid = c.oid AND k.contype = 'p' AND NOT k.condeferrable AND k.conname = $2),
		       COALESCE(row_security_active(c.oid), false), quote_ident(current_user),
		       ARRAY(SELECT quote_ident(rulename) FROM pg_rewrite WHERE ev_class = c.oid AND ev_enabled <> 'D' AND rulename <> '_RETURN' ORDER BY 1),
		       ARRAY(SELECT quote_ident(tgname) FROM pg_trigger WHERE tgrelid = c.oid AND NOT tgisinternal AND tgenabled <> 'D' AND tgtype & 3 = 3 ORDER BY 1), -- BEFORE, ROW
		       ARRAY(SELECT r FROM unnest($3::text[]) WITH ORDINALITY AS r(r, at) WHERE c.oid IS NOT NULL AND NOT has_table_privilege(c.oid, r) ORDER BY at)
		FROM (SELECT to_regclass($1) AS oid) AS named LEFT JOIN pg_class AS c ON c.oid = named.oid`, pgx.QueryExecModeExec, name, table+"_pkey", needed).
		Scan(&there, &plain, &logged, &keyed, &hidden, &role, &rules, &triggers, &missing)
	if err != nil {
		return nil, err
	}
	add := func(sentinel error, remedy string, args ...any) {
		wrong = append(wrong, fmt.Errorf("check: %w: %s", sentinel, fmt.Sprintf(remedy, args...)))
	}
	switch {
	case !there:
		add(ErrSchemaOutdated, "table %s is missing, and messages need it: run the migrations", name)
		return wrong, nil
	case table == TableName:
	case !plain:
		add(ErrSchemaOutdated, "%s is not a plain table: while no service runs, put a plain one in its place", name)
	case !logged:
		add(ErrTableUnlogged, "a crash empties it, and its messages are lost: ALTER TABLE %s SET LOGGED", name)
	case !keyed:
		add(ErrSchemaOutdated, "table %s has no primary key %s_pkey, so a message may be handled twice: restore it as the migration has it", name, table)
	}
	if table != TableName {
		for _, rule := range rules {
			add(ErrTableUnsafe, "rule %s rewrites its statements: DROP RULE %[1]s ON %s", rule, name)
		}
		for _, trigger := range triggers {
			add(ErrTableUnsafe, "trigger %s may drop or change a message: ALTER TABLE %s DISABLE TRIGGER %[1]s, and write an AFTER trigger in its place", trigger, name)
		}
	}
	if hidden && len(needed) > 0 {
		wrong = append(wrong, fmt.Errorf("check: %w", rowSecurity(name, role)))
	}
	if slices.Sort(missing); len(missing) > 0 {
		missing = slices.Compact(missing)
		add(ErrRightMissing, "messages need it: GRANT %s ON %s TO %s", strings.Join(missing, ", "), name, role)
	}
	return wrong, nil
}
