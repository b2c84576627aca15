package pgserver

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	embeddedpostgres "github.com/fergusstrange/embedded-postgres"
)

const (
	downloadPrefix         = "postgresql-"
	downloadMajorDefault   = 17
	downloadProgressPeriod = 10 * time.Second
)

// downloadVersions are the builds that embedded-postgres knows.
var downloadVersions = map[int]embeddedpostgres.PostgresVersion{
	14: embeddedpostgres.V14,
	15: embeddedpostgres.V15,
	16: embeddedpostgres.V16,
	17: embeddedpostgres.V17,
	18: embeddedpostgres.V18,
}

// downloadDir returns the folder for downloads: in the user's cache folder, or for root in a place
// that PostgreSQL's account may enter.
func downloadDir(acct *account) (string, error) {
	if acct != nil {
		return "/var/cache/paidonce", nil
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find cache folder: %w", err)
	}
	return filepath.Join(dir, "paidonce"), nil
}

// download fetches the server programs of a major version (0: the default one) into dir and returns
// their folder. If ctx ends first it returns at once, but the download itself cannot be
// interrupted: it ends and cleans up later.
func download(ctx context.Context, acct *account, major int, dir, mirror string, progress io.Writer) (string, error) {
	if major == 0 {
		major = downloadMajorDefault
	}
	version, ok := downloadVersions[major]
	if !ok {
		return "", fmt.Errorf("PostgreSQL %d is not supported", major)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	if err := acct.reach(dir, "install PostgreSQL instead"); err != nil {
		return "", err
	}
	target := filepath.Join(dir, downloadPrefix+string(version))
	fmt.Fprintf(progress, "downloading PostgreSQL %s into %s (about 10 MB, once)\n", version, target)

	begin := time.Now()
	fetched := make(chan error, 1)
	go func() { fetched <- fetch(version, target, mirror) }()
	tick := time.NewTicker(downloadProgressPeriod)
	defer tick.Stop()
	for {
		select {
		case err := <-fetched:
			if err != nil {
				return "", err
			}
			fmt.Fprintf(progress, "downloaded PostgreSQL %s in %.1f s\n", version, time.Since(begin).Seconds())
			return filepath.Join(target, "bin"), nil
		case <-ctx.Done():
			return "", context.Cause(ctx)
		case <-tick.C:
			fmt.Fprintf(progress, "still downloading PostgreSQL %s after %.0f s\n", version, time.Since(begin).Seconds())
		}
	}
}

// fetch downloads into a folder beside target and renames that folder, so that target is always
// complete.
//
// embedded-postgres downloads, checks the checksum and unpacks only as the first part of its own
// Start. The rest is of no use here: it cannot drop root, nor listen only on a socket. So Start
// gets a data folder that looks initialized but is empty. pg_ctl gives up on it at once, and fetch
// only checks that the programs are there. Start leaves an empty log file in the folder for
// temporary files, and does not return its name.
func fetch(version embeddedpostgres.PostgresVersion, target, mirror string) error {
	work, err := os.MkdirTemp(filepath.Dir(target), "download-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	unpacked := filepath.Join(work, "unpacked")
	data := filepath.Join(work, "data")
	if err := os.Mkdir(data, 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(data, "PG_VERSION"), []byte(version), 0o600); err != nil {
		return err
	}
	config := embeddedpostgres.DefaultConfig().
		Version(version).
		Port(0).
		CachePath(filepath.Join(work, "archive")).
		BinariesPath(unpacked).
		RuntimePath(filepath.Join(work, "runtime")).
		DataPath(data).
		Logger(io.Discard)
	if mirror != "" {
		config = config.BinaryRepositoryURL(mirror)
	}
	startErr := embeddedpostgres.NewDatabase(config).Start()
	bin := binaries{dir: filepath.Join(unpacked, "bin")}
	for _, program := range []string{bin.postgres(), bin.initdb()} {
		if _, err := os.Stat(program); err != nil {
			if startErr != nil {
				return startErr // the reason why the programs are not there
			}
			return err
		}
	}
	if err := os.Chmod(unpacked, 0o755); err != nil {
		return err
	}
	if err := os.Rename(unpacked, target); err != nil {
		if _, statErr := os.Stat(filepath.Join(target, "bin")); statErr == nil {
			return nil // another process was faster
		}
		return err
	}
	return nil
}
