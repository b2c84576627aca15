package migrations_test

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"github.com/golang-migrate/migrate/v4"
	_ "github.com/golang-migrate/migrate/v4/database/pgx/v5"
	// The migrate program reads its files with it.
	_ "github.com/golang-migrate/migrate/v4/source/file"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/pgtest"
	"github.com/paidonce/idempotency/migrations"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// waitMax bounds the cleanup at the end of a test.
const waitMax = 30 * time.Second

// versionTable is the name under which the migrate program must keep the versions.
const versionTable = "idempotency_migrations"

// testBundle is an empty database.
type testBundle struct {
	url    string
	pool   *pgxpool.Pool
	schema string // of the tables; default: public
}

// on returns the store for a migration through a pool.
func (b *testBundle) on(pool *pgxpool.Pool) migrations.Store {
	return place{pool, cmp.Or(b.schema, "public")}
}

// place is a schema of any name. A *postgres.Store accepts fewer names.
type place struct {
	pool   *pgxpool.Pool
	schema string
}

func (p place) Pool() *pgxpool.Pool { return p.pool }
func (p place) Schema() string      { return p.schema }

func setup(t *testing.T) *testBundle {
	t.Helper()
	database := pgtest.Database(t)
	return &testBundle{url: database, pool: open(t, database, nil)}
}

// open opens a pool after change, or else postgres.Configure, has changed its config.
func open(t *testing.T, database string, change func(*pgxpool.Config)) *pgxpool.Pool {
	t.Helper()
	config, err := pgxpool.ParseConfig(database)
	if err != nil {
		t.Fatal(err)
	}
	if change == nil {
		change = func(config *pgxpool.Config) { postgres.Configure(config, nil) }
	}
	change(config)
	pool, err := pgxpool.NewWithConfig(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

// with returns the database's URL with a setting.
func (b *testBundle) with(t *testing.T, name, value string) string {
	t.Helper()
	address, err := url.Parse(b.url)
	if err != nil {
		t.Fatal(err)
	}
	query := address.Query()
	query.Set(name, value)
	address.RawQuery = query.Encode()
	return address.String()
}

func (b *testBundle) exec(t *testing.T, sql string, arguments ...any) {
	t.Helper()
	if _, err := b.pool.Exec(t.Context(), sql, arguments...); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
}

// strings returns a column of text.
func (b *testBundle) strings(t *testing.T, sql string, arguments ...any) []string {
	t.Helper()
	rows, err := b.pool.Query(t.Context(), sql, arguments...)
	if err != nil {
		t.Fatal(err)
	}
	values, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return values
}

func (b *testBundle) up(t *testing.T, opts *migrations.Options) {
	t.Helper()
	if err := migrations.Up(t.Context(), b.on(b.pool), opts); err != nil {
		t.Fatal(err)
	}
}

func (b *testBundle) wantVersion(t *testing.T, opts *migrations.Options, want uint) {
	t.Helper()
	if got, err := migrations.Version(t.Context(), b.on(b.pool), opts); err != nil || got != want {
		t.Errorf("version is %d, %v; want %d", got, err, want)
	}
}

// tables returns all tables, with their schemas.
func (b *testBundle) tables(t *testing.T) []string {
	t.Helper()
	return b.strings(t, `SELECT schemaname || '.' || tablename FROM pg_tables
		WHERE schemaname NOT IN ('pg_catalog', 'information_schema') ORDER BY 1`)
}

func (b *testBundle) wantTables(t *testing.T, want ...string) {
	t.Helper()
	if got := b.tables(t); !slices.Equal(got, want) {
		t.Errorf("tables are %v, want %v", got, want)
	}
}

// tablesOf returns the tables that Up makes in a schema, in order.
func tablesOf(schema string) []string {
	var tables []string
	for _, table := range []string{"audit", "effects", "events", "keys", "migrations", "open"} {
		tables = append(tables, schema+".idempotency_"+table)
	}
	for _, table := range []string{"offsets", "outbox", "parked"} {
		tables = append(tables, schema+".message_"+table)
	}
	return tables
}

// wantKeeps makes the store execute a request and replay it.
func wantKeeps(t *testing.T, pool *pgxpool.Pool, opts *postgres.Options) {
	t.Helper()
	store := postgres.New(pool, opts)
	if err := store.Check(t.Context()); err != nil {
		t.Error(err)
	}
	engine := idempotency.NewEngine(store, nil)
	key := uuid.NewString()
	for _, want := range []idempotency.Outcome{idempotency.OutcomeExecuted, idempotency.OutcomeReplayed} {
		if got := do(t.Context(), engine, key, 201); got.Outcome != want {
			t.Errorf("outcome is %s, %v; want %s", got.Outcome, got.Err, want)
		}
	}
}

func do(ctx context.Context, engine *idempotency.Engine, key string, status int) idempotency.Result {
	request := idempotency.Request{
		Key:         idempotency.Key{Scope: "acme", Value: key},
		Fingerprint: idempotency.NewFingerprintV1("POST", "/transfers", "", "", nil),
	}
	return engine.Do(ctx, request, func(context.Context) (*idempotency.Answer, error) {
		return &idempotency.Answer{Status: status, Body: []byte("done")}, nil
	})
}

func TestUpOnAnEmptyDatabase(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.wantVersion(t, nil, 0)
	b.up(t, nil)
	b.wantVersion(t, nil, migrations.Latest)
	b.wantTables(t, tablesOf("public")...)
	wantKeeps(t, b.pool, nil)
}

// A service that calls Up at each start loses no record.
func TestUpTwiceKeepsTheRecords(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.up(t, nil)
	engine := idempotency.NewEngine(postgres.New(b.pool, nil), nil)
	if got := do(t.Context(), engine, "k", 201); got.Outcome != idempotency.OutcomeExecuted {
		t.Fatal(got.Err)
	}
	b.up(t, nil)
	b.wantVersion(t, nil, migrations.Latest)
	if got := do(t.Context(), engine, "k", 201); got.Outcome != idempotency.OutcomeReplayed {
		t.Errorf("after a second Up the outcome is %s, %v", got.Outcome, got.Err)
	}
}

// Replicas that start together all call Up.
func TestUpFromManyProcessesAtOnce(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.upAtOnce(t, nil)
	b.wantVersion(t, nil, migrations.Latest)
	b.wantTables(t, tablesOf("public")...)
}

// upAtOnce calls Up four times at once, each on a pool of its own.
func (b *testBundle) upAtOnce(t *testing.T, opts *migrations.Options) {
	t.Helper()
	var wait sync.WaitGroup
	for range 4 {
		pool := open(t, b.url, nil)
		wait.Go(func() {
			if err := migrations.Up(t.Context(), b.on(pool), opts); err != nil {
				t.Error(err)
			}
		})
	}
	wait.Wait()
}

func TestDownAndUpAgain(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.up(t, nil)
	for range 2 { // the second finds nothing to undo
		if err := migrations.Down(t.Context(), b.on(b.pool), nil); err != nil {
			t.Fatal(err)
		}
		b.wantVersion(t, nil, 0)
		b.wantTables(t, "public.idempotency_migrations")
		if err := postgres.New(b.pool, nil).Check(t.Context()); !errors.Is(err, postgres.ErrSchemaOutdated) || !strings.Contains(err.Error(), "run the migrations") {
			t.Errorf("after Down, Check says %v", err)
		}
	}
	b.up(t, nil)
	wantKeeps(t, b.pool, nil)
}

// The operator's tables can be removed, and the records stay.
func TestDownTo(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.up(t, nil)
	engine := idempotency.NewEngine(postgres.New(b.pool, nil), nil)
	if got := do(t.Context(), engine, "k", 201); got.Outcome != idempotency.OutcomeExecuted {
		t.Fatal(got.Err)
	}
	for range 2 { // the second finds nothing to undo
		if err := migrations.DownTo(t.Context(), b.on(b.pool), postgres.SchemaVersion, nil); err != nil {
			t.Fatal(err)
		}
		b.wantVersion(t, nil, postgres.SchemaVersion)
		b.wantTables(t, "public.idempotency_keys", "public.idempotency_migrations")
		wantKeeps(t, b.pool, nil) // version 3 is not for services
	}
	if got := do(t.Context(), engine, "k", 201); got.Outcome != idempotency.OutcomeReplayed {
		t.Errorf("a retry is %s, %v", got.Outcome, got.Err)
	}
	if err := migrations.DownTo(t.Context(), b.on(b.pool), 0, nil); err != nil {
		t.Fatal(err)
	}
	b.wantTables(t, "public.idempotency_migrations")
	b.exec(t, "INSERT INTO idempotency_migrations VALUES (3, true)")
	if err := migrations.DownTo(t.Context(), b.on(b.pool), 0, nil); !errors.Is(err, migrations.ErrDirty) {
		t.Errorf("of a dirty schema: %v", err)
	}
}

// What nobody could make again is not undone: the error names the remedy, nothing is changed, and
// once the rows are gone the way down is free.
func TestDownLosesNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.up(t, nil)
	for _, test := range []struct {
		table, insert string
		version       uint // that keeps the table
		remedy        string
	}{
		{"message_outbox", "(created_at, shard, message_id, topic, headers, body) VALUES (now(), 0, gen_random_uuid(), 't', '', '')", 5, "run a relay"},
		{"message_parked", "(parked_at, position, partition, attempts, state, consumer, message_id, source, topic, error, headers, body) VALUES (now(), 0, 0, 1, 3, 'c', 'id', 't', 't', '', '', '')", 5, "redrive or drop them first"},
		{"message_offsets", "VALUES (1, now(), gen_random_uuid(), gen_random_uuid(), 0, 0, 'c', 't')", 5, "delete the rows of message_offsets first"},
		{"idempotency_open", "(next_at, started_at, epoch, lease_ms, ttl_ms, runs, owned, scope, key, route, request) VALUES (now(), now(), 1, 1, 1, 1, false, 's', 'k', 'r', '')", 4, "end them first"},
	} {
		b.exec(t, "INSERT INTO "+test.table+" "+test.insert)
		err := migrations.DownTo(t.Context(), b.on(b.pool), postgres.SchemaVersion, nil)
		if err == nil || !strings.Contains(err.Error(), test.remedy) {
			t.Errorf("%s: %v, want the remedy %q", test.table, err, test.remedy)
		}
		b.wantVersion(t, nil, test.version)
		b.exec(t, "DELETE FROM "+test.table)
		if test.version == 5 {
			b.up(t, nil)
		}
	}
	if err := migrations.DownTo(t.Context(), b.on(b.pool), postgres.SchemaVersion, nil); err != nil {
		t.Fatal(err)
	}
	b.wantVersion(t, nil, postgres.SchemaVersion)
}

// The schema is made if it is missing. Whatever the search_path of the connections is, nothing is
// made in another schema.
func TestSchema(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(t, "CREATE SCHEMA other")
	pool := open(t, b.with(t, "search_path", "other,public"), func(config *pgxpool.Config) {
		postgres.Configure(config, &postgres.Options{Schema: "payments"})
	})
	b.schema = "payments"
	if err := migrations.Up(t.Context(), b.on(pool), nil); err != nil {
		t.Fatal(err)
	}
	b.wantTables(t, tablesOf("payments")...)
	b.wantVersion(t, nil, migrations.Latest)
	wantKeeps(t, pool, &postgres.Options{Schema: "payments"})

	b.schema = "public"
	if err := migrations.Up(t.Context(), b.on(pool), nil); err != nil {
		t.Fatal(err)
	}
	b.wantTables(t, append(tablesOf("payments"), tablesOf("public")...)...)
	b.schema = "payments"
	if err := migrations.Down(t.Context(), b.on(pool), nil); err != nil {
		t.Fatal(err)
	}
	b.wantTables(t, append([]string{"payments.idempotency_migrations"}, tablesOf("public")...)...)
	if path := b.strings(t, "SHOW search_path"); len(path) != 1 || path[0] != `"$user", public` {
		t.Errorf("the pool's search_path has become %v", path)
	}
}

// A migration may take longer than a request's statement, and a pool for requests must not cut it
// off.
func TestUpOutlastsTheStatementTimeoutOfThePool(t *testing.T) {
	t.Parallel()
	b := setup(t)
	pool := open(t, b.url, func(config *pgxpool.Config) {
		postgres.Configure(config, &postgres.Options{StatementTimeout: 100 * time.Millisecond})
	})
	files := fstest.MapFS{"000001_wait.up.sql": {Data: []byte("SELECT pg_sleep(0.5)")}}
	if err := migrations.Up(t.Context(), b.on(pool), &migrations.Options{Files: files, VersionTable: "service_migrations"}); err != nil {
		t.Error(err)
	}
}

// A program can migrate its own tables in the same way, with versions of their own.
func TestFilesOfAProgramsOwn(t *testing.T) {
	t.Parallel()
	b := setup(t)
	own := &migrations.Options{VersionTable: "service_migrations", Files: fstest.MapFS{
		"000001_create_transfers.up.sql":   {Data: []byte("CREATE TABLE transfers (id bigint)")},
		"000001_create_transfers.down.sql": {Data: []byte("DROP TABLE transfers")},
		"000002_add_amount.up.sql":         {Data: []byte("ALTER TABLE transfers ADD COLUMN amount bigint")},
		"000002_add_amount.down.sql":       {Data: []byte("ALTER TABLE transfers DROP COLUMN amount")},
	}}
	b.up(t, nil)
	b.up(t, own)
	b.wantVersion(t, own, 2)
	b.wantVersion(t, nil, migrations.Latest)
	b.exec(t, "INSERT INTO transfers (id, amount) VALUES (1, 1)")
	if err := migrations.Down(t.Context(), b.on(b.pool), own); err != nil {
		t.Fatal(err)
	}
	b.wantVersion(t, own, 0)
	b.wantVersion(t, nil, migrations.Latest)
	b.wantTables(t, append(tablesOf("public"), "public.service_migrations")...)
}

func TestFilesAndVersionTableBelongTogether(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, options := range []*migrations.Options{
		{VersionTable: "service_migrations"},
		{Files: fstest.MapFS{"000001_a.up.sql": {Data: []byte("SELECT 1")}}},
	} {
		if err := migrations.Up(t.Context(), b.on(b.pool), options); err == nil || !strings.Contains(err.Error(), "set both or none") {
			t.Errorf("%v: %v", options, err)
		}
	}
	b.wantTables(t)
}

// A file that ends its transaction and then fails leaves the schema dirty. Every further migration
// is refused until the schema is repaired, and the error says how.
func TestDirtySchema(t *testing.T) {
	t.Parallel()
	for version := uint(1); version <= 2; version++ {
		b := setup(t)
		files := fstest.MapFS{
			"000001_create_transfers.up.sql": {Data: []byte("CREATE TABLE transfers (id bigint)")},
			"000002_add_amount.up.sql":       {Data: []byte("ALTER TABLE transfers ADD COLUMN amount bigint")},
		}
		own := &migrations.Options{VersionTable: "service_migrations", Files: files}
		file := files[[]string{"000001_create_transfers.up.sql", "000002_add_amount.up.sql"}[version-1]]
		whole := file.Data
		file.Data = append(slices.Clip(whole), "; COMMIT; SELECT 1/0"...)
		if err := migrations.Up(t.Context(), b.on(b.pool), own); err == nil || errors.Is(err, migrations.ErrDirty) || !strings.HasPrefix(err.Error(), "migrate: ") {
			t.Fatalf("the migration that fails: %v", err)
		}
		if got, err := migrations.Version(t.Context(), b.on(b.pool), own); got != version || !errors.Is(err, migrations.ErrDirty) {
			t.Errorf("version is %d, %v; want %d, ErrDirty", got, err, version)
		}
		var remedy string
		for name, call := range map[string]func(context.Context, migrations.Store, *migrations.Options) error{"Up": migrations.Up, "Down": migrations.Down} {
			err := call(t.Context(), b.on(b.pool), own)
			if !errors.Is(err, migrations.ErrDirty) || !strings.Contains(err.Error(), "version "+strconv.Itoa(int(version))+" failed") {
				t.Fatalf("%s on a dirty schema: %v", name, err)
			}
			remedy = strings.Split(err.Error(), "`")[1]
		}

		// Remove the partial changes.
		b.exec(t, []string{"DROP TABLE transfers", "ALTER TABLE transfers DROP COLUMN amount"}[version-1])
		b.exec(t, remedy)
		b.wantVersion(t, own, version-1)
		file.Data = whole
		b.up(t, own)
		b.wantVersion(t, own, 2)
	}
}

// A migration that fails leaves the schema as it was: once its file is mended Up succeeds.
func TestMigrationThatFailsLeavesNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	files := fstest.MapFS{
		"000001_create_transfers.up.sql": {Data: []byte("CREATE TABLE transfers (id bigint); SELECT 1/0")},
		"000002_add_amount.up.sql":       {Data: []byte("ALTER TABLE transfers ADD COLUMN amount bigint; SELECT 1/0")},
	}
	own := &migrations.Options{VersionTable: "service_migrations", Files: files}
	for version, name := range []string{"000001_create_transfers.up.sql", "000002_add_amount.up.sql"} {
		if err := migrations.Up(t.Context(), b.on(b.pool), own); err == nil || !strings.Contains(err.Error(), "22012") {
			t.Fatalf("it did not fail: %v", err)
		}
		b.wantVersion(t, own, uint(version))
		files[name].Data = []byte(strings.TrimSuffix(string(files[name].Data), "; SELECT 1/0"))
	}
	b.up(t, own)
	b.wantVersion(t, own, 2)
}

// program is the migrate program: this folder's files unchanged, and a database by its URL.
func (b *testBundle) program(t *testing.T, versionTable string) *migrate.Migrate {
	t.Helper()
	folder, err := filepath.Abs(".")
	if err != nil {
		t.Fatal(err)
	}
	address, err := url.Parse(b.with(t, "x-migrations-table", versionTable))
	if err != nil {
		t.Fatal(err)
	}
	address.Scheme = "pgx5"
	m, err := migrate.New((&url.URL{Scheme: "file", Path: folder}).String(), address.String()+"&search_path=public")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if sourceErr, databaseErr := m.Close(); sourceErr != nil || databaseErr != nil {
			t.Error(sourceErr, databaseErr)
		}
	})
	return m
}

// A migration with the program gives the same tables, and this package finds them.
func TestPlainMigrateProgram(t *testing.T) {
	t.Parallel()
	b := setup(t)
	program := b.program(t, versionTable)
	if err := program.Up(); err != nil {
		t.Fatal(err)
	}
	if version, dirty, err := program.Version(); version != migrations.Latest || dirty || err != nil {
		t.Errorf("version is %d, %v, %v", version, dirty, err)
	}
	b.wantTables(t, tablesOf("public")...)
	b.wantVersion(t, nil, migrations.Latest)
	b.up(t, nil) // nothing is left to do
	wantKeeps(t, b.pool, nil)
	if err := program.Down(); err != nil {
		t.Fatal(err)
	}
	b.wantVersion(t, nil, 0)
	b.wantTables(t, "public.idempotency_migrations")
}

// The server reports the table that design and documentation promise.
func TestTable(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.up(t, nil)
	const table = " = 'idempotency_keys'::regclass"
	for name, test := range map[string]struct {
		sql  string
		want []string
	}{
		"constraints": {
			"SELECT conname || ' ' || pg_get_constraintdef(oid) FROM pg_constraint WHERE contype <> 'n' AND conrelid" + table + " ORDER BY 1",
			[]string{
				// No CHECK: each insert would compile its expression.
				"idempotency_keys_pkey PRIMARY KEY (scope, key)",
			},
		},
		"indexes": { // each insert pays for each
			"SELECT relname FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid WHERE indrelid" + table,
			[]string{"idempotency_keys_pkey"},
		},
		"text in the C collation": {
			`SELECT attname || ' ' || collname FROM pg_attribute JOIN pg_collation ON pg_collation.oid = attcollation WHERE attnum > 0 AND attrelid` + table + " ORDER BY attnum",
			[]string{"scope C", "key C", "trace_id C"},
		},
		"the primary key's collation": {
			"SELECT collname FROM pg_index, unnest(indcollation::oid[]) AS c JOIN pg_collation ON pg_collation.oid = c WHERE indrelid" + table,
			[]string{"C", "C"},
		},
		"columns that may be NULL": {
			"SELECT attname FROM pg_attribute WHERE attnum > 0 AND NOT attnotnull AND attrelid" + table,
			[]string{"trace_id"},
		},
		"persistence and kind": {
			"SELECT relpersistence::text || relkind::text FROM pg_class WHERE oid" + table,
			[]string{"pr"},
		},
		"columns without a comment": {
			"SELECT attname FROM pg_attribute WHERE attnum > 0 AND col_description(attrelid, attnum) IS NULL AND attrelid" + table + " ORDER BY attnum",
			nil,
		},
	} {
		if got := b.strings(t, test.sql); !slices.Equal(got, test.want) {
			t.Errorf("%s: %q, want %q", name, got, test.want)
		}
	}

	body := b.strings(t, "SELECT attcompression::text FROM pg_attribute WHERE attname = 'body' AND attrelid"+table)
	if lz4 := b.strings(t, "SELECT name FROM pg_settings WHERE name = 'default_toast_compression' AND 'lz4' = ANY (enumvals)"); len(lz4) > 0 {
		if !slices.Equal(body, []string{"l"}) {
			t.Errorf("bodies are compressed by %q; the server has lz4", body)
		}
	} else {
		t.Log("this server has no lz4")
	}
}

// A context that has ended stops it before anything is done.
func TestUpWithAnEndedContext(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := migrations.Up(ctx, b.on(b.pool), nil); !errors.Is(err, context.Canceled) {
		t.Errorf("Up: %v", err)
	}
	if _, err := migrations.Version(ctx, b.on(b.pool), nil); !errors.Is(err, context.Canceled) {
		t.Errorf("Version: %v", err)
	}
	b.wantTables(t)
}

// The files, their numbers and the constants for the newest version agree.
func TestLatest(t *testing.T) {
	t.Parallel()
	entries, err := os.ReadDir(".")
	if err != nil {
		t.Fatal(err)
	}
	name := regexp.MustCompile(`^(\d{6})_[a-z]+_[a-z_]+\.(up|down)\.sql$`) // number, verb, object
	directions := map[int][]string{}
	for _, entry := range entries {
		if !strings.HasSuffix(entry.Name(), ".sql") {
			continue
		}
		match := name.FindStringSubmatch(entry.Name())
		if match == nil {
			t.Errorf("%s is not named 000001_verb_object.up.sql or .down.sql", entry.Name())
			continue
		}
		number, err := strconv.Atoi(match[1])
		if err != nil {
			t.Fatal(err)
		}
		directions[number] = append(directions[number], match[2])
	}
	want := map[int][]string{}
	for number := 1; number <= migrations.Latest; number++ {
		want[number] = []string{"down", "up"}
	}
	if !reflect.DeepEqual(directions, want) {
		t.Errorf("files are %v, want %v up to Latest", directions, want)
	}
	if postgres.SchemaVersion > operator.SchemaVersion || operator.SchemaVersion > migrations.Latest {
		t.Errorf("Latest is %d, postgres.SchemaVersion %d and operator.SchemaVersion %d", migrations.Latest, postgres.SchemaVersion, operator.SchemaVersion)
	}
}

// If the context ends in the middle, the migration under way is undone, and no other begins.
// Another Up continues from there.
func TestUpThatIsStoppedLeavesNothing(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ctx, cancel := context.WithCancel(t.Context())
	own := &migrations.Options{VersionTable: "service_migrations", Files: stoppingFS{
		FS: fstest.MapFS{
			"000001_create_one.up.sql": {Data: []byte("CREATE TABLE one (id bigint); SELECT pg_sleep(0.2)")},
			"000002_create_two.up.sql": {Data: []byte("CREATE TABLE two (id bigint)")},
		},
		name: "000001_create_one.up.sql", stop: cancel,
	}}
	if err := migrations.Up(ctx, b.on(b.pool), own); !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v; want context.Canceled", err)
	}
	version, err := migrations.Version(t.Context(), b.on(b.pool), own)
	if version != 0 || err != nil {
		t.Errorf("it stopped at version %d, %v", version, err)
	}
	b.wantTables(t)
	b.up(t, own)
	b.wantVersion(t, own, 2)
}

// stoppingFS calls stop when a file is opened.
type stoppingFS struct {
	fs.FS
	name string
	stop func()
}

func (f stoppingFS) Open(name string) (fs.File, error) {
	if name == f.name {
		f.stop()
	}
	return f.FS.Open(name)
}

// A role that is not allowed to migrate leaves no connection behind, at whatever step it fails.
func TestUpThatFailsLeavesNoConnection(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.exec(t, "REVOKE CREATE ON SCHEMA public FROM PUBLIC") // PostgreSQL 14 grants it
	for _, schema := range []string{"public", "payments"} {
		b.schema = schema
		var openNow atomic.Int64
		config := b.role(t).Config()
		dial := config.ConnConfig.DialFunc
		config.ConnConfig.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dial(ctx, network, address)
			if err != nil {
				return nil, err
			}
			openNow.Add(1)
			return &countedConn{Conn: conn, openNow: &openNow}, nil
		}
		pool, err := pgxpool.NewWithConfig(t.Context(), config)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(pool.Close)
		if err := migrations.Up(t.Context(), b.on(pool), nil); err == nil {
			t.Error("it may migrate")
		}
		if n := openNow.Load(); n != 0 {
			t.Errorf("%d connections are left open", n)
		}
	}
}

// countedConn lowers the count when it is closed for the first time.
type countedConn struct {
	net.Conn
	openNow *atomic.Int64
	closed  atomic.Bool
}

func (c *countedConn) Close() error {
	if !c.closed.Swap(true) {
		c.openNow.Add(-1)
	}
	return c.Conn.Close()
}

// If several processes start together, one of them makes the schema too.
func TestSchemaFromManyProcessesAtOnce(t *testing.T) {
	t.Parallel()
	b := setup(t)
	rounds := 20
	if testing.Short() {
		rounds = 2
	}
	for i := range rounds {
		b.schema = "payments_" + strconv.Itoa(i)
		b.upAtOnce(t, nil)
	}
}

// A wait for another process's migration may take longer than a request's lock_timeout.
func TestUpOutlastsTheLockTimeoutOfThePool(t *testing.T) {
	t.Parallel()
	b := setup(t)
	pool := open(t, b.url, func(config *pgxpool.Config) {
		postgres.Configure(config, &postgres.Options{LockTimeout: 50 * time.Millisecond})
	})
	own := &migrations.Options{VersionTable: "service_migrations", Files: fstest.MapFS{
		"000001_wait.up.sql": {Data: []byte("SELECT pg_sleep(0.5)")},
	}}
	errs := make(chan error)
	for range 2 {
		go func() { errs <- migrations.Up(t.Context(), b.on(pool), own) }()
	}
	for range 2 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

// A wait for another process's migration ends with the context.
func TestUpStopsWaiting(t *testing.T) {
	t.Parallel()
	b := setup(t)
	reached, release := make(chan struct{}), make(chan struct{})
	own := &migrations.Options{VersionTable: "service_migrations", Files: stoppingFS{
		FS:   fstest.MapFS{"000001_wait.up.sql": {Data: []byte("SELECT 1")}},
		name: "000001_wait.up.sql", stop: func() { close(reached); <-release },
	}}
	first := make(chan error)
	go func() { first <- migrations.Up(t.Context(), b.on(b.pool), own) }()
	<-reached
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	second := make(chan error, 1)
	go func() {
		second <- migrations.Up(ctx, b.on(b.pool), &migrations.Options{VersionTable: "service_migrations", Files: fstest.MapFS{
			"000001_wait.up.sql": {Data: []byte("SELECT 1")},
		}})
	}()
	select {
	case err := <-second:
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error is %v; want context.DeadlineExceeded", err)
		}
	case <-time.After(5 * time.Second):
		t.Error("it still waits")
	}
	close(release)
	if err := <-first; err != nil {
		t.Error(err)
	}
}

// A service that is rolled back finds a schema of a later release, and must start.
func TestUpOnALaterSchema(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.up(t, nil)
	b.exec(t, "UPDATE idempotency_migrations SET version = $1", migrations.Latest+1)
	b.up(t, nil)
	b.wantVersion(t, nil, migrations.Latest+1)
	wantKeeps(t, b.pool, nil)
	b.exec(t, "UPDATE idempotency_migrations SET dirty = true")
	if err := migrations.Up(t.Context(), b.on(b.pool), nil); !errors.Is(err, migrations.ErrDirty) {
		t.Errorf("on a later schema that is dirty: %v", err)
	}
}

// The migrate program marks the schema dirty before it runs a file, and may be killed then or
// later. The SQL in Up's error finds the version from the objects in the schema.
func TestDirtySchemaOfTheMigrateProgram(t *testing.T) {
	t.Parallel()
	for there := range uint(migrations.Latest) + 1 {
		b := setup(t)
		b.schema = "pay's"
		b.up(t, nil)
		if err := migrations.DownTo(t.Context(), b.on(b.pool), there, nil); err != nil {
			t.Fatal(err)
		}
		// On the way down, or up; killed before the file, or after it.
		for _, marked := range []int{max(int(there), 1), min(int(there)+1, migrations.Latest)} {
			b.exec(t, `DELETE FROM "pay's".idempotency_migrations`)
			b.exec(t, `INSERT INTO "pay's".idempotency_migrations VALUES ($1, true)`, marked)
			err := migrations.Up(t.Context(), b.on(b.pool), nil)
			if !errors.Is(err, migrations.ErrDirty) {
				t.Fatalf("marked as %d: %v", marked, err)
			}
			b.exec(t, strings.Split(err.Error(), "`")[1])
			b.wantVersion(t, nil, there)
		}
		b.up(t, nil)
		b.wantVersion(t, nil, migrations.Latest)
	}
	b := setup(t)
	b.up(t, nil)
	b.exec(t, "UPDATE idempotency_migrations SET dirty = true")
	if err := postgres.New(b.pool, nil).Check(t.Context()); !errors.Is(err, postgres.ErrSchemaOutdated) || !strings.Contains(err.Error(), "idemctl migrate up") {
		t.Errorf("Check says %v", err)
	}
}

// If the table of records was dropped, or the version of an existing one was lost, Up reports it
// instead of finding nothing to do or failing in CREATE TABLE. The SQL in its error repairs it.
func TestUpNoticesThatTableAndVersionDoNotFit(t *testing.T) {
	t.Parallel()
	for name, sick := range map[string]string{
		"no table":         "DROP TABLE pay.idempotency_keys",
		"no version":       "DELETE FROM pay.idempotency_migrations",
		"no version table": "DROP TABLE pay.idempotency_migrations",
	} {
		for there := uint(1); there <= migrations.Latest; there++ {
			t.Run(name+" of version "+strconv.Itoa(int(there)), func(t *testing.T) {
				t.Parallel()
				b := setup(t)
				b.schema = "pay"
				b.up(t, nil)
				if err := migrations.DownTo(t.Context(), b.on(b.pool), there, nil); err != nil {
					t.Fatal(err)
				}
				b.exec(t, sick)
				err := migrations.Up(t.Context(), b.on(b.pool), nil)
				if !errors.Is(err, migrations.ErrVersionUntrue) {
					t.Fatalf("got %v, want ErrVersionUntrue", err)
				}
				b.exec(t, strings.Split(err.Error(), "`")[1])
				if name != "no table" {
					b.wantVersion(t, nil, there)
				}
				b.up(t, nil)
				b.wantVersion(t, nil, migrations.Latest)
				if err := postgres.New(b.pool, &postgres.Options{Schema: "pay"}).Check(t.Context()); errors.Is(err, postgres.ErrSchemaOutdated) {
					t.Errorf("after the remedy: %v", err)
				}
			})
		}
	}
}

// Migrations run on connections with channel_binding=require, and with a store's pool.
func TestMigrationsKeepChannelBinding(t *testing.T) {
	t.Parallel()
	url := pgtest.TLS(t).TLSURL("postgres") + "&channel_binding=require"
	for name, change := range map[string]func(*pgxpool.Config){
		"a plain pool":   func(*pgxpool.Config) {},
		"a store's pool": func(config *pgxpool.Config) { postgres.Configure(config, nil) },
	} {
		pool := open(t, url, change)
		if err := migrations.Up(t.Context(), postgres.New(pool, nil), nil); err != nil {
			t.Errorf("%s: up: %v", name, err)
		}
		if err := migrations.Down(t.Context(), postgres.New(pool, nil), nil); err != nil {
			t.Errorf("%s: down: %v", name, err)
		}
	}
}
