package boltintent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/paidonce/idempotency/client"
)

// Errors of [Open] and of a [Store].
var (
	ErrLocked   = errors.New("file of intents is held by another")
	ErrDamaged  = errors.New("file of intents is damaged")
	ErrReplaced = fmt.Errorf("%w: the file of intents was replaced or removed while it was open: start again with the one that counts", client.ErrIntentRefused)
	ErrFull     = fmt.Errorf("%w: the file of intents is full (Options.BytesMax)", client.ErrIntentRefused)
	ErrClosed   = fmt.Errorf("%w: the file of intents is closed", client.ErrIntentRefused)
)

// Options tune a [Store]. Nil and the zero value are the defaults. A negative number panics.
type Options struct {
	// BytesMax is the maximum total size of the kept intents. Over it Save returns [ErrFull].
	// Defaults to 256 MiB.
	BytesMax int64

	// LockTimeout is the maximum wait of Open for a process that holds the file, for example one
	// that is just ending. Defaults to 1 second.
	LockTimeout time.Duration
}

func (o *Options) full() Options {
	var full Options
	if o != nil {
		full = *o
	}
	full.BytesMax = cmp.Or(full.BytesMax, 256<<20)
	full.LockTimeout = cmp.Or(full.LockTimeout, time.Second)
	if full.BytesMax < 0 || full.LockTimeout < 0 {
		panic("idempotency/boltintent: Options.BytesMax and LockTimeout must not be negative")
	}
	return full
}

// Store keeps intents in a file. Make it with [Open]. It is safe for concurrent use.
type Store struct {
	path    string
	options Options
	db      *bbolt.DB
	file    *os.File // bbolt's
	info    os.FileInfo

	writing sync.Mutex // held during a commit
	live    int64      // bytes of the kept intents; under writing

	mu      sync.Mutex
	waiting []*change
	failed  error // after it the contents of the file are not known, or it is closed
}

var _ client.IntentStore = (*Store)(nil)

// change is one caller's change to commit.
type change struct {
	apply func(tx *bbolt.Tx) (changed bool, err error) // one that returns an error has changed nothing
	over  bool                                         // under Store.writing, as all of it
	err   error
}

// Open opens the file, or makes it, and locks it. The error wraps [ErrLocked] if another process or
// Store has it, and [ErrDamaged] if the file is damaged or is not a file of intents; then it is
// left as it is. The folder must exist.
func Open(path string, options *Options) (*Store, error) {
	s := &Store{path: path, options: options.full()}
	if err := guard(s.open); err != nil {
		if s.file != nil {
			_ = unlock(s.file) // bbolt may have done so
		}
		return nil, fmt.Errorf("open intents: %w", err)
	}
	return s, nil
}

func (s *Store) open() error {
	var found contents
	openFile := func(name string, flag int, mode os.FileMode) (_ *os.File, err error) {
		if s.file, err = os.OpenFile(name, flag, mode); err != nil {
			return nil, err
		}
		if err := waitForLock(s.file, s.options.LockTimeout); err != nil {
			return nil, err
		}
		if err := s.file.Chmod(0o600); err != nil {
			return nil, err
		}
		// The file is read before bbolt opens it, because bbolt trusts it: it maps the file into
		// memory, and follows each number in it.
		if found, err = read(s.file); err != nil {
			return nil, err
		}
		return s.file, leaveLock(s.file)
	}
	// A commit is durable because NoSync, NoGrowSync and NoFreelistSync are false.
	db, err := bbolt.Open(s.path, 0o600, &bbolt.Options{Timeout: s.options.LockTimeout, OpenFile: openFile})
	if errors.Is(err, bolterrors.ErrTimeout) {
		err = heldBy(s.file)
	}
	if err != nil {
		return err
	}
	s.db, s.live = db, found.bytes
	if s.info, err = s.file.Stat(); err != nil {
		return err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		if tx.Bucket(bucketIntents) != nil {
			return errNothing
		}
		if _, err := tx.CreateBucket(bucketIntents); err != nil {
			return err
		}
		bucket, err := tx.CreateBucket(bucketSum)
		if err != nil {
			return err
		}
		return bucket.Put(keySum, sum{}.encode())
	})
	if err != nil && !errors.Is(err, errNothing) {
		return err
	}
	return syncFolder(filepath.Dir(s.path))
}

var errNothing = errors.New("nothing is to be committed")

// guard runs a function that reads the file through bbolt. If the file is damaged or cut while it
// is open bbolt panics, or its memory faults.
func guard(f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if recover() != nil { // its text may quote the file's contents
			err = fmt.Errorf("%w: it is not what it was when it was opened", ErrDamaged)
		}
	}()
	return f()
}

// Save keeps an intent. It returns when it is on the disk.
func (s *Store) Save(_ context.Context, intent *client.Intent) (before bool, err error) {
	key, now := []byte(intent.Key.Value), time.Now()
	err = s.update(func(tx *bbolt.Tx) (bool, error) {
		intents := tx.Bucket(bucketIntents)
		if kept := intents.Get(key); kept != nil {
			before = true
			other, err := decode(key, kept)
			if err == nil && !sameRequest(other, intent) {
				err = client.ErrIntentDifferent
			}
			return false, err
		}
		sequence, err := intents.NextSequence()
		if err != nil {
			return false, err
		}
		record, err := encode(key, sequence, intent, now)
		if err != nil {
			return false, fmt.Errorf("%w: %w", client.ErrIntentRefused, err)
		}
		if s.live+size(key, record) > s.options.BytesMax {
			return false, fmt.Errorf("%w: the limit is %d bytes", ErrFull, s.options.BytesMax)
		}
		if err := intents.Put(key, record); err != nil {
			return false, fmt.Errorf("%w: %w", client.ErrIntentRefused, err)
		}
		s.live += size(key, record)
		return true, note(tx, record, 1)
	})
	return before, err
}

// Done forgets an intent. It returns when that is on the disk.
func (s *Store) Done(_ context.Context, key string) error {
	_, err := s.forget(key)
	return err
}

// Abandon forgets an intent. It returns when that is on the disk.
func (s *Store) Abandon(_ context.Context, key string) error {
	was, err := s.forget(key)
	if err == nil && !was {
		return client.ErrIntentTaken
	}
	return err
}

func (s *Store) forget(key string) (was bool, err error) {
	name := []byte(key)
	err = s.update(func(tx *bbolt.Tx) (bool, error) {
		intents := tx.Bucket(bucketIntents)
		record := intents.Get(name)
		if was = record != nil; !was {
			return false, nil
		}
		if err := note(tx, record, -1); err != nil {
			return false, err
		}
		s.live -= size(name, record)
		return true, intents.Delete(name)
	})
	return was, err
}

// Pending returns the keys of all intents that are kept, oldest first.
func (s *Store) Pending(context.Context) ([]string, error) {
	type one struct {
		key      string
		sequence uint64
	}
	var all []one
	err := s.view(func(tx *bbolt.Tx) error {
		all = nil
		return tx.Bucket(bucketIntents).ForEach(func(key, record []byte) error {
			sequence, err := sequenceOf(record)
			all = append(all, one{string(key), sequence})
			return err
		})
	})
	slices.SortFunc(all, func(a, b one) int { return cmp.Compare(a.sequence, b.sequence) })
	keys := make([]string, len(all))
	for i := range all {
		keys[i] = all[i].key
	}
	return keys, err
}

// Take returns the intent of a key, nil if it is not kept.
func (s *Store) Take(_ context.Context, key string) (intent *client.Intent, err error) {
	name := []byte(key)
	err = s.view(func(tx *bbolt.Tx) error {
		record := tx.Bucket(bucketIntents).Get(name)
		if record == nil {
			return nil
		}
		intent, err = decode(name, record)
		return err
	})
	return intent, err
}

// Close releases the file. Every later call fails with [ErrClosed].
func (s *Store) Close() error {
	s.writing.Lock()
	defer s.writing.Unlock()
	s.mu.Lock()
	failed := s.failed
	s.failed = ErrClosed
	s.mu.Unlock()
	switch {
	case errors.Is(failed, ErrClosed):
		return nil
	case failed != nil:
		return unlock(s.file) // a call that panicked may hold the locks that bbolt's own Close waits for
	}
	return s.db.Close()
}

// usable returns an error if the file can't be used any more, or another file has taken its name.
func (s *Store) usable() error {
	s.mu.Lock()
	failed := s.failed
	s.mu.Unlock()
	if failed != nil {
		return failed
	}
	info, err := os.Stat(s.path)
	if err == nil && os.SameFile(info, s.info) {
		return nil
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%w: %w", client.ErrIntentRefused, err)
	}
	return ErrReplaced
}

func (s *Store) fail(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.failed == nil {
		s.failed = err
	}
	return s.failed
}

func (s *Store) view(f func(tx *bbolt.Tx) error) error {
	if err := s.usable(); err != nil {
		return err
	}
	err := guard(func() error { return s.db.View(f) })
	switch {
	case errors.Is(err, ErrDamaged):
		return s.fail(err)
	case errors.Is(err, bolterrors.ErrDatabaseNotOpen):
		return ErrClosed
	}
	return err
}

// update commits a change, together with other callers' changes that wait for the disk.
func (s *Store) update(apply func(tx *bbolt.Tx) (changed bool, err error)) error {
	mine := &change{apply: apply}
	s.mu.Lock()
	s.waiting = append(s.waiting, mine)
	s.mu.Unlock()
	s.writing.Lock()
	defer s.writing.Unlock()
	if mine.over { // the previous caller committed it
		return mine.err
	}
	s.mu.Lock()
	batch := s.waiting
	s.waiting = nil
	s.mu.Unlock()
	err := s.commit(batch)
	for _, one := range batch {
		one.over = true
		if err != nil {
			one.err = err
		}
	}
	return mine.err
}

// commit applies changes in one transaction. All get its error.
func (s *Store) commit(batch []*change) error {
	if err := s.usable(); err != nil {
		return err
	}
	live, id := s.live, 0
	err := guard(func() error {
		return s.db.Update(func(tx *bbolt.Tx) error {
			id = tx.ID()
			changed := false
			for _, one := range batch {
				var did bool
				if did, one.err = one.apply(tx); errors.Is(one.err, ErrDamaged) || did && one.err != nil {
					return one.err
				}
				changed = changed || did
			}
			if !changed {
				return errNothing
			}
			return nil
		})
	})
	switch {
	case err == nil:
		if err := s.usable(); err != nil { // it is on the disk, in a file that nobody will look into
			return fmt.Errorf("the file of intents was replaced while it was written: %s", err)
		}
		return nil
	case errors.Is(err, errNothing):
		return nil
	case errors.Is(err, ErrDamaged):
		return s.fail(err)
	}
	s.live = live
	committed := 0
	if viewErr := guard(func() error { return s.db.View(func(tx *bbolt.Tx) error { committed = tx.ID(); return nil }) }); viewErr == nil && committed < id {
		return fmt.Errorf("%w: %w", client.ErrIntentRefused, err) // as on a full disk
	}
	// The commit is in memory, and may or may not have reached the disk: a second fsync would
	// succeed without proving it.
	return s.fail(fmt.Errorf("write intents: %w", err))
}
