package pgserver

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// machine is a search's view: folders with the version of the PostgreSQL in them.
type machine struct {
	env        map[string]string
	installed  map[string]string // folder -> version; "" is a postgres without initdb
	pgConfig   string
	downloads  bool
	downloaded []int
}

func (m *machine) search(goos string) search {
	probe := func(dir string) (binaries, error) {
		version, ok := m.installed[dir]
		if !ok {
			return binaries{}, fmt.Errorf("no postgres: %w", fs.ErrNotExist)
		}
		bin := binaries{dir: dir, version: version}
		if _, err := fmt.Sscanf(version, "%d", &bin.major); err != nil {
			return binaries{}, errors.New("has postgres but no initdb")
		}
		return bin, nil
	}
	return search{
		goos:     goos,
		cacheDir: "/cache",
		getenv:   func(name string) string { return m.env[name] },
		glob: func(pattern string) (dirs []string) {
			for dir := range m.installed {
				if ok, err := filepath.Match(pattern, dir); ok && err == nil {
					dirs = append(dirs, dir)
				}
			}
			return dirs
		},
		pgConfig: func() (string, error) {
			if m.pgConfig == "" {
				return "", errors.New("not installed")
			}
			return m.pgConfig, nil
		},
		probe: probe,
		download: func(major int) (binaries, error) {
			m.downloaded = append(m.downloaded, major)
			if !m.downloads {
				return binaries{}, errors.New("no network")
			}
			return binaries{dir: "/cache/new", major: major}, nil
		},
	}
}

func TestSearchTakesTheFirstThatServes(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("the folders are those of Unix")
	}
	const (
		debian14 = "/usr/lib/postgresql/14/bin"
		debian9  = "/usr/lib/postgresql/9.6/bin"
		debian16 = "/usr/lib/postgresql/16/bin"
		redhat17 = "/usr/pgsql-17/bin"
	)
	all := map[string]string{
		"/env": "15.1", "/path": "15.2", "/config": "15.3", debian14: "14.4", debian16: "16.5", redhat17: "17.6",
		debian9: "9.6", "/usr/bin": "18.0", "/cache/postgresql-18.3.0/bin": "18.3",
	}
	without := func(dirs ...string) map[string]string {
		left := map[string]string{}
		for dir, version := range all {
			if !slices.Contains(dirs, dir) {
				left[dir] = version
			}
		}
		return left
	}
	path := map[string]string{"PATH": ".:/sbin:/path"}
	for name, test := range map[string]struct {
		machine machine
		goos    string
		major   int
		want    string
	}{
		"PAIDONCE_PG_BIN before all": {
			machine: machine{env: map[string]string{binVariable: "/env", "PATH": "/path"}, installed: all}, want: "/env"},
		"PATH before pg_config": {machine: machine{env: path, installed: all, pgConfig: "/config"}, want: "/path"},
		"pg_config before the usual folders": {
			machine: machine{env: path, installed: without("/path"), pgConfig: "/config"}, want: "/config"},
		"newest of the usual folders": {machine: machine{installed: all}, want: redhat17},
		"14 is newer than 9.6, which is not supported": {
			machine: machine{installed: without(redhat17, debian16)}, want: debian14},
		"the usual folders before a download": {
			machine: machine{installed: map[string]string{"/usr/bin": "14.0", "/cache/postgresql-18.3.0/bin": "18.3"}},
			want:    "/usr/bin"},
		"an earlier download before a new one": {
			machine: machine{installed: map[string]string{"/cache/postgresql-18.3.0/bin": "18.3"}, downloads: true},
			want:    "/cache/postgresql-18.3.0/bin"},
		"a download at last": {machine: machine{downloads: true}, want: "/cache/new"},
		"the data's version before the order": {
			machine: machine{env: path, installed: all, pgConfig: "/config"}, major: 16, want: debian16},
		"the data's version from the net": {
			machine: machine{installed: without(debian14), downloads: true}, major: 14, want: "/cache/new"},
		"one without initdb does not serve": {
			machine: machine{env: path, installed: map[string]string{"/path": "", debian14: "14.4"}}, want: debian14},
		"one that is too new does not serve": {
			machine: machine{env: path, installed: map[string]string{"/path": "19.0", debian14: "14.4"}}, want: debian14},
		"Homebrew on macOS": {goos: "darwin", machine: machine{installed: map[string]string{
			"/opt/homebrew/opt/postgresql@16/bin": "16.1", "/opt/homebrew/opt/postgresql@17/bin": "17.1",
			"/Applications/Postgres.app/Contents/Versions/latest/bin": "17.2",
		}}, want: "/opt/homebrew/opt/postgresql@17/bin"},
		"Postgres.app on macOS": {goos: "darwin", machine: machine{installed: map[string]string{
			"/Applications/Postgres.app/Contents/Versions/latest/bin": "17.2",
		}}, want: "/Applications/Postgres.app/Contents/Versions/latest/bin"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if test.goos == "" {
				test.goos = "linux"
			}
			bin, err := test.machine.search(test.goos).find(test.major)
			if err != nil || bin.dir != test.want {
				t.Errorf("found %q, %v; want %q", bin.dir, err, test.want)
			}
			if downloaded := test.machine.downloaded; test.want == "/cache/new" {
				if !slices.Equal(downloaded, []int{test.major}) {
					t.Errorf("downloads %v", downloaded)
				}
			} else if len(downloaded) > 0 {
				t.Errorf("downloads %v", downloaded)
			}
		})
	}
}

func TestFailedSearchNamesPlacesAndCures(t *testing.T) {
	t.Parallel()
	m := &machine{env: map[string]string{"PATH": "/path"}, installed: map[string]string{"/path": "13.2"}, pgConfig: "/config"}
	_, err := m.search("linux").find(0)
	if err == nil {
		t.Fatal("found")
	}
	for _, want := range []string{
		binVariable + ": not set", "PATH: /path: PostgreSQL 13.2 is not supported", "pg_config --bindir: /config: no postgres",
		"/usr/lib/postgresql/*/bin: nothing there", "/usr/pgsql-*/bin", "/cache/postgresql-*/bin", "download: no network",
		"apt install postgresql", "set " + binVariable, "set " + mirrorVariable, "DATABASE_URL",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in:\n%v", want, err)
		}
	}
}

// A user who names a folder does not want another one.
func TestWrongBinVariableIsAnErrorAndNotASearch(t *testing.T) {
	t.Parallel()
	m := &machine{
		env:       map[string]string{binVariable: "/wrong", "PATH": "/path"},
		installed: map[string]string{"/path": "15.1"},
		downloads: true,
	}
	_, err := m.search("linux").find(0)
	if err == nil || !strings.Contains(err.Error(), binVariable+"=/wrong: no postgres") {
		t.Errorf("err = %v", err)
	}
	if len(m.downloaded) > 0 {
		t.Error("downloaded")
	}
}
