package faults_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// buildPrograms builds both versions. The old sources have their own program, because their API
// differs.
func buildPrograms(t *testing.T) (oldProgram, newProgram string) {
	t.Helper()
	const program = "internal/faults/testdata/payments"
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	build := func(sources, output string) string {
		cmd := exec.Command("go", "build", "-buildvcs=false", "-o", filepath.Join(dir, output), "./"+program)
		cmd.Dir = sources
		if text, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", output, err, text)
		}
		return filepath.Join(dir, output)
	}
	newProgram = build(root, "new")
	older := filepath.Join(dir, "older")
	commit, err := checkOutOlder(root, older)
	if err != nil {
		fmt.Fprintf(os.Stderr, "F30: NO OLDER SOURCES, so both versions are built from these (%v): clone with the history (git fetch --unshallow)\n", err)
		return newProgram, newProgram
	}
	t.Logf("the old version is that of commit %s", commit)
	return build(older, "old"), newProgram
}

// checkOutOlder writes to dir the sources from before the last change of the library. That change
// might not be committed yet.
func checkOutOlder(root, dir string) (commit string, err error) {
	library := []string{"--", ":(top,glob)*.go", ":(top)middleware", ":(top)storage/postgres", ":(top)migrations", ":(exclude,top,glob)**/*_test.go"}
	var changed, found bytes.Buffer
	if err := git(root, &changed, append([]string{"status", "--porcelain"}, library...)...); err != nil {
		return "", err
	}
	revision := "HEAD"
	if changed.Len() == 0 {
		if err := git(root, &found, append([]string{"log", "-1", "--format=%H"}, library...)...); err != nil {
			return "", err
		}
		revision = strings.TrimSpace(found.String()) + "^"
	}
	return checkOut(root, dir, revision)
}

// checkOut writes to dir the sources of a revision.
func checkOut(root, dir, revision string) (commit string, err error) {
	var found, archive bytes.Buffer
	if err := git(root, &found, "rev-parse", "--verify", "--short", revision+"^{commit}"); err != nil {
		return "", err
	}
	commit = strings.TrimSpace(found.String())
	if err := git(root, &archive, "archive", "--format=tar", commit); err != nil {
		return "", err
	}
	return commit, unpack(&archive, dir)
}

func git(root string, output io.Writer, arguments ...string) error {
	cmd := exec.Command("git", append([]string{"-C", root}, arguments...)...)
	var message bytes.Buffer
	cmd.Stdout, cmd.Stderr = output, &message
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("git %s: %w: %s", arguments[0], err, strings.TrimSpace(message.String()))
	}
	return nil
}

// unpack writes the folders and files of an archive to dir.
func unpack(archive io.Reader, dir string) error {
	for reader := tar.NewReader(archive); ; {
		entry, err := reader.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if !filepath.IsLocal(entry.Name) {
			continue
		}
		path := filepath.Join(dir, entry.Name)
		switch entry.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(path, 0o755)
		case tar.TypeReg:
			err = writeFile(path, reader)
		}
		if err != nil {
			return err
		}
	}
}

func writeFile(path string, content io.Reader) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(file, content)
	return errors.Join(err, file.Close())
}
