package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/cookiejar"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// pages is a running idemctl serve.
type pages struct {
	URL, Token string
	stderr     bytes.Buffer
}

// pagesOf starts idemctl serve and waits until it serves. When the test ends it is interrupted, and
// must exit with 0.
func (b *testBundle) pagesOf(t *testing.T, environment []string, args ...string) *pages {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), waitMax)
	cmd := command(ctx, b.URL, append([]string{"--json", "serve", "--addr", "127.0.0.1:0"}, args...)...)
	cmd.Env = append(cmd.Env, environment...)
	p := &pages{}
	cmd.Stderr = &p.stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		defer cancel()
		if err := cmd.Process.Signal(os.Interrupt); err != nil {
			t.Error(err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("serve ended with %v: %s", err, p.stderr.String())
		}
		if strings.Contains(p.stderr.String(), "canary") {
			t.Errorf("the log shows a key: %s", p.stderr.String())
		}
	})
	line, err := bufio.NewReader(stdout).ReadBytes('\n')
	if err != nil {
		t.Fatalf("serve said nothing: %v", err)
	}
	if err := json.Unmarshal(line, p); err != nil {
		t.Fatalf("%v in %s", err, line)
	}
	return p
}

// get requests a page and returns the response and its text.
func (p *pages) get(t *testing.T, path, token string) (*http.Response, string) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, p.URL+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		request.SetBasicAuth("anybody", token)
	}
	jar, _ := cookiejar.New(nil) // can't fail
	response, err := (&http.Client{Jar: jar}).Do(request)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(response.Body)
	if err := errors.Join(err, response.Body.Close()); err != nil {
		t.Fatal(err)
	}
	return response, string(body)
}

// The pages are served only to clients with the token.
func TestServeAsksForItsToken(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.do(t, "canary-key")
	p := b.pagesOf(t, nil)
	if len(p.Token) < tokenBytesMin {
		t.Fatalf("the token that was made is %q", p.Token)
	}
	for _, path := range []string{"", "list", "stats", "doctor"} {
		for name, token := range map[string]string{"none": "", "another": p.Token + "x", "a part": p.Token[:len(p.Token)-1]} {
			response, body := p.get(t, path, token)
			if response.StatusCode != http.StatusUnauthorized || !strings.HasPrefix(response.Header.Get("WWW-Authenticate"), "Basic realm=") || strings.Contains(body, "canary") || strings.Contains(body, "acme") {
				t.Errorf("%q with token %s: %d %v, %s", path, name, response.StatusCode, response.Header, body)
			}
		}
		if response, body := p.get(t, path, p.Token); response.StatusCode != http.StatusOK {
			t.Errorf("%q: %d, %s", path, response.StatusCode, body)
		}
	}
	if _, body := p.get(t, "list", p.Token); !strings.Contains(body, "canary-key") {
		t.Error("the list does not show the key")
	}
	if other := b.pagesOf(t, nil); other.Token == p.Token {
		t.Error("two servers made the same token")
	}
}

// A given token is used, within its limits, and never printed.
func TestServeWithATokenOfYourOwn(t *testing.T) {
	t.Parallel()
	b := setup(t)
	token, longest := "correct-horse-bt", strings.Repeat("x", tokenBytesMax)
	if len(token) != tokenBytesMin {
		t.Fatalf("the shortest token has %d bytes", len(token))
	}
	file := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(file, []byte(token+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string]*pages{
		"variable": b.pagesOf(t, []string{tokenVariable + "=" + token}),
		"file":     b.pagesOf(t, []string{tokenVariable + "=something-else-entirely"}, "--token-file", file, "--read-only", "--actor", "alice"),
		"longest":  b.pagesOf(t, []string{tokenVariable + "=" + longest}),
	} {
		if p.Token != "" {
			t.Errorf("%s: the token is printed", name)
		}
		token := token
		if name == "longest" {
			token = longest
		}
		if response, _ := p.get(t, "", token); response.StatusCode != http.StatusOK {
			t.Errorf("%s: %d", name, response.StatusCode)
		}
	}
}

func TestServeRefuses(t *testing.T) {
	t.Parallel()
	b := setup(t)
	folder := t.TempDir()
	short, long, empty := filepath.Join(folder, "short"), filepath.Join(folder, "long"), filepath.Join(folder, "empty")
	for file, content := range map[string]string{short: "canary" + strings.Repeat("x", tokenBytesMin-7), long: "canary" + strings.Repeat("x", tokenBytesMax-5), empty: ""} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, test := range map[string]struct {
		environment string
		args        []string
		code        int
	}{
		"every address":        {"", []string{"--addr", "0.0.0.0:0"}, exitUsage},
		"no host":              {"", []string{"--addr", ":0"}, exitUsage},
		"another machine's":    {"", []string{"--addr", "192.0.2.1:0"}, exitUsage},
		"no port":              {"", []string{"--addr", "127.0.0.1"}, exitUsage},
		"short token":          {"", []string{"--token-file", short}, exitUsage},
		"long token":           {"", []string{"--token-file", long}, exitUsage},
		"empty token":          {"", []string{"--token-file", empty}, exitUsage},
		"empty variable":       {tokenVariable + "=", nil, exitUsage},
		"short variable":       {tokenVariable + "=canary", nil, exitUsage},
		"no such file":         {"", []string{"--token-file", empty + "/nowhere"}, exitFailed},
		"actor over the limit": {"", []string{"--actor", strings.Repeat("x", 256)}, exitUsage},
		"no database":          {"DATABASE_URL=postgres://nobody@127.0.0.1:1/x", nil, exitFailed},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), waitMax)
		cmd := command(ctx, b.URL, append([]string{"serve"}, test.args...)...)
		if test.environment != "" {
			cmd.Env = append(cmd.Env, test.environment)
		}
		if r := execute(t, cmd); r.code != test.code || strings.Contains(r.stderr, "canary") {
			t.Errorf("%s: exit code %d, want %d: %s", name, r.code, test.code, r.stderr)
		}
		cancel()
	}
}
