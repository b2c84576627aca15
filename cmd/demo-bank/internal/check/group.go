package check

import (
	"cmp"
	"slices"
	"strings"
)

// group holds all requests of one key, in the order of sending. It has at least one operation.
type group struct {
	key Key
	ops []*Operation
}

// real returns the number of the key's real request: the one that was sent first.
func (g *group) real() uint64 { return g.ops[0].Request }

// firstPaid returns the 2xx answer that a client saw first, or nil.
func (g *group) firstPaid() *Operation {
	var first *Operation
	for _, op := range g.ops {
		if op.paid() && (first == nil || op.Returned < first.Returned) {
			first = op
		}
	}
	return first
}

// examplesOps is the maximum number of a key's operations that an example shows.
const examplesOps = 12

func (g *group) String() string { return g.key.String() + ": " + listing(g.ops) }

// listing shows the last operations of a key: an error is rarely at the beginning.
func listing(ops []*Operation) string {
	var b strings.Builder
	if hidden := len(ops) - examplesOps; hidden > 0 {
		b.WriteString("..., ")
		ops = ops[hidden:]
	}
	for i, op := range ops {
		if i > 0 {
			b.WriteString(", ")
		}
		b.WriteString(op.String())
	}
	return b.String()
}

// groups sorts a history by key, in the order in which each key was first seen.
func groups(ops []Operation) []group {
	numbers := make(map[Key]int32)
	of := make([]int32, len(ops))
	var sizes []int32
	var keys []Key
	for i := range ops {
		key := Key{ops[i].Scope, ops[i].Key}
		n, found := numbers[key]
		if !found {
			n = int32(len(keys))
			numbers[key] = n
			keys, sizes = append(keys, key), append(sizes, 0)
		}
		of[i] = n
		sizes[n]++
	}
	// One array for all: a million small ones would keep the garbage collector busy.
	all := make([]*Operation, len(ops))
	gs := make([]group, len(keys))
	start := int32(0)
	for n := range gs {
		end := start + sizes[n]
		gs[n] = group{key: keys[n], ops: all[start:start:end]}
		start = end
	}
	for i := range ops {
		g := &gs[of[i]]
		g.ops = append(g.ops, &ops[i])
	}
	for n := range gs {
		slices.SortStableFunc(gs[n].ops, func(a, b *Operation) int {
			return cmp.Or(cmp.Compare(a.Sent, b.Sent), cmp.Compare(a.Returned, b.Returned))
		})
	}
	return gs
}

// expectations indexes the expectations by key.
func expectations(expected []Expectation) map[Key]Expectation {
	m := make(map[Key]Expectation, len(expected))
	for _, e := range expected {
		m[Key{e.Scope, e.Key}] = e
	}
	return m
}

// Acknowledged returns the keys for which a client saw executed or replayed, each once.
func Acknowledged(ops []Operation) []Key {
	var keys []Key
	for _, g := range groups(ops) {
		if slices.ContainsFunc(g.ops, (*Operation).acknowledged) {
			keys = append(keys, g.key)
		}
	}
	return keys
}
