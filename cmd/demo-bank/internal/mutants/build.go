//go:build mutants

package mutants

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// runsMax is the maximum number of runs that look for a mutant. Some bugs show in a few requests of
// thousands.
const runsMax = 5

// Run builds a bank of each named mutant, or of all, and judges it, or runs the test that the
// mutant names. It prints the checks that caught each. The error wraps [ErrSurvived] if nothing
// caught one. It needs the go command and a checkout around the working directory.
func Run(ctx context.Context, judge Verdict, names []string, out io.Writer) error {
	root, err := checkout(ctx)
	if err != nil {
		return err
	}
	folder, err := os.MkdirTemp("", "demo-bank-mutants-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(folder) }()
	for _, name := range names {
		if !slices.ContainsFunc(Catalogue(), func(m Mutant) bool { return m.Name == name }) {
			return fmt.Errorf("there is no mutant %q: they are %s", name, strings.Join(namesOf(Catalogue()), ", "))
		}
	}
	chosen := slices.DeleteFunc(Catalogue(), func(m Mutant) bool { return len(names) > 0 && !slices.Contains(names, m.Name) })
	if slices.ContainsFunc(chosen, func(m Mutant) bool { return m.Test == Test{} }) {
		// A check that also fails on a healthy bank catches nothing.
		caught, err := judge(ctx, "", "none")
		switch {
		case err != nil:
			return fmt.Errorf("without a mutant: %w", err)
		case len(caught) > 0:
			return fmt.Errorf("the checks find %s wrong with a bank that has no mutant", strings.Join(caught, ", "))
		}
		if _, err := fmt.Fprintln(out, "none: every check is ok"); err != nil {
			return err
		}
	}
	suite := NewSuite(root, folder)
	var survived []string
	for _, mutant := range chosen {
		caught, err := catch(ctx, suite, mutant, judge)
		if err != nil {
			return fmt.Errorf("mutant %s: %w", mutant.Name, err)
		}
		verdict := "caught by " + strings.Join(caught, ", ")
		if len(caught) == 0 {
			verdict = "SURVIVED"
			survived = append(survived, mutant.Name)
		}
		if _, err := fmt.Fprintf(out, "%s: %s\n  %s\n", mutant.Name, verdict, mutant.Bug); err != nil {
			return err
		}
	}
	if len(survived) > 0 {
		return fmt.Errorf("%w: %s", ErrSurvived, strings.Join(survived, ", "))
	}
	return nil
}

// catch returns the names of the checks, or the test, that caught the mutant.
func catch(ctx context.Context, suite *Suite, mutant Mutant, judge Verdict) (caught []string, err error) {
	if mutant.Test != (Test{}) {
		failed, err := suite.Fails(ctx, mutant)
		if failed {
			caught = []string{mutant.Test.Func}
		}
		return caught, err
	}
	bank, err := Build(ctx, suite.root, suite.folder, mutant)
	if err != nil {
		return nil, err
	}
	defer func() { _ = os.Remove(bank) }() // the folder is removed anyway
	for run := 0; run < runsMax && len(caught) == 0 && err == nil; run++ {
		caught, err = judge(ctx, bank, mutant.Name)
	}
	return caught, err
}

// testTimeout ends a test that hangs because of its bug.
const testTimeout = "3m"

// Suite builds and runs the tests that mutants name. Each test program without a bug is built once,
// and each test runs once without a bug.
type Suite struct {
	root, folder string
	programs     map[string]string // without a bug, by folder
	healthy      map[Test]bool
}

// NewSuite returns a suite of the sources under root. It builds into folder.
func NewSuite(root, folder string) *Suite {
	return &Suite{root, folder, map[string]string{}, map[Test]bool{}}
}

// Fails reports whether the test that the mutant names fails with its bug. It returns an error if
// the mutant does not apply or compile, or if the test does not exist or fails without the bug.
func (s *Suite) Fails(ctx context.Context, mutant Mutant) (bool, error) {
	overlay, err := mutant.Overlay(s.root, s.folder)
	if err != nil {
		return false, err
	}
	test := mutant.Test
	if !s.healthy[test] {
		if s.programs[test.Folder] == "" {
			program := filepath.Join(s.folder, strings.ReplaceAll(test.Folder, "/", "-")+".test")
			if err := s.build(ctx, test, program); err != nil {
				return false, err
			}
			s.programs[test.Folder] = program
		}
		passed, out, err := s.passes(ctx, test, s.programs[test.Folder])
		if err != nil {
			return false, err
		}
		if !passed {
			return false, fmt.Errorf("without the bug %s does not pass in %s:\n%s", test.Func, test.Folder, bytes.TrimSpace(out))
		}
		s.healthy[test] = true
	}
	program := filepath.Join(s.folder, mutant.Name+".test")
	defer func() { _ = os.Remove(program) }() // the folder is removed anyway
	if err := s.build(ctx, test, program, "-overlay", overlay); err != nil {
		return false, err
	}
	passed, out, err := s.passes(ctx, test, program)
	if err == nil && !passed && !bytes.Contains(out, []byte("--- FAIL: "+test.Func+" ")) {
		err = fmt.Errorf("%s did not come to a verdict:\n%s", test.Func, bytes.TrimSpace(out))
	}
	return !passed, err
}

func (s *Suite) build(ctx context.Context, test Test, program string, flags ...string) error {
	build := exec.CommandContext(ctx, "go", append(append([]string{"test", "-c", "-o", program}, flags...), "./"+test.Folder)...)
	build.Dir = s.root
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build its test: %w\n%s", err, bytes.TrimSpace(out))
	}
	return nil
}

// passes reports whether the test passes in the program, and returns its output.
func (s *Suite) passes(ctx context.Context, test Test, program string) (bool, []byte, error) {
	run := exec.CommandContext(ctx, program, "-test.v", "-test.run", "^"+test.Func+"$", "-test.timeout", testTimeout)
	run.Dir = filepath.Join(s.root, test.Folder)
	out, err := run.CombinedOutput()
	return err == nil && bytes.Contains(out, []byte("--- PASS: "+test.Func+" ")), out, ctx.Err()
}

func namesOf(mutants []Mutant) (names []string) {
	for _, m := range mutants {
		names = append(names, m.Name)
	}
	return names
}

const module = "github.com/paidonce/idempotency"

// checkout returns the folder of the sources.
func checkout(ctx context.Context) (string, error) {
	// In the workspace, the root's module is one of the main modules, in whatever folder this runs.
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Main}} {{.Dir}}", module).Output()
	main, dir, _ := strings.Cut(strings.TrimSpace(string(out)), " ")
	if err != nil || main != "true" {
		return "", fmt.Errorf("mutants are built from the sources: run this inside a checkout of %s, with the go command and without GOWORK=off", module)
	}
	return dir, nil
}

// Build builds a bank with the mutant's bug into folder and returns its path. The sources under
// root stay unchanged.
func Build(ctx context.Context, root, folder string, mutant Mutant) (string, error) {
	overlay, err := mutant.Overlay(root, folder)
	if err != nil {
		return "", err
	}
	bank := filepath.Join(folder, mutant.Name)
	build := exec.CommandContext(ctx, "go", "build", "-overlay", overlay, "-o", bank, "./cmd/demo-bank")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build mutant %s: %w\n%s", mutant.Name, err, bytes.TrimSpace(out))
	}
	return bank, nil
}

// Packages returns the packages of the changed Go files, relative to the root.
func (m *Mutant) Packages() (packages []string) {
	for _, e := range m.edits {
		if folder := "./" + path.Dir(e.file); strings.HasSuffix(e.file, ".go") && !slices.Contains(packages, folder) {
			packages = append(packages, folder)
		}
	}
	return packages
}

// Overlay writes the changed files into folder, and a file that lists them for the go command. It
// returns that file's path. If a file has changed so that the mutant no longer applies, the error
// names it.
func (m *Mutant) Overlay(root, folder string) (string, error) {
	sources := map[string]string{}
	for _, e := range m.edits {
		source, read := sources[e.file]
		if !read {
			content, err := os.ReadFile(filepath.Join(root, e.file))
			if err != nil {
				return "", err
			}
			source = string(content)
		}
		if strings.Count(source, e.before) != 1 {
			return "", fmt.Errorf("mutant %s: %s has changed: what it replaces must stand there once", m.Name, e.file)
		}
		sources[e.file] = strings.Replace(source, e.before, e.after, 1)
	}
	replace := map[string]string{}
	for file, source := range sources {
		changed := filepath.Join(folder, m.Name+"-"+strings.ReplaceAll(file, "/", "-"))
		if err := os.WriteFile(changed, []byte(source), 0o600); err != nil {
			return "", err
		}
		replace[filepath.Join(root, file)] = changed
	}
	content, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		return "", err
	}
	overlay := filepath.Join(folder, m.Name+".json")
	return overlay, os.WriteFile(overlay, content, 0o600)
}
