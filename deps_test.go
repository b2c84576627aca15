package idempotency_test

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

const module = "github.com/paidonce/idempotency"

// listed is a package as the go command lists it.
type listed struct {
	ImportPath                         string
	Standard                           bool
	Module                             struct{ Path string }
	Imports, TestImports, XTestImports []string
	Deps                               []string // all dependencies, without those of its tests
}

// workspace returns every package of the workspace and all dependencies, by import path. One run of
// the go command serves all tests.
func workspace(t *testing.T) map[string]listed {
	t.Helper()
	watchSources(t)
	packages, err := listWorkspace()
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := packages[module+"/cmd/demo-bank"]; !ok {
		t.Skip("NOT RUN: GOWORK=off hides the other modules; run go test work")
	}
	return packages
}

var listWorkspace = sync.OnceValues(func() (map[string]listed, error) {
	command := exec.Command("go", "list", "-deps", "-json=ImportPath,Standard,Module,Imports,TestImports,XTestImports,Deps", "work")
	out, err := command.Output()
	if failed, ok := errors.AsType[*exec.ExitError](err); ok {
		err = errors.New(string(failed.Stderr))
	}
	if err != nil {
		return nil, err
	}
	packages := map[string]listed{}
	for decoder := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listed
		if err := decoder.Decode(&p); errors.Is(err, io.EOF) {
			return packages, nil
		} else if err != nil {
			return nil, err
		}
		packages[p.ImportPath] = p
	}
})

// watchSources opens every source file of the modules, so that the go command runs these tests
// again after one of them has changed.
func watchSources(t *testing.T) {
	t.Helper()
	err := filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		if err == nil && (strings.HasSuffix(path, ".go") || entry.Name() == "go.mod") {
			_, err = os.Stat(path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// The rules for dependencies: a program that imports these packages gets these packages of ours and
// these modules, and no others. Every user has to trust a module that is added here.
func TestDependencies(t *testing.T) {
	t.Parallel()
	packages := workspace(t)
	pgx := []string{
		"github.com/jackc/pgpassfile", "github.com/jackc/pgservicefile", "github.com/jackc/pgx/v5", "github.com/jackc/puddle/v2",
		"golang.org/x/sync", "golang.org/x/text",
	}
	pgconn := []string{"github.com/jackc/pgpassfile", "github.com/jackc/pgservicefile", "github.com/jackc/pgx/v5", "golang.org/x/text"}
	const httpsfv = "github.com/dunglas/httpsfv"
	// The dependencies of client_golang and of OpenTelemetry are theirs to choose: a program
	// without metrics or spans imports neither.
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
	franz := []string{"github.com/klauspost/compress", "github.com/pierrec/lz4/v4", "github.com/twmb/franz-go", "github.com/twmb/franz-go/pkg/kadm", "github.com/twmb/franz-go/pkg/kmsg"}
	natsgo := []string{
		"github.com/klauspost/compress", "github.com/nats-io/nats.go", "github.com/nats-io/nkeys", "github.com/nats-io/nuid",
		"golang.org/x/crypto", "golang.org/x/sys",
	}
	const uuid = "github.com/google/uuid" // the client's keys are UUIDv7
	for _, test := range []struct {
		packages      []string
		ours, modules []string
	}{
		{[]string{"."}, []string{""}, nil},
		{[]string{"./effect"}, []string{"", "effect"}, nil},
		{[]string{"./message"}, []string{"", "message"}, nil},
		{[]string{"./relay"}, []string{"", "message", "relay"}, nil},
		{[]string{"./consumer"}, []string{"", "consumer", "message"}, nil},
		{[]string{"./storage/memory"}, []string{"", "storage/memory"}, nil},
		{[]string{"./storage/encrypted"}, []string{"", "storage/encrypted"}, nil},
		{[]string{"./storage/storagetest"}, []string{"", "storage/storagetest"}, nil},
		{[]string{"./storage/postgres"}, []string{"", "consumer", "message", "relay", "storage/postgres"}, pgx},
		{[]string{"./storage/postgres/sqldb"}, []string{"", "consumer", "message", "relay", "storage/postgres", "storage/postgres/sqldb"}, pgx},
		// Package wire knows neither the store nor keys.
		{[]string{"./storage/postgres/internal/wire"}, nil, pgconn},
		{[]string{"./storage/postgres/internal/sealed"}, []string{"", "message"}, pgx}, // does not know the store
		{[]string{"./storage/postgres/operator"}, []string{"", "consumer", "internal/pooler", "message", "relay", "storage/postgres", "storage/postgres/operator"}, pgx},
		{[]string{"./migrations"}, []string{"internal/pooler", "migrations"}, append([]string{"github.com/golang-migrate/migrate/v4"}, pgx...)},
		{[]string{"./observe/history"}, []string{"", "observe/history"}, pgx},
		{[]string{"./admin"}, []string{"", "admin", "consumer", "internal/pooler", "message", "relay", "storage/postgres", "storage/postgres/operator"}, pgx},
		{[]string{"./middleware"}, []string{"", "middleware"}, []string{httpsfv}},
		{[]string{"./idempotencytest"}, []string{"", "effect", "idempotencytest", "internal/crashpoint", "middleware"}, []string{httpsfv}},
		{[]string{"./middleware/mwtest"}, []string{"", "middleware", "middleware/mwtest", "storage/memory"}, []string{httpsfv}},
		{[]string{"./middleware/chiroute"}, []string{"middleware/chiroute"}, []string{"github.com/go-chi/chi/v5"}},
		{[]string{"./client"}, []string{"", "client"}, []string{uuid}},
		{[]string{"./client/pgintent"}, []string{"", "client", "client/pgintent"}, append([]string{uuid}, pgx...)},
		{[]string{"./client/boltintent"}, []string{"", "client", "client/boltintent"}, []string{uuid, "go.etcd.io/bbolt", "golang.org/x/sys"}},
		{[]string{"./broker/brokertest"}, []string{"", "broker/brokertest", "consumer", "message", "relay"}, nil},
		{[]string{"./broker/kafka"}, []string{"", "broker/kafka", "consumer", "message", "relay"}, franz},
		{[]string{"./broker/nats"}, []string{"", "broker/nats", "consumer", "message", "relay"}, natsgo},
		{[]string{"./contrib/echo4"}, []string{"", "contrib/echo4", "middleware"}, []string{
			httpsfv, "github.com/labstack/echo/v4", "github.com/labstack/gommon", "github.com/mattn/go-colorable", "github.com/mattn/go-isatty",
			"github.com/valyala/bytebufferpool", "github.com/valyala/fasttemplate", "golang.org/x/crypto", "golang.org/x/net", "golang.org/x/sys", "golang.org/x/text",
		}},
		{[]string{"./contrib/echo5"}, []string{"", "contrib/echo5", "middleware"}, []string{httpsfv, "github.com/labstack/echo/v5"}},
		{[]string{"./contrib/fiber3"}, []string{"", "contrib/fiber3", "middleware"}, []string{
			"github.com/andybalholm/brotli", httpsfv, "github.com/gofiber/fiber/v3", "github.com/gofiber/schema", "github.com/gofiber/utils/v2", uuid,
			"github.com/klauspost/compress", "github.com/mattn/go-colorable", "github.com/mattn/go-isatty", "github.com/philhofer/fwd", "github.com/tinylib/msgp",
			"github.com/valyala/bytebufferpool", "github.com/valyala/fasthttp", "golang.org/x/crypto", "golang.org/x/net", "golang.org/x/sys", "golang.org/x/text",
		}},
		{[]string{"./contrib/gin"}, []string{"", "contrib/gin", "middleware"}, []string{
			httpsfv, "github.com/gabriel-vasile/mimetype", "github.com/gin-contrib/sse", "github.com/gin-gonic/gin", "github.com/go-playground/locales",
			"github.com/go-playground/universal-translator", "github.com/go-playground/validator/v10", "github.com/leodido/go-urn", "github.com/mattn/go-isatty",
			"github.com/pelletier/go-toml/v2", "github.com/ugorji/go/codec", "golang.org/x/crypto", "golang.org/x/net", "golang.org/x/sys", "golang.org/x/text",
			"google.golang.org/protobuf", "gopkg.in/yaml.v3",
		}},
		{[]string{"./contrib/grpc/rpc"}, []string{"", "contrib/grpc/rpc"}, []string{httpsfv, "google.golang.org/genproto/googleapis/rpc", "google.golang.org/protobuf"}},
		{[]string{"./contrib/grpc"}, []string{"", "client", "contrib/grpc", "contrib/grpc/rpc"}, []string{
			httpsfv, uuid, "golang.org/x/net", "golang.org/x/sys", "golang.org/x/text",
			"google.golang.org/genproto/googleapis/rpc", "google.golang.org/grpc", "google.golang.org/protobuf",
		}},
		{[]string{"./middleware", "./storage/postgres"}, []string{"", "consumer", "message", "middleware", "relay", "storage/postgres"}, append([]string{httpsfv}, pgx...)},
		{[]string{"./observe/lostkey"}, []string{"", "observe/lostkey"}, nil},
		{[]string{"./observe"}, []string{"", "consumer", "message", "observe", "observe/lostkey"}, nil},
		{[]string{"./observe/prometheus"}, []string{"", "consumer", "message", "observe", "observe/lostkey", "observe/prometheus", "relay"}, prometheus},
		{[]string{"./observe/otel"}, []string{"", "consumer", "message", "observe", "observe/lostkey", "observe/otel", "relay"}, otel},
	} {
		t.Run(strings.Join(test.packages, " "), func(t *testing.T) {
			t.Parallel()
			var ours, modules []string
			for _, name := range test.packages {
				path := strings.TrimSuffix(module+strings.TrimPrefix(name, "."), "/")
				if _, ok := packages[path]; !ok {
					t.Fatalf("there is no package %s", path)
				}
				for _, needed := range append(packages[path].Deps, path) {
					p := packages[needed]
					switch {
					case p.Standard:
					// Parts of storage/postgres, which don't import it.
					case strings.HasPrefix(needed, module+"/storage/postgres/internal/"):
					// A part of the root package, which storage/postgres knows too.
					case needed == module+"/internal/deadline":
					// A constant.
					case needed == module+"/internal/envelope":
					case needed == module || strings.HasPrefix(needed, module+"/"):
						ours = append(ours, strings.TrimPrefix(strings.TrimPrefix(needed, module), "/"))
					default:
						modules = append(modules, p.Module.Path)
					}
				}
			}
			for _, found := range []*[]string{&ours, &modules} {
				slices.Sort(*found)
				*found = slices.Compact(*found)
			}
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
	for path, p := range workspace(t) {
		imports := slices.Concat(p.Imports, p.TestImports, p.XTestImports)
		ours := path == module || strings.HasPrefix(path, module+"/")
		if ours && slices.ContainsFunc(imports, func(s string) bool { return strings.HasPrefix(s, "github.com/golang-migrate/") }) {
			importers = append(importers, path)
		}
	}
	if !slices.Equal(importers, []string{module + "/migrations"}) {
		t.Errorf("golang-migrate is imported by %q", importers)
	}
}

// Only tests may import internal/browsertest, which drives a browser.
func TestOnlyTestsDriveABrowser(t *testing.T) {
	t.Parallel()
	const browsertest = module + "/internal/browsertest"
	for path, p := range workspace(t) {
		if path == browsertest || !strings.HasPrefix(path, module) {
			continue
		}
		if slices.ContainsFunc(p.Imports, func(s string) bool { return strings.HasPrefix(s, "github.com/chromedp/") || s == browsertest }) {
			t.Errorf("%s imports a browser's driver outside of its tests", path)
		}
	}
}

// A user of any package of the root module gets at least the modules that the root module requires.
// So it requires only modules that a package here imports, each at the lowest version that passes
// the tests (docs/decisions/0024-workspace.md). Other modules of this repository may require more.
func TestTheRootRequiresNoMore(t *testing.T) {
	t.Parallel()
	mod := readModule(t, ".")
	var direct, indirect []string
	for _, r := range mod.Require {
		if r.Indirect {
			indirect = append(indirect, r.Path)
		} else {
			direct = append(direct, r.Path+" "+r.Version)
		}
	}
	for _, c := range []struct {
		what      string
		got, want []string
	}{
		{"packages of the root module import", direct, []string{
			// For examples/orders.
			"github.com/bwmarrin/snowflake v0.3.0",
			"github.com/chromedp/cdproto v0.159.0", "github.com/chromedp/chromedp v0.23.0", // tests
			"github.com/dunglas/httpsfv v1.1.0",
			"github.com/fergusstrange/embedded-postgres v1.34.0", // tests and examples
			"github.com/go-chi/chi/v5 v5.3.0",
			"github.com/golang-migrate/migrate/v4 v4.19.1",
			"github.com/google/uuid v1.6.0",
			"github.com/jackc/pgx/v5 v5.12.0",
			"go.uber.org/goleak v1.3.0", "golang.org/x/sys v0.38.0", "pgregory.net/rapid v1.3.0", // tests
		}},
		{"those need", indirect, []string{
			"github.com/go-json-experiment/json", "github.com/jackc/pgerrcode", "github.com/jackc/pgpassfile",
			"github.com/jackc/pgservicefile", "github.com/jackc/puddle/v2", "github.com/lib/pq", "github.com/xi2/xz",
			"golang.org/x/sync", "golang.org/x/text",
		}},
	} {
		slices.Sort(c.got)
		if !slices.Equal(c.got, c.want) {
			t.Errorf("%s: go.mod has %q, want %q", c.what, c.got, c.want)
		}
	}
}

// A user's module that imports middleware and storage/postgres needs the versions and the lines of
// go.sum in testdata/user, and no others. If a change is meant to bring more, they change with it.
func TestUsersModuleGainsNothing(t *testing.T) {
	t.Parallel()
	folder := t.TempDir()
	if _, err := os.Stat("go.sum"); err != nil { // so that the go command runs this test again when it changes
		t.Fatal(err)
	}
	readModule(t, ".") // likewise
	for _, name := range []string{"go.mod", "go.sum"} {
		content, err := os.ReadFile(filepath.Join("testdata", "user", name))
		if err == nil {
			err = os.WriteFile(filepath.Join(folder, name), content, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	program := "package main\n\nimport (\n\t_ \"" + module + "/middleware\"\n\t_ \"" + module + "/storage/postgres\"\n)\n\nfunc main() {}\n"
	if err := os.WriteFile(filepath.Join(folder, "main.go"), []byte(program), 0o600); err != nil {
		t.Fatal(err)
	}
	here, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, arguments := range [][]string{{"mod", "edit", "-replace=" + module + "=" + here}, {"mod", "tidy", "-diff"}, {"build", "-o", os.DevNull, "."}} {
		command := exec.CommandContext(t.Context(), "go", arguments...)
		command.Dir = folder
		command.Env = append(os.Environ(), "GOWORK=off")
		if out, err := command.CombinedOutput(); err != nil {
			t.Fatalf("%v: %v\n%s", command, err, out)
		}
	}
}

// Every module is in the workspace, and without the workspace too it finds the others in the
// checkout.
func TestEveryModuleIsInTheWorkspace(t *testing.T) {
	t.Parallel()
	var work struct{ Use []struct{ DiskPath string } }
	goJSON(t, &work, "work", "edit", "-json", "go.work")
	var used []string
	for _, u := range work.Use {
		used = append(used, filepath.Clean(u.DiskPath))
	}
	// Prometheus itself raises half of the modules here, and needs a newer Go: in the workspace the
	// library would be tested with versions that go.mod does not name.
	const apart = "observe/prometheus/rulestest"
	folders := map[string]string{} // by module path
	for _, folder := range append(used, apart) {
		folders[readModule(t, folder).Module.Path] = folder
	}
	err := filepath.WalkDir(".", func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.Name() == "testdata" {
			return fs.SkipDir
		}
		if folder := filepath.ToSlash(filepath.Dir(path)); entry != nil && entry.Name() == "go.mod" && folder != apart && !slices.Contains(used, filepath.FromSlash(folder)) {
			t.Errorf("go.work does not use ./%s", folder)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for path, folder := range folders {
		if want := strings.TrimSuffix(module+"/"+filepath.ToSlash(folder), "/."); path != want {
			t.Errorf("the module in %s is %s, want %s", folder, path, want)
		}
		mod := readModule(t, folder)
		for _, r := range mod.Require {
			if r.Path != module && !strings.HasPrefix(r.Path, module+"/") {
				continue
			}
			replaced := ""
			for _, replace := range mod.Replace {
				if replace.Old.Path == r.Path {
					replaced = filepath.Join(folder, filepath.FromSlash(replace.New.Path))
				}
			}
			if replaced != filepath.Clean(folders[r.Path]) {
				t.Errorf("%s replaces %s with %q", path, r.Path, replaced)
			}
		}
	}
}

// modFile is a go.mod.
type modFile struct {
	Module  struct{ Path string }
	Require []struct {
		Path, Version string
		Indirect      bool
	}
	Replace []struct {
		Old, New struct{ Path, Version string }
	}
}

func readModule(t *testing.T, folder string) (mod modFile) {
	t.Helper()
	path := filepath.Join(folder, "go.mod")
	// So that the go command runs this test again when the file changes.
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
	goJSON(t, &mod, "mod", "edit", "-json", path)
	return mod
}

func goJSON(t *testing.T, to any, arguments ...string) {
	t.Helper()
	command := exec.CommandContext(t.Context(), "go", arguments...)
	out, err := command.Output()
	if err == nil {
		err = json.Unmarshal(out, to)
	}
	if err != nil {
		t.Fatalf("%v: %v", command, err)
	}
}
