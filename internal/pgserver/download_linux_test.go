package pgserver

import (
	"archive/zip"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Not parallel, like the other downloads: embedded-postgres leaves an empty log file in TMPDIR.
func TestDownloadComesFromTheMirrorAndIsComplete(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	url := mirror(t, "testdata/server.txz")
	dir := filepath.Join(folder(t), "cache")
	var progress bytes.Buffer
	for range 2 { // the second time, another process was faster
		binDir, err := download(t.Context(), nil, 17, dir, url, &progress)
		if err != nil {
			t.Fatal(err)
		}
		bin, err := probeBinaries(t.Context(), nil, binDir)
		if err != nil || bin.version != "17.5" || bin.major != 17 {
			t.Errorf("downloaded %+v, %v", bin, err)
		}
		if found, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(found) != 1 {
			t.Errorf("cache folder has %q, %v", found, err)
		}
	}
	if text := progress.String(); !strings.HasPrefix(text, "downloading PostgreSQL 17.") || !strings.Contains(text, "\ndownloaded") {
		t.Errorf("progress %q", text)
	}
}

func TestFailedDownloadLeavesNothing(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	for name, url := range map[string]string{
		"no mirror there":  "http://127.0.0.1:1",
		"nothing in it":    mirror(t, ""),
		"a broken archive": mirror(t, "download.go"),
	} {
		t.Run(name, func(t *testing.T) {
			dir := folder(t)
			if _, err := download(t.Context(), nil, 16, dir, url, &bytes.Buffer{}); err == nil {
				t.Error("no error")
			}
			if found, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(found) > 0 {
				t.Errorf("left %q, %v", found, err)
			}
		})
	}
}

func TestCancelledDownloadReturnsAtOnce(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	asked, answer := make(chan struct{}), make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		close(asked)
		<-answer
	}))
	t.Cleanup(func() {
		close(answer)
		server.Close()
	})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-asked
		cancel()
	}()
	if _, err := download(ctx, nil, 0, t.TempDir(), server.URL, &bytes.Buffer{}); !errors.Is(err, context.Canceled) {
		t.Errorf("err = %v", err)
	}
}

// mirror serves one file as the server programs of any version, or nothing when there is no file.
func mirror(t *testing.T, file string) (url string) {
	t.Helper()
	var archive bytes.Buffer
	if file != "" {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		writer := zip.NewWriter(&archive)
		entry, err := writer.Create("postgres.txz")
		if err == nil {
			_, err = entry.Write(text)
		}
		if err := errors.Join(err, writer.Close()); err != nil {
			t.Fatal(err)
		}
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case file == "":
			http.NotFound(w, r)
		case strings.HasSuffix(r.URL.Path, ".sha256"):
			fmt.Fprintf(w, "%x", sha256.Sum256(archive.Bytes()))
		default:
			_, _ = w.Write(archive.Bytes()) // the client reports the missing bytes
		}
	}))
	t.Cleanup(func() {
		server.Close()
		http.DefaultClient.CloseIdleConnections() // embedded-postgres uses it
	})
	return server.URL
}
