// Package faults has no code, only tests of faults around a payment: of the client's answers, and
// of the books. Each test is named for its row of the table of faults in docs/guarantees.md, and
// makes the fault for real: it kills PostgreSQL, fills a disk, promotes a standby, moves a clock,
// or puts a pooler in between.
//
// Some rows need a program of the system (.ci/packages has the names of Debian's packages). If it
// is missing, the test is skipped with a line that says how to run it; with
// PAIDONCE_FAULTS=required in the environment it fails instead. The full disk needs root.
package faults
