package effect

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"strings"
	"time"

	"github.com/paidonce/idempotency"
)

// ReconcileBatch is the number of items that [Declared.Reconcile] compares with one query.
const ReconcileBatch = 500

// Item is one entry of the other service's list.
type Item[Out any] struct {
	Key string // the key that it was sent with
	Out Out
}

// FindingKind is a kind of [Finding].
type FindingKind string

// The kinds of findings.
const (
	FindingUnknown  FindingKind = "unknown"  // they have it, and no effect of ours is recorded
	FindingMissing  FindingKind = "missing"  // ours is done, and they don't have it
	FindingDeclined FindingKind = "declined" // they have it, and ours is declined or may have been made
	FindingDiffers  FindingKind = "differs"  // ours is done, and Same reports that they differ
	FindingTwice    FindingKind = "twice"    // they have had an item with this key before in the list
)

// Finding is a difference between the other service's list and the recorded effects.
type Finding[Out any] struct {
	Kind   FindingKind
	Theirs *Item[Out]                // nil if they don't have it
	Ours   *idempotency.EffectRecord // nil if nothing is recorded
}

// ReconcileOptions has the window of [Declared.Reconcile], and the way to compare.
type ReconcileOptions[Out any] struct {
	// From and To bound our effects that must be in the list: those first sent at From or later, and
	// before To, by the store's clock. From must not lie further back than the TTL of the records,
	// because an effect is deleted with its record. Both are required.
	From, To time.Time

	// Names are the names of our effects that the list has. Defaults to the name of the effect. For a
	// list of refunds they are names of undos: see [idempotency.UndoName].
	Names []string

	// Same reports whether our output and theirs agree: in their amounts, for example. Nil compares
	// keys only.
	Same func(ours, theirs Out) bool

	// Progress is called after each batch. Nil for none.
	Progress func(Report)
}

// Report has the numbers of a [Declared.Reconcile].
type Report struct {
	Listed   int // items of the list
	Foreign  int // of these, those with a key that can't be ours
	Matched  int // of these, those of an effect that is done, without a difference
	Open     int // of these, those of an effect that is not settled: its request is open, and will get the result
	Findings int
}

// Reconcile compares the other service's list with the recorded effects, both ways, and calls found
// for each difference. It finds charges whose intent the database has lost, because it was restored
// to an earlier time, or was promoted from a standby that lacked the last commits.
//
// The list must have everything that was done in the window, each item once, and may have more. If
// two items have the same key, the other service did the call twice. Reconcile changes nothing,
// holds no transaction, and keeps the keys of the list in memory, about 50 bytes for each. The error
// is that of the list, of found or of the store.
func (d *Declared[In, Out]) Reconcile(ctx context.Context, store idempotency.EffectReader, list iter.Seq2[Item[Out], error], o ReconcileOptions[Out], found func(Finding[Out]) error) (Report, error) {
	if o.From.IsZero() || !o.From.Before(o.To) {
		return Report{}, errors.New("reconcile: From and To are required, and From comes first")
	}
	if o.Names == nil {
		o.Names = []string{d.name}
	}
	r := reconciliation[Out]{ctx: ctx, store: store, options: o, found: found, listed: map[[16]byte]struct{}{}}
	err := r.theirs(list)
	if err == nil {
		err = r.ours()
	}
	if err != nil {
		return r.report, fmt.Errorf("reconcile %s: %w", d.name, err)
	}
	return r.report, nil
}

type reconciliation[Out any] struct {
	ctx     context.Context
	store   idempotency.EffectReader
	options ReconcileOptions[Out]
	found   func(Finding[Out]) error
	report  Report
	listed  map[[16]byte]struct{}
}

// theirs looks for our effect of each item.
func (r *reconciliation[Out]) theirs(list iter.Seq2[Item[Out], error]) error {
	var batch []listedItem[Out]
	for item, err := range list {
		if err != nil {
			return fmt.Errorf("list: %w", err)
		}
		r.report.Listed++
		id, ok := keyBytes(item.Key)
		if !ok {
			r.report.Foreign++
			continue
		}
		_, again := r.listed[id]
		r.listed[id] = struct{}{}
		if batch = append(batch, listedItem[Out]{item, id, again}); len(batch) == ReconcileBatch {
			if err := r.compare(batch); err != nil {
				return err
			}
			batch = batch[:0]
		}
	}
	return r.compare(batch)
}

// listedItem is an item of the list, with the bytes of its key.
type listedItem[Out any] struct {
	Item[Out]
	id    [16]byte
	again bool // an earlier item has the same key
}

func (r *reconciliation[Out]) compare(batch []listedItem[Out]) error {
	keys := make([]string, len(batch))
	for i, item := range batch {
		keys[i] = item.Key
	}
	records, err := r.store.EffectsByKey(r.ctx, keys)
	if err != nil {
		return err
	}
	ours := map[[16]byte]*idempotency.EffectRecord{}
	for i := range records {
		id, _ := keyBytes(records[i].DerivedKey)
		ours[id] = &records[i]
	}
	for i := range batch {
		item := batch[i]
		finding := Finding[Out]{Theirs: &item.Item, Ours: ours[item.id]}
		switch {
		case item.again:
			finding.Kind = FindingTwice
		case finding.Ours == nil:
			finding.Kind = FindingUnknown
		case finding.Ours.State == idempotency.EffectIntended:
			r.report.Open++
		case finding.Ours.State != idempotency.EffectDone:
			finding.Kind = FindingDeclined
		case r.differs(finding.Ours, item.Out):
			finding.Kind = FindingDiffers
		default:
			r.report.Matched++
		}
		if err := r.tell(finding); err != nil {
			return err
		}
	}
	r.progress()
	return nil
}

func (r *reconciliation[Out]) differs(ours *idempotency.EffectRecord, theirs Out) bool {
	if r.options.Same == nil {
		return false
	}
	var out Out
	return json.Unmarshal(ours.Output, &out) != nil || !r.options.Same(out, theirs)
}

// ours looks for our effects that are not in the list.
func (r *reconciliation[Out]) ours() error {
	after := ""
	for {
		records, err := r.store.EffectsBetween(r.ctx, r.options.Names, r.options.From, r.options.To, after, ReconcileBatch)
		if err != nil {
			return err
		}
		for i := range records {
			id, _ := keyBytes(records[i].DerivedKey)
			if _, listed := r.listed[id]; !listed && records[i].State == idempotency.EffectDone {
				if err := r.tell(Finding[Out]{Kind: FindingMissing, Ours: &records[i]}); err != nil {
					return err
				}
			}
		}
		r.progress()
		if len(records) < ReconcileBatch {
			return nil
		}
		after = records[len(records)-1].DerivedKey
	}
}

func (r *reconciliation[Out]) tell(finding Finding[Out]) error {
	if finding.Kind == "" {
		return nil
	}
	r.report.Findings++
	return r.found(finding)
}

func (r *reconciliation[Out]) progress() {
	if r.options.Progress != nil {
		r.options.Progress(r.report)
	}
}

// keyBytes returns the bytes of a derived key, which is a UUID, however it is spelt.
func keyBytes(key string) (id [16]byte, ok bool) {
	digits := strings.ReplaceAll(key, "-", "")
	if len(digits) != 2*len(id) {
		return id, false
	}
	_, err := hex.Decode(id[:], []byte(digits))
	return id, err == nil
}
