//go:build !mutants

package mutants

import (
	"context"
	"errors"
	"io"
)

// Run returns an error that says how to get a program with mutants.
func Run(context.Context, Verdict, []string, io.Writer) error {
	return errors.New("this program has no mutants: from a checkout, go run -tags mutants ./cmd/demo-bank chaos --mutants")
}
