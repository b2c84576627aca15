// Package mutants holds bugs that the chaos run, or a test that the bug names, must catch. Each is
// a change of this repository's sources; the package builds a bank or the test from it. Without
// -tags mutants the package contains only a message: the normal program contains none of the bugs,
// not even as text.
package mutants

import (
	"context"
	"errors"
)

// ErrSurvived means that a seeded bug passed every check.
var ErrSurvived = errors.New("a mutant survived: the checks don't see its bug")

// Verdict runs chaos against one bank and returns the names of the checks that failed.
type Verdict func(ctx context.Context, bank, name string) (caught []string, err error)
