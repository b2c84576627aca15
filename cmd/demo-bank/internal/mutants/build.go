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
	"path/filepath"
	"slices"
	"strings"
)

// runsMax is how many runs may look for a mutant. Some bugs show in a few requests of thousands.
const runsMax = 5

// Run builds a bank of each mutant, of those named or of all, and has it judged. It prints which check caught which.
// The error wraps [ErrSurvived] where none did. It needs the go command and a checkout around the working directory.
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
	// What catches a healthy bank too catches nothing.
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
	var survived []string
	for _, mutant := range Catalogue() {
		if len(names) > 0 && !slices.Contains(names, mutant.Name) {
			continue
		}
		bank, err := Build(ctx, root, folder, mutant)
		if err != nil {
			return err
		}
		var caught []string
		for run := 0; run < runsMax && len(caught) == 0; run++ {
			if caught, err = judge(ctx, bank, mutant.Name); err != nil {
				return fmt.Errorf("mutant %s: %w", mutant.Name, err)
			}
		}
		verdict := "caught by " + strings.Join(caught, ", ")
		if len(caught) == 0 {
			verdict = "SURVIVED"
			survived = append(survived, mutant.Name)
		}
		if _, err := fmt.Fprintf(out, "%s: %s\n  %s\n", mutant.Name, verdict, mutant.Bug); err != nil {
			return err
		}
		_ = os.Remove(bank) // the folder goes anyway
	}
	if len(survived) > 0 {
		return fmt.Errorf("%w: %s", ErrSurvived, strings.Join(survived, ", "))
	}
	return nil
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
	out, err := exec.CommandContext(ctx, "go", "list", "-m", "-f", "{{.Path}} {{.Dir}}").Output()
	path, dir, _ := strings.Cut(strings.TrimSpace(string(out)), " ")
	if err != nil || path != module {
		return "", fmt.Errorf("mutants are built from the sources: run this inside a checkout of %s, with the go command", module)
	}
	return dir, nil
}

// Build builds a bank with the mutant's bug into folder and returns its path. The sources under root stay as they are.
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

// Overlay writes the changed files into folder, and the file that tells the go command of them,
// whose path it returns. The error says which file has changed so that the mutant no longer applies.
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
