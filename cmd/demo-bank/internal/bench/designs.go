package bench

import "slices"

// kind is what clients send to a design.
type kind int

const (
	fresh  kind = iota // a transfer under a key that is new
	replay             // a transfer that was answered before, under its key
	old                // the same, of a record from anywhere in a full table
	read               // a GET of a transfer that is there
	plain              // a GET of nothing in particular
)

// design is one way to answer requests.
type design struct {
	name  string
	kind  kind
	keyed bool     // it has a record, and replays
	bases []string // what it is held against, the first in the table
}

// The designs, in the order of the report. Those of the first group run the same statements in batches, those of the second one
// after another; the last read.
var designs = []design{
	{name: "bare-batch", kind: fresh, bases: []string{"bare-batch"}},
	{name: "bare-folded", kind: fresh, bases: []string{"bare-batch"}},
	{name: "ours-batch", kind: fresh, keyed: true, bases: []string{"bare-batch", "lease"}},
	{name: "ours-deferred", kind: fresh, keyed: true, bases: []string{"bare-batch", "ours-batch"}},
	{name: "insert-first", kind: fresh, keyed: true, bases: []string{"bare-batch"}},
	{name: "lease", kind: fresh, keyed: true, bases: []string{"bare-batch"}},
	{name: "bare-naive", kind: fresh, bases: []string{"bare-naive"}},
	{name: "ours-naive", kind: fresh, keyed: true, bases: []string{"bare-naive"}},
	{name: "get-by-id", kind: read, bases: []string{"get-by-id"}},
	{name: "replay-database", kind: replay, keyed: true, bases: []string{"get-by-id"}},
	{name: "no-database", kind: plain, bases: []string{"get-by-id"}},
}

// replayOld is replay-database where records of any age are asked for. It is measured where a table is full.
const replayOld = "replay-old"

// Routes that are no design: that which makes what get-by-id reads, and those of the part that waits.
const (
	routeMade  = "made"
	routeWait  = "wait"
	routeOther = "other"
)

// Designs returns the names of all designs, in the order of the report.
func Designs() []string {
	var names []string
	for _, d := range designs {
		names = append(names, d.name)
	}
	return names
}

func designOf(name string) design {
	if name == replayOld {
		return design{name: name, kind: old, keyed: true}
	}
	return designs[slices.IndexFunc(designs, func(d design) bool { return d.name == name })]
}
