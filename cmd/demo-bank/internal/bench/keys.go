package bench

import (
	"context"
	"fmt"
	"net/http"
	"time"
)

// fillRowsMax is the maximum number of rows of one INSERT.
const fillRowsMax = 100_000

// filled describes a filled table, so that each of its records can be requested.
type filled struct {
	keys int64
	from int64 // milliseconds of the first key
	body []byte
}

// fillBefore is the age of the first key of a full table. The keys are spread evenly over this
// time.
const fillBefore = 24 * time.Hour

// keyOf returns the key of the i-th record. It has the form of a UUIDv7: 48 bits of the time in
// milliseconds, and then a unique part. The SQL of fill makes the same key.
func (f *filled) keyOf(i int64) string {
	return keyAt(f.from+i*fillBefore.Milliseconds()/f.keys, i)
}

func keyAt(ms, i int64) string {
	when, tail := fmt.Sprintf("%012x", ms), fmt.Sprintf("%012x", i*2654435761%(1<<48))
	return when[:8] + "-" + when[8:] + "-7" + fmt.Sprintf("%03x", i%4096) + "-8" + fmt.Sprintf("%03x", i/4096%4096) + "-" + tail
}

// sqlFill makes the records with the numbers from $4 to $5, as copies of one record. $1 is its key,
// $2 the milliseconds of the first record, $3 the total number of records. $6 is added to the time
// of expiry.
const sqlFill = `
	INSERT INTO %[1]s (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body, trace_id)
	SELECT r.created_at, r.expires_at + $6::interval, r.status, r.fingerprint_version, gen_random_uuid(), r.scope,
	       substr(k.time, 1, 8) || '-' || substr(k.time, 9) || '-7' || lpad(to_hex(i %% 4096), 3, '0') || '-8' || lpad(to_hex(i / 4096 %% 4096), 3, '0') || '-' ||
	       lpad(to_hex(i * 2654435761 %% 281474976710656), 12, '0'),
	       r.fingerprint, r.headers, r.body, r.trace_id
	FROM %[1]s r, generate_series($4::bigint, $5::bigint) AS i, LATERAL (SELECT lpad(to_hex($2::bigint + i * 86400000 / $3::bigint), 12, '0') AS time) k
	WHERE r.key = $1
	ORDER BY i`

// fill fills a table with records of one answer, in the order of their keys.
func (r *run) fill(ctx context.Context, keys int64) error {
	f := &filled{keys: keys, from: time.Now().Add(-fillBefore).UnixMilli(), body: transferBody(nil, 1, 2, 1, 1)}
	if err := r.copies(ctx, schemaOf(keys), replayOld, f, "0"); err != nil {
		return err
	}
	if r.filled == nil {
		r.filled = map[int64]*filled{}
	}
	r.filled[keys] = f
	return nil
}

// copies makes one record by a request, and all others of a table from it.
func (r *run) copies(ctx context.Context, schema, route string, f *filled, later string) error {
	b := &Block{Clients: 1, PoolSize: 1}
	if err := r.set(ctx, b, []string{schema}, []string{route}); err != nil {
		return err
	}
	c := r.clients(1)[0]
	defer c.close()
	const first = "the-one-that-is-copied"
	if err := c.post(ctx, "/"+schema+"/"+route, first, f.body); err != nil {
		return err
	}
	if c.reply.status != http.StatusCreated {
		return fmt.Errorf("it was answered with %d", c.reply.status)
	}
	table := tableOf(schema)
	for from := int64(0); from < f.keys; from += fillRowsMax {
		r.enter("fill a table: %d of %d keys", from, f.keys)
		to := min(from+fillRowsMax, f.keys) - 1
		if _, err := r.cluster.admin.Exec(ctx, fmt.Sprintf(sqlFill, table), first, f.from, f.keys, from, to, later); err != nil {
			return fmt.Errorf("fill the table: %w", err)
		}
	}
	for _, sql := range []string{"VACUUM (ANALYZE) " + table, "CHECKPOINT"} {
		if _, err := r.cluster.admin.Exec(ctx, sql); err != nil {
			return fmt.Errorf("fill the table: %w", err)
		}
	}
	return nil
}

// keysEntries are a fresh request, a replay of a new record, and a replay of any record, each on
// the full table and on one that is empty except for this block's own rows.
func (r *run) keysEntries(ctx context.Context, b *Block, clients []*client) ([]*entry, error) {
	f := r.filled[b.Keys]
	schemas := []string{schemaOf(0), schemaOf(b.Keys)}
	if err := r.set(ctx, b, schemas, []string{"ours-batch", "replay-database", replayOld}); err != nil {
		return nil, err
	}
	var entries []*entry
	for i, keys := range []int64{0, b.Keys} {
		for _, name := range []string{"ours-batch", "replay-database"} {
			e, err := r.entry(ctx, b, clients, designOf(name), schemas[i], keys)
			if err != nil {
				return nil, err
			}
			entries = append(entries, e)
		}
	}
	e, err := r.entry(ctx, b, clients, designOf(replayOld), schemas[1], b.Keys)
	if err != nil {
		return nil, err
	}
	e.target.oldMax, e.target.old = f.keys, func(i int64) record { return record{key: f.keyOf(i), body: f.body} }
	return append(entries, e), nil
}
