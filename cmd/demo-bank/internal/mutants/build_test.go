//go:build mutants

package mutants_test

import (
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/mutants"
)

// The sources that a mutant changes evolve. Each mutant must still apply and compile, and the test
// that it names must fail. With -short it must only apply, and its own packages must compile.
func TestEveryMutantBuilds(t *testing.T) {
	root, err := filepath.Abs("../../../..")
	if err != nil {
		t.Fatal(err)
	}
	suite := mutants.NewSuite(root, t.TempDir())
	for _, mutant := range mutants.Catalogue() {
		t.Run(mutant.Name, func(t *testing.T) {
			overlay, err := mutant.Overlay(root, t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			if testing.Short() { // the packages with the bug, without what imports them
				build := exec.CommandContext(t.Context(), "go", append([]string{"build", "-overlay", overlay}, mutant.Packages()...)...)
				build.Dir = root
				if out, err := build.CombinedOutput(); err != nil {
					t.Errorf("%v\n%s", err, out)
				}
				return
			}
			if mutant.Test != (mutants.Test{}) {
				if failed, err := suite.Fails(t.Context(), mutant); err != nil || !failed {
					t.Errorf("%s passes with the bug, %v", mutant.Test.Func, err)
				}
				return
			}
			if _, err := mutants.Build(t.Context(), root, t.TempDir(), mutant); err != nil {
				t.Error(err)
			}
		})
	}
}
