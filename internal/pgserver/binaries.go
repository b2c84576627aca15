package pgserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
)

// The supported major versions of PostgreSQL.
const (
	majorMin = 14
	majorMax = 18
)

const (
	binVariable    = "PAIDONCE_PG_BIN"    // the folder with initdb and postgres; the only one
	mirrorVariable = "PAIDONCE_PG_MIRROR" // the server to download from instead
)

// binaries are the server programs of one PostgreSQL.
type binaries struct {
	dir     string
	version string // "17.5"
	major   int
}

func (b binaries) postgres() string { return b.program("postgres") }
func (b binaries) initdb() string   { return b.program("initdb") }

func (b binaries) program(name string) string {
	if runtime.GOOS == "windows" {
		name += ".exe"
	}
	return filepath.Join(b.dir, name)
}

// place is a place that was searched, and the reason why it did not serve.
type place struct{ where, why string }

// search looks for installed binaries. It sees the machine only through its functions.
type search struct {
	goos     string
	cacheDir string // of downloads; empty: there is no place for them
	getenv   func(name string) string
	glob     func(pattern string) []string         // folders; order does not matter
	pgConfig func() (binDir string, err error)     // asks pg_config
	probe    func(binDir string) (binaries, error) // fs.ErrNotExist: no postgres there
	download func(major int) (binaries, error)     // into cacheDir; major 0: any
}

// find returns binaries of the major version, or of any supported one if it is 0. It takes the
// first of PAIDONCE_PG_BIN, PATH, pg_config, the usual folders (newest version first), earlier
// downloads, and a download. Its error names every place and the remedies.
func (s search) find(major int) (binaries, error) {
	var places []place
	accept := func(where string, bin binaries, err error) bool {
		if err == nil {
			err = suits(bin, major)
		}
		if err != nil {
			places = append(places, place{where, err.Error()})
		}
		return err == nil
	}

	if dir := s.getenv(binVariable); dir != "" {
		bin, err := s.probe(dir)
		if accept(binVariable+"="+dir, bin, err) {
			return bin, nil
		}
		return binaries{}, &notFoundError{major: major, places: places}
	}
	places = append(places, place{binVariable, "not set"})

	onPath := 0
	for _, dir := range filepath.SplitList(s.getenv("PATH")) {
		if !filepath.IsAbs(dir) {
			// Never take a server from the current folder.
			continue
		}
		bin, err := s.probe(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		onPath++
		if accept("PATH: "+dir, bin, err) {
			return bin, nil
		}
	}
	if onPath == 0 {
		places = append(places, place{"PATH", "no postgres"})
	}

	if dir, err := s.pgConfig(); err != nil {
		places = append(places, place{"pg_config --bindir", err.Error()})
	} else if bin, err := s.probe(dir); accept("pg_config --bindir: "+dir, bin, err) {
		return bin, nil
	}

	folders := [][]string{usualFolders(s.goos, s.getenv)}
	if s.cacheDir != "" {
		folders = append(folders, []string{filepath.Join(s.cacheDir, downloadPrefix+"*", "bin")})
	}
	for _, patterns := range folders {
		var dirs []string
		for _, pattern := range patterns {
			found := s.glob(pattern)
			if len(found) == 0 {
				places = append(places, place{pattern, "nothing there"})
			}
			dirs = append(dirs, found...)
		}
		newestFirst(dirs)
		for _, dir := range dirs {
			if bin, err := s.probe(dir); accept(dir, bin, err) {
				return bin, nil
			}
		}
	}

	bin, err := s.download(major)
	if err == nil {
		return bin, nil
	}
	places = append(places, place{"download", err.Error()})
	return binaries{}, &notFoundError{major: major, places: places, cause: err}
}

func suits(bin binaries, major int) error {
	if bin.major < majorMin || bin.major > majorMax {
		return fmt.Errorf("PostgreSQL %s is not supported", bin.version)
	}
	if major != 0 && bin.major != major {
		return fmt.Errorf("PostgreSQL %s cannot use data of PostgreSQL %d", bin.version, major)
	}
	return nil
}

// usualFolders returns the folders into which packages install the server, as patterns for
// filepath.Glob.
func usualFolders(goos string, getenv func(string) string) []string {
	switch goos {
	case "linux":
		return []string{
			"/usr/lib/postgresql/*/bin", // Debian, Ubuntu
			"/usr/pgsql-*/bin",          // Fedora, RHEL
			"/usr/lib/postgresql*/bin",  // openSUSE
			"/usr/libexec/postgresql*",  // Alpine
			"/usr/bin",
			"/usr/local/pgsql/bin",
		}
	case "darwin":
		return []string{
			"/opt/homebrew/opt/postgresql@*/bin", // Homebrew on Apple silicon
			"/usr/local/opt/postgresql@*/bin",    // Homebrew on Intel
			"/Applications/Postgres.app/Contents/Versions/*/bin",
			"/opt/local/lib/postgresql*/bin", // MacPorts
		}
	case "windows":
		programs := getenv("ProgramFiles")
		if programs == "" {
			programs = `C:\Program Files`
		}
		return []string{programs + `\PostgreSQL\*\bin`}
	default:
		return []string{"/usr/local/bin", "/usr/local/pgsql/bin"}
	}
}

var numberInPath = regexp.MustCompile(`[0-9]+(\.[0-9]+)?`)

// newestFirst sorts folders by the last number in their names; those without one come last.
func newestFirst(dirs []string) {
	version := func(dir string) float64 {
		numbers := numberInPath.FindAllString(dir, -1)
		if len(numbers) == 0 {
			return 0
		}
		n, err := strconv.ParseFloat(numbers[len(numbers)-1], 64)
		if err != nil {
			return 0
		}
		return n
	}
	slices.SortStableFunc(dirs, func(a, b string) int {
		switch va, vb := version(a), version(b); {
		case va > vb:
			return -1
		case va < vb:
			return 1
		default:
			return 0
		}
	})
}

// notFoundError names the places that were searched, and the remedies.
type notFoundError struct {
	major  int // 0: any supported
	places []place
	cause  error // of the failed download
}

func (e *notFoundError) Unwrap() error { return e.cause }

func (e *notFoundError) Error() string {
	var text strings.Builder
	wanted := fmt.Sprintf("a PostgreSQL server (version %d to %d)", majorMin, majorMax)
	if e.major != 0 {
		wanted = fmt.Sprintf("a PostgreSQL %d server, which made the data,", e.major)
	}
	fmt.Fprintf(&text, "%s was not found; searched:\n", wanted)
	for _, p := range e.places {
		fmt.Fprintf(&text, "  %s: %s\n", p.where, p.why)
	}
	fmt.Fprintf(&text, "Install PostgreSQL (Debian: apt install postgresql; macOS: brew install postgresql@17), "+
		"or set %s to the folder which has initdb and postgres, or set %s to a mirror for the download, "+
		"or use a PostgreSQL that runs already: give its URL in DATABASE_URL (for the tests in PAIDONCE_TEST_DATABASE_URL)", binVariable, mirrorVariable)
	return text.String()
}

// findBinaries searches this machine. A folder that acct is not allowed to enter does not serve.
func findBinaries(ctx context.Context, acct *account, major int, progress io.Writer) (binaries, error) {
	cacheDir, cacheErr := downloadDir(acct) // a service has no home folder, and does not need one
	probe := func(dir string) (binaries, error) { return probeBinaries(ctx, acct, dir) }
	bin, err := search{
		goos:     runtime.GOOS,
		cacheDir: cacheDir,
		getenv:   os.Getenv,
		glob: func(pattern string) []string {
			dirs, _ := filepath.Glob(pattern) // its only error is a malformed pattern
			return dirs
		},
		pgConfig: func() (string, error) {
			path, err := exec.LookPath("pg_config")
			if err != nil {
				return "", errors.New("not installed")
			}
			output, err := exec.CommandContext(ctx, path, "--bindir").Output()
			return strings.TrimSpace(string(output)), err
		},
		probe: probe,
		download: func(major int) (binaries, error) {
			if err := errors.Join(ctx.Err(), cacheErr); err != nil {
				return binaries{}, err
			}
			binDir, err := download(ctx, acct, major, cacheDir, os.Getenv(mirrorVariable), progress)
			if err != nil {
				return binaries{}, err
			}
			return probe(binDir)
		},
	}.find(major)
	if ctx.Err() != nil {
		return binaries{}, context.Cause(ctx) // ctx made the probes fail
	}
	return bin, err
}

var versionOutput = regexp.MustCompile(`\(PostgreSQL\) (([0-9]+)[^ \r\n]*)`)

// probeBinaries runs postgres --version as the account. So it fails if the account is not allowed
// to run it.
func probeBinaries(ctx context.Context, acct *account, dir string) (binaries, error) {
	bin := binaries{dir: dir}
	if _, err := os.Stat(bin.postgres()); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return binaries{}, fmt.Errorf("no postgres: %w", fs.ErrNotExist)
		}
		return binaries{}, err
	}
	if _, err := os.Stat(bin.initdb()); err != nil {
		return binaries{}, errors.New("has postgres but no initdb")
	}
	output, err := acct.commandContext(ctx, string(filepath.Separator), bin.postgres(), "--version").Output()
	if err != nil {
		if acct != nil && errors.Is(err, fs.ErrPermission) {
			return binaries{}, fmt.Errorf("user %s, which PostgreSQL runs as, may not run it", acct.name)
		}
		return binaries{}, fmt.Errorf("run postgres --version: %w", err)
	}
	match := versionOutput.FindSubmatch(output)
	if match == nil {
		return binaries{}, fmt.Errorf("postgres --version says %q", output)
	}
	bin.version = string(match[1])
	bin.major, err = strconv.Atoi(string(match[2]))
	return bin, err
}
