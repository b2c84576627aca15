package recipes

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const stacks = "../../docs/stacks.md"

var link = regexp.MustCompile(`\]\(([^)#]+)[^)]*\)`)

// The Go code of docs/stacks.md is that of a file that its section links, which a test runs.
func TestStacksShowsWhatRuns(t *testing.T) {
	t.Parallel()
	page := readFile(t, stacks)
	blocks := 0
	for _, section := range strings.Split(page, "\n## ") {
		var sources []string
		for _, found := range link.FindAllStringSubmatch(section, -1) {
			path := filepath.Join(filepath.Dir(stacks), found[1])
			if _, err := os.Stat(path); err != nil {
				t.Errorf("a link of the page: %v", err)
			} else if strings.HasSuffix(path, ".go") {
				sources = append(sources, readFile(t, path))
			}
		}
		parts := strings.Split(section, "```go\n")
		for _, part := range parts[1:] {
			blocks++
			code, _, _ := strings.Cut(part, "```")
			if !contains(sources, code) {
				t.Errorf("no file that the section links has this code:\n%s", code)
			}
		}
	}
	if blocks < 10 {
		t.Errorf("the page has %d blocks of Go code: the test does not find them", blocks)
	}
}

// The lines in its tables are those of code that compiles, or of the adapters' own documentation.
func TestStacksTablesShowWhatRuns(t *testing.T) {
	t.Parallel()
	page := readFile(t, stacks)
	for code, file := range map[string]string{
		`router.POST("/payments", ginidem.Middleware(idem), pay)`: "contrib/gin/gin.go",
		`e.POST("/payments", pay, echoidem.Middleware(idem))`:     "contrib/echo5/echo.go",
		`app.Post("/payments", fiberidem.Middleware(idem), pay)`:  "contrib/fiber3/fiber.go",
		`ledgersql.New(db)`:                                 "examples/sqlc/main.go",
		`queries.WithTx(postgres.Tx(ctx))`:                  "examples/sqlc/main.go",
		`db := sqldb.Open(store, nil)`:                      "examples/sqlc/main.go",
		`gorm.Open(postgres.New(postgres.Config{Conn: db})`: "examples/gorm/main.go",
		`bun.NewDB(`:  "storage/postgres/sqldb/ormtest/ormtest_test.go",
		`sqlx.NewDb(`: "storage/postgres/sqldb/ormtest/ormtest_test.go",
		`ent.NewClient(ent.Driver(entsql.OpenDB(`: "storage/postgres/sqldb/ormtest/ormtest_test.go",
		`river.NewClient(riverdatabasesql.New(`:   "storage/postgres/sqldb/ormtest/ormtest_test.go",
		`ErrTransactionMissing`:                   "storage/postgres/sqldb/sqldb.go",
		`ErrPoolRefused`:                          "storage/postgres/configure.go",
		`grpcidem.New(store, account, nil)`:       "contrib/grpc/example_test.go",
	} {
		if !strings.Contains(page, code) {
			t.Errorf("the page does not have %s", code)
		}
		if !strings.Contains(readFile(t, "../../"+file), code) {
			t.Errorf("%s does not have %s", file, code)
		}
	}
}

func contains(sources []string, code string) bool {
	for _, source := range sources {
		if strings.Contains(source, code) {
			return true
		}
	}
	return false
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(filepath.FromSlash(path))
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}
