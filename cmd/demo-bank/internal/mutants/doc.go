// Package mutants holds the bugs that the chaos run must catch, or a test that the bug names, each as a change of this
// repository's sources, and builds a bank or that test of each. It is empty but for a message unless it is built with -tags mutants: the normal program
// contains none of them, not even as text.
package mutants

import (
	"context"
	"errors"
)

// ErrSurvived means that a seeded bug passed every check.
var ErrSurvived = errors.New("a mutant survived: the checks don't see its bug")

// Verdict runs chaos against one bank and returns the names of the checks that failed.
type Verdict func(ctx context.Context, bank, name string) (caught []string, err error)
