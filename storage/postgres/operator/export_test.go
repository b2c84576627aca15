package operator

import (
	"context"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

// CursorOf returns the cursor of a place.
func CursorOf(scope, key string) Cursor { return (&listQuery{scope: scope, key: key}).cursor() }

// ExplainList runs a page's first statement and returns its plan.
func (o *Operator) ExplainList(t testing.TB, filter Filter, page Page) string {
	t.Helper()
	q, err := o.listQuery(filter, page)
	if err != nil {
		t.Fatal(err)
	}
	var plan []string
	err = o.read(t.Context(), func(ctx context.Context, tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, orderByKey); err != nil {
			return err
		}
		sql, arguments := q.sql(o.examineFirst(q))
		rows, err := tx.Query(ctx, "EXPLAIN (ANALYZE, BUFFERS, TIMING off) "+sql, arguments...)
		if err != nil {
			return err
		}
		plan, err = pgx.CollectRows(rows, pgx.RowTo[string])
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(plan, "\n")
}
