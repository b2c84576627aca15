package idempotency_test

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/paidonce/idempotency"

// dependencies returns what the packages bring into a program that imports them: those of our own packages, and the
// modules of the others.
func dependencies(t *testing.T, packages ...string) (ours, modules []string) {
	t.Helper()
	format := "{{if not .Standard}}{{.ImportPath}} {{.Module.Path}}{{end}}"
	for _, line := range goList(t, append([]string{"-deps", "-f", format}, packages...)...) {
		path, from, _ := strings.Cut(line, " ")
		if from == module && strings.HasSuffix(path, "/internal/deadline") {
			continue // a part of the root package, which storage/postgres knows too
		}
		if from == module {
			ours = append(ours, strings.TrimPrefix(strings.TrimPrefix(path, module), "/"))
			continue
		}
		modules = append(modules, from)
	}
	slices.Sort(ours)
	slices.Sort(modules)
	return ours, slices.Compact(modules)
}

func goList(t *testing.T, args ...string) []string {
	t.Helper()
	watchSources(t)
	command := exec.CommandContext(t.Context(), "go", append([]string{"list"}, args...)...)
	var stderr strings.Builder
	command.Stderr = &stderr
	out, err := command.Output()
	if err != nil {
		t.Fatalf("%v: %v\n%s", command, err, stderr.String())
	}
	return strings.FieldsFunc(string(out), func(r rune) bool { return r == '\n' })
}

// watchSources looks at every source file of the module. The go command takes notice, and runs these tests again when
// one of them has changed.
func watchSources(t *testing.T) {
	t.Helper()
	err := filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		if err == nil && (strings.HasSuffix(path, ".go") || path == "go.mod") {
			_, err = os.Stat(path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// The arrows of the house: who imports one package gets these packages of ours and these modules, and no others. A
// module that is to be added here is one that every user will have to trust.
func TestDependencies(t *testing.T) {
	t.Parallel()
	pgx := []string{
		"github.com/jackc/pgpassfile", "github.com/jackc/pgservicefile", "github.com/jackc/pgx/v5", "github.com/jackc/puddle/v2",
		"golang.org/x/sync", "golang.org/x/text",
	}
	const httpsfv = "github.com/dunglas/httpsfv"
	// What a metric costs is client_golang's choice, and what a span costs OpenTelemetry's: who wants neither imports neither.
	prometheus := []string{
		"github.com/beorn7/perks", "github.com/cespare/xxhash/v2", "github.com/munnerz/goautoneg", "github.com/prometheus/client_golang",
		"github.com/prometheus/client_model", "github.com/prometheus/common", "github.com/prometheus/procfs", "golang.org/x/sys",
		"google.golang.org/protobuf",
	}
	otel := []string{
		"github.com/cespare/xxhash/v2", "github.com/go-logr/logr", "github.com/go-logr/stdr", "go.opentelemetry.io/auto/sdk",
		"go.opentelemetry.io/otel", "go.opentelemetry.io/otel/log", "go.opentelemetry.io/otel/metric",
		"go.opentelemetry.io/otel/trace",
	}
	const uuid = "github.com/google/uuid" // the client's keys are UUIDv7
	for _, test := range []struct {
		packages      []string
		ours, modules []string
	}{
		{[]string{"."}, []string{""}, nil},
		{[]string{"./storage/memory"}, []string{"", "storage/memory"}, nil},
		{[]string{"./storage/encrypted"}, []string{"", "storage/encrypted"}, nil},
		{[]string{"./storage/storagetest"}, []string{"", "storage/storagetest"}, nil},
		{[]string{"./storage/postgres"}, []string{"", "storage/postgres"}, pgx},
		{[]string{"./storage/postgres/operator"}, []string{"", "internal/pooler", "storage/postgres", "storage/postgres/operator"}, pgx},
		{[]string{"./observe/history"}, []string{"", "observe/history"}, pgx},
		{[]string{"./admin"}, []string{"", "admin", "internal/pooler", "storage/postgres", "storage/postgres/operator"}, pgx},
		{[]string{"./middleware"}, []string{"", "middleware"}, []string{httpsfv}},
		{[]string{"./middleware/prooftest"}, []string{"", "middleware", "middleware/prooftest"}, []string{httpsfv}},
		{[]string{"./middleware/chiroute"}, []string{"middleware/chiroute"}, []string{"github.com/go-chi/chi/v5"}},
		{[]string{"./client"}, []string{"", "client"}, []string{uuid}},
		{[]string{"./client/pgintent"}, []string{"", "client", "client/pgintent"}, append([]string{uuid}, pgx...)},
		{[]string{"./middleware", "./storage/postgres"}, []string{"", "middleware", "storage/postgres"}, append([]string{httpsfv}, pgx...)},
		{[]string{"./observe/lostkey"}, []string{"", "observe/lostkey"}, nil},
		{[]string{"./observe"}, []string{"", "observe", "observe/lostkey"}, nil},
		{[]string{"./observe/prometheus"}, []string{"", "observe", "observe/lostkey", "observe/prometheus"}, prometheus},
		{[]string{"./observe/otel"}, []string{"", "observe", "observe/lostkey", "observe/otel"}, otel},
	} {
		t.Run(strings.Join(test.packages, " "), func(t *testing.T) {
			t.Parallel()
			ours, modules := dependencies(t, test.packages...)
			if !slices.Equal(ours, test.ours) {
				t.Errorf("packages of ours: %q, want %q", ours, test.ours)
			}
			if !slices.Equal(modules, test.modules) {
				t.Errorf("modules: %q, want %q", modules, test.modules)
			}
		})
	}
}

func TestOnlyMigrationsImportsMigrate(t *testing.T) {
	t.Parallel()
	var importers []string
	for _, line := range goList(t, "-e", "-f", "{{.ImportPath}} {{.Imports}} {{.TestImports}} {{.XTestImports}}", "./...") {
		if path, imports, _ := strings.Cut(line, " "); strings.Contains(imports, "github.com/golang-migrate/") {
			importers = append(importers, path)
		}
	}
	if !slices.Equal(importers, []string{module + "/migrations"}) {
		t.Errorf("golang-migrate is imported by %q", importers)
	}
}

// Prometheus itself is needed to test rules and dashboard, in a module of its own.
func TestNobodyDependsOnPrometheusItself(t *testing.T) {
	t.Parallel()
	file, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(file), "github.com/prometheus/prometheus") {
		t.Error("go.mod names github.com/prometheus/prometheus: it belongs to observe/prometheus/rulestest")
	}
}

// A file of intents needs bbolt, and so lives in a module of its own.
func TestNobodyDependsOnBbolt(t *testing.T) {
	t.Parallel()
	file, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(file), "go.etcd.io/bbolt") {
		t.Error("go.mod names go.etcd.io/bbolt: it belongs to client/boltintent")
	}
}

// What drives a browser is for tests alone: internal/browsertest, which only they import.
func TestOnlyTestsDriveABrowser(t *testing.T) {
	t.Parallel()
	const browsertest = module + "/internal/browsertest"
	for _, line := range goList(t, "-e", "-f", "{{.ImportPath}} {{.Imports}}", "./...") {
		path, imports, _ := strings.Cut(line, " ")
		if path != browsertest && (strings.Contains(imports, "github.com/chromedp/") || strings.Contains(imports, browsertest)) {
			t.Errorf("%s imports a browser's driver outside of its tests", path)
		}
	}
}
