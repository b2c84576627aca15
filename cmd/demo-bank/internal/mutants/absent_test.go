package mutants_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"
)

// The names of the mutants are in a program that is built for them, and not in the normal one.
func TestNormalProgramContainsNoMutant(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("it builds two programs: go test without -short")
	}
	source, err := os.ReadFile("catalogue.go")
	if err != nil {
		t.Fatal(err)
	}
	names := regexp.MustCompile(`Name:\s+"([a-z-]+)"`).FindAllSubmatch(source, -1)
	if len(names) < 11 {
		t.Fatalf("the catalogue has %d mutants", len(names))
	}
	for _, build := range []struct {
		tags string
		want bool
	}{{"", false}, {"mutants", true}} {
		program := filepath.Join(t.TempDir(), "demo-bank")
		if out, err := exec.CommandContext(t.Context(), "go", "build", "-tags", build.tags, "-o", program, "../..").CombinedOutput(); err != nil {
			t.Fatalf("go build: %v\n%s", err, out)
		}
		content, err := os.ReadFile(program)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range names {
			if has := bytes.Contains(content, name[1]); has != build.want {
				t.Errorf("built with tags %q, the program contains %s: %v", build.tags, name[1], has)
			}
		}
	}
}
