// Package faults has no code, only tests: what a client sees, and what is in the books, when the world around a payment
// fails. Each test is named for its row of the table of faults in docs/guarantees.md and makes the fault for real: a
// PostgreSQL that is killed, a disk that is full, a standby that is promoted, a clock that jumps, a pooler in between.
//
// Some rows need a program of the system's (.ci/packages has the names of Debian's packages). Where it is missing the test
// is skipped with a line that says how to run it; with PAIDONCE_FAULTS=required in the environment it fails instead. The
// full disk needs root.
package faults
