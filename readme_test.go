package idempotency

import (
	"os"
	"strings"
	"testing"
)

// The README's example is the quickstart, which has a test that runs it.
func TestReadmeShowsTheQuickstart(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(readme), "```go\n")
	example, _, found := strings.Cut(rest, "```")
	if !found {
		t.Fatal("the README has no Go example")
	}
	quickstart, err := os.ReadFile("examples/quickstart/main.go")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(quickstart), example) {
		t.Error("the README's first Go example is not in examples/quickstart/main.go")
	}
	if lines := strings.Count(string(readme), "\n"); lines >= 250 {
		t.Errorf("the README has %d lines, and should have less than 250", lines)
	}
}

// Users look for the license and for the address for reports of vulnerabilities.
func TestReadmeNamesLicenseAndSecurity(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for name, first := range map[string]string{"LICENSE": "MIT License\n", "SECURITY.md": "# Security\n"} {
		if content, err := os.ReadFile(name); err != nil || !strings.HasPrefix(string(content), first) {
			t.Errorf("%s: %v, and it should begin with %q", name, err, first)
		}
		if !strings.Contains(string(readme), "]("+name+")") {
			t.Errorf("the README has no link to %s", name)
		}
	}
}
