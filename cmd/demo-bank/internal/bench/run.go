package bench

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// run is the state of one run.
type run struct {
	config   Config
	started  time.Time
	rng      *rand.Rand // for the order of designs
	drawn    uint64     // number of clients so far: each has its own random numbers
	cluster  cluster
	child    *child
	postgres string // its version
	cpuKnown bool

	blocks  []*Block
	filled  map[int64]*filled
	wait    *Wait
	expiry  *Expiry
	leftOut []string
	doing   atomic.Pointer[string] // for the progress
}

func newRun(config Config) *run {
	r := &run{config: config, started: time.Now(), rng: rand.New(rand.NewPCG(config.Seed, 0)), cpuKnown: true}
	r.cluster.config = config
	r.enter("starting")
	return r
}

func (r *run) enter(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	r.doing.Store(&text)
}

func (r *run) close() error {
	r.enter("stopping")
	var err error
	if r.child != nil {
		err = r.child.close()
	}
	return errors.Join(err, r.cluster.close())
}

// step is a thing to measure.
type step struct {
	name  string
	fsync string
	do    func(context.Context) error
}

// parts does one step after another until all are done or the time has elapsed.
func (r *run) parts(ctx context.Context) (err error) {
	steps := r.steps()
	for i, s := range steps {
		if err = r.step(ctx, s); err == nil {
			continue
		}
		if errors.Is(context.Cause(ctx), errDuration) {
			for _, left := range steps[i:] {
				r.leftOut = append(r.leftOut, left.name)
			}
			return errDuration
		}
		return fmt.Errorf("%s: %w", s.name, err)
	}
	return nil
}

func (r *run) step(ctx context.Context, s step) error {
	r.enter("%s", s.name)
	if r.child == nil {
		var err error
		if r.child, err = startChild(ctx); err != nil {
			return err
		}
	}
	if err := r.cluster.restart(ctx, s.fsync); err != nil {
		return err
	}
	r.postgres = r.cluster.server.Version()
	return s.do(ctx)
}

// steps returns all steps, in order.
func (r *run) steps() []step {
	c := &r.config
	has := func(part string) bool { return slices.Contains(c.Parts, part) }
	most := slices.Max(c.Clients)
	var steps []step
	if has(PartKeys) {
		for _, keys := range c.Keys {
			if keys > 0 {
				steps = append(steps, step{fmt.Sprintf("fill a table with %d keys", keys), "off", func(ctx context.Context) error { return r.fill(ctx, keys) }})
			}
		}
	}
	add := func(b *Block, entries entriesFunc) {
		steps = append(steps, step{b.title(), b.Fsync, func(ctx context.Context) error { return r.block(ctx, b, entries) }})
	}
	for _, fsync := range c.Fsync {
		if has(PartDesigns) && len(r.wanted(requesting())) > 0 {
			for _, clients := range c.Clients {
				add(&Block{Part: PartDesigns, Clients: clients, Fsync: fsync}, r.designEntries)
			}
		}
		if has(PartKeys) {
			for _, keys := range c.Keys {
				if keys > 0 {
					add(&Block{Part: PartKeys, Clients: most, Fsync: fsync, Keys: keys}, r.keysEntries)
				}
			}
		}
		if has(PartMessages) && len(r.wanted(consuming())) > 0 {
			for _, partitions := range partitionsOf(c.Quick) {
				add(&Block{Part: PartMessages, Clients: partitions, Fsync: fsync}, r.messageEntries)
			}
		}
		if fsync != c.Fsync[0] {
			continue
		}
		for _, delay := range c.Delays {
			for _, clients := range slices.Compact([]int{slices.Min(c.Clients), most}) {
				if has(PartDelay) && delay > 0 && len(r.wanted(requesting())) > 0 {
					add(&Block{Part: PartDelay, Clients: clients, Fsync: fsync, DelayMS: float64(delay) / float64(time.Millisecond)}, r.designEntries)
				}
			}
		}
		if has(PartWait) {
			steps = append(steps, step{"duplicates of a request that runs", fsync, r.measureWait})
		}
		if has(PartExpiry) {
			steps = append(steps, step{fmt.Sprintf("expiry of %d keys", c.Expired), fsync, r.measureExpiry})
		}
	}
	return steps
}

// entry is one line of a block: a design on a table.
type entry struct {
	design  design
	keys    int64
	target  target
	next    []int64 // offsets of the partitions, if it consumes messages
	samples []Sample
}

// entriesFunc sets up the serving process for a block and returns the block's entries. It may use
// the block's clients.
type entriesFunc func(ctx context.Context, b *Block, clients []*client) ([]*entry, error)

// block measures all entries of a block, each once in each round, in an order that the seed draws.
func (r *run) block(ctx context.Context, b *Block, entries entriesFunc) error {
	b.PoolSize = r.config.PoolSize
	if b.PoolSize == 0 {
		b.PoolSize = b.Clients
	}
	if err := r.cluster.reset(ctx); err != nil {
		return err
	}
	clients := r.clients(b.Clients)
	defer closeAll(clients)
	lines, err := entries(ctx, b, clients)
	if err != nil {
		return err
	}
	// Warm up: new tables and processes behave differently.
	for _, e := range lines {
		r.enter("%s: warming up, %s", b.title(), e.design.name)
		warmed, err := r.drive(ctx, clients, e, runIn, r.config.Slice/2)
		if err != nil {
			return err
		}
		if e.design.kind == fresh {
			b.acknowledged += warmed.requests
		}
	}
	for round := range r.config.Rounds {
		for at, i := range r.rng.Perm(len(lines)) {
			r.enter("%s: round %d of %d, %d of %d, %s", b.title(), round+1, r.config.Rounds, at+1, len(lines), lines[i].design.name)
			sample, err := r.measure(ctx, clients, lines[i], round)
			if err != nil {
				return err
			}
			b.acknowledged += sample.acknowledged
			lines[i].samples = append(lines[i].samples, sample)
		}
		if b.Part == PartMessages {
			if err := r.cluster.checkMessages(ctx, lines); err != nil {
				return err
			}
		}
	}
	if err := r.cluster.check(ctx, b.acknowledged); err != nil {
		return err
	}
	b.sum(lines, r.cpuKnown)
	r.blocks = append(r.blocks, b)
	return nil
}

// clients returns n new clients.
func (r *run) clients(n int) []*client {
	var clients []*client
	for range n {
		r.drawn++
		clients = append(clients, newClient(r.child.address, r.config.Seed, r.drawn))
	}
	return clients
}

func closeAll(clients []*client) {
	for _, c := range clients {
		c.close()
	}
}

// set makes the serving process serve a block's designs.
func (r *run) set(ctx context.Context, b *Block, schemas []string, names []string) error {
	url, err := r.cluster.url(time.Duration(b.DelayMS * float64(time.Millisecond)))
	if err != nil {
		return err
	}
	_, err = r.child.ask(ctx, order{Set: &setting{DatabaseURL: url, Schemas: schemas, Designs: names, PoolSize: b.PoolSize, Partitions: b.Clients}})
	return err
}

// wanted returns those of these designs that the run measures.
func (r *run) wanted(names []string) []string {
	return slices.DeleteFunc(names, func(name string) bool { return !slices.Contains(r.config.Designs, name) })
}

// designEntries returns one entry for each design.
func (r *run) designEntries(ctx context.Context, b *Block, clients []*client) ([]*entry, error) {
	schema := schemaOf(0)
	if err := r.set(ctx, b, []string{schema}, r.wanted(requesting())); err != nil {
		return nil, err
	}
	var entries []*entry
	for _, name := range r.wanted(requesting()) {
		e, err := r.entry(ctx, b, clients, designOf(name), schema, 0)
		if err != nil {
			return nil, err
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// recordsMade is the minimum number of records that are made beforehand for designs that read or
// replay.
const recordsMade = 128

// entry makes an entry and the records that it requests.
func (r *run) entry(ctx context.Context, b *Block, clients []*client, d design, schema string, keys int64) (*entry, error) {
	e := &entry{design: d, keys: keys, target: target{path: "/" + schema + "/" + d.name, kind: d.kind}}
	maker := target{path: e.target.path, kind: fresh}
	switch d.kind {
	case read:
		maker.path = "/" + schema + "/" + routeMade
	case replay:
	default:
		return e, nil
	}
	var mu sync.Mutex
	group, ctx := errgroup.WithContext(ctx)
	for _, c := range clients {
		group.Go(func() error {
			for range (recordsMade + len(clients) - 1) / len(clients) {
				made, err := c.make(ctx, &maker)
				if err == nil && d.kind == replay { // after a replay the process surely knows the key
					err = c.post(ctx, maker.path, made.key, made.body)
				}
				if err != nil {
					return err
				}
				mu.Lock()
				e.target.records = append(e.target.records, made)
				b.acknowledged++
				mu.Unlock()
			}
			return nil
		})
	}
	return e, group.Wait()
}

// make sends a new transfer and returns the data for a retry of it.
func (c *client) make(ctx context.Context, t *target) (record, error) {
	if err := c.send(ctx, t); err != nil {
		return record{}, err
	}
	return record{
		key: c.key, body: slices.Clone(c.body),
		id: c.reply.location[strings.LastIndexByte(c.reply.location, '/')+1:],
	}, nil
}
