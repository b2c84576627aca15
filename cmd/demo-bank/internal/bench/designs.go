package bench

import "slices"

// kind is the kind of the clients' requests to a design.
type kind int

const (
	fresh    kind = iota // a transfer under a new key
	replay               // a transfer that was already answered, under its key
	old                  // the same, from anywhere in a full table
	read                 // a GET of an existing transfer
	plain                // a GET that needs no transfer
	consumes             // no request: it consumes messages
)

// design is one way to answer requests.
type design struct {
	name  string
	kind  kind
	keyed bool     // it has records, and replays them
	bases []string // the designs for comparison; the table uses the first
}

// The designs, in the order of the report. The first group runs the same statements in batches, the
// second one after another, the third reads, and the last consumes messages.
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
	{name: "consume-single", kind: consumes, keyed: true, bases: []string{"consume-single"}},
	{name: "consume-engine", kind: consumes, keyed: true, bases: []string{"consume-single"}},
	{name: "consume-batch", kind: consumes, keyed: true, bases: []string{"consume-single", "consume-engine"}},
	{name: "consume-deferred", kind: consumes, keyed: true, bases: []string{"consume-single", "consume-engine"}},
	{name: "consume-slice", kind: consumes, keyed: true, bases: []string{"consume-single", "consume-engine", "consume-bare-slice"}},
	{name: "consume-bare-single", kind: consumes, bases: []string{"consume-single"}},
	{name: "consume-bare-slice", kind: consumes, bases: []string{"consume-single"}},
}

// replayOld is replay-database for records of any age. It is measured if a table is full.
const replayOld = "replay-old"

// Routes that are no design: the one that makes the transfers for get-by-id, and those of the wait
// part.
const (
	routeMade  = "made"
	routeWait  = "wait"
	routeOther = "other"
)

// Designs returns the names of all designs, in the order of the report.
func Designs() []string { return append(requesting(), consuming()...) }

// requesting returns the names of the designs that answer requests.
func requesting() []string { return namesOf(func(d design) bool { return d.kind != consumes }) }

// consuming returns the names of the designs that consume messages.
func consuming() []string { return namesOf(func(d design) bool { return d.kind == consumes }) }

func namesOf(chosen func(design) bool) []string {
	var names []string
	for _, d := range designs {
		if chosen(d) {
			names = append(names, d.name)
		}
	}
	return names
}

func designOf(name string) design {
	if name == replayOld {
		return design{name: name, kind: old, keyed: true}
	}
	return designs[slices.IndexFunc(designs, func(d design) bool { return d.name == name })]
}
