package fileintent

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/paidonce/idempotency/client"
)

// Defaults of [Options].
const (
	BytesMaxDefault     = 256 << 20
	CompactBytesDefault = 1 << 20
)

// Errors of [Open] and of a [Store].
var (
	ErrLocked  = errors.New("file of intents is held by another process")
	ErrDamaged = errors.New("file of intents is damaged")
	ErrFull    = fmt.Errorf("%w: the file is full", client.ErrIntentRefused) // Options.BytesMax
	ErrClosed  = fmt.Errorf("%w: the file is closed", client.ErrIntentRefused)
)

// Options tune a [Store]. Nil and the zero value are the defaults.
type Options struct {
	// BytesMax bounds what the intents that are kept take together. Over it Save refuses with [ErrFull]. The default is
	// [BytesMaxDefault].
	BytesMax int64

	// CompactBytes is how much of the file may be forgotten intents before it is written anew, without them; it is also let
	// grow to twice of what is kept. The default is [CompactBytesDefault].
	CompactBytes int64

	// DropDamaged opens a file that is damaged in its middle, and loses what can't be read: each may be a request that was
	// never sent, or was and nobody learns what became of it. A copy of the file is left beside it, with .damaged after its name.
	DropDamaged bool
}

// Store keeps intents in a file. Make it with [Open]. It is safe for concurrent use.
type Store struct {
	path    string
	options Options
	lock    *os.File

	// syncing is taken before mu by whoever makes the file durable or replaces it.
	syncing sync.Mutex
	synced  int64 // bytes of the file that are durable

	mu      sync.Mutex
	file    *os.File // nil: closed
	size    int64
	live    int64 // bytes of what is kept
	index   map[string]place
	later   int64 // no attempt to replace the file before it has grown to this
	replace int   // how often the file was replaced: what was written before is durable
	broken  error // after this nothing is known of what the disk holds
}

var _ client.IntentStore = (*Store)(nil)

// place is where the record of an intent is.
type place struct{ offset, length int64 }

// Open opens the file, or makes it, and locks it. The error wraps [ErrLocked] where another process has it, and
// [ErrDamaged] where something is wrong with it that no crash explains. The folder must be there.
func Open(path string, options *Options) (*Store, error) {
	s := &Store{path: path, index: make(map[string]place)}
	if options != nil {
		s.options = *options
	}
	s.options.BytesMax = cmp.Or(s.options.BytesMax, BytesMaxDefault)
	s.options.CompactBytes = cmp.Or(s.options.CompactBytes, CompactBytesDefault)
	if s.options.BytesMax < 0 || s.options.CompactBytes < 0 {
		panic("idempotency/client/fileintent: Options.BytesMax and CompactBytes must not be negative")
	}
	lock, err := os.OpenFile(path+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open intents: %w", err)
	}
	locked, err := tryLock(lock)
	if err == nil && !locked {
		err = ErrLocked
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock intents: %w", err), lock.Close())
	}
	s.lock = lock
	if err := s.load(); err != nil {
		return nil, errors.Join(fmt.Errorf("open intents: %w", err), s.Close())
	}
	return s, nil
}

// load reads what the file holds, and writes it anew where there is something in it that need not be.
func (s *Store) load() error {
	if err := os.Remove(s.path + ".new"); err != nil && !errors.Is(err, os.ErrNotExist) { // of a process that died
		return err
	}
	file, err := os.OpenFile(s.path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	s.file = file
	if err := file.Chmod(0o600); err != nil {
		return err
	}
	info, err := file.Stat()
	if err != nil {
		return err
	}
	dead, err := s.read(info.Size())
	if errors.Is(err, ErrDamaged) && s.options.DropDamaged {
		dead, err = true, s.salvage(info.Size())
	}
	if err != nil {
		return err
	}
	if dead || info.Size() > s.size {
		return s.rewrite()
	}
	s.synced = s.size
	return nil
}

// read fills the index.
func (s *Store) read(size int64) (dead bool, err error) {
	s.size, err = scan(s.file, size, func(offset, length int64, e entry) { dead = s.note(offset, length, e) || dead })
	return dead || s.size == 0, err
}

func (s *Store) note(offset, length int64, e entry) (dead bool) {
	before, was := s.index[e.key]
	if was {
		s.live -= before.length
		delete(s.index, e.key)
	}
	if e.intent == nil {
		return true
	}
	s.index[e.key] = place{offset, length}
	s.live += length
	return was
}

// salvage keeps a copy of a damaged file, and fills the index with all that can be read.
func (s *Store) salvage(size int64) error {
	content := make([]byte, size)
	if _, err := s.file.ReadAt(content, 0); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if err := os.WriteFile(s.path+".damaged", content, 0o600); err != nil {
		return err
	}
	clear(s.index)
	s.live = 0
	for at := 0; at < len(content); {
		next := bytes.Index(content[at:], []byte(marker))
		if next < 0 {
			break
		}
		at += next
		payload, err := readRecord(bytes.NewReader(content[at:]))
		if err != nil {
			at++
			continue
		}
		length := headBytes + len(payload)
		if e, err := decode(payload); err == nil {
			s.note(int64(at), int64(length), e)
		}
		at += length
	}
	return nil
}

// Save keeps an intent. It returns when it is on the disk.
func (s *Store) Save(_ context.Context, intent *client.Intent) (before bool, err error) {
	kept := *intent
	kept.SavedAt = time.Now()
	record := encode(entry{key: kept.Key.Value, intent: &kept})
	if len(record)-headBytes > RecordBytesMax {
		return false, fmt.Errorf("%w: it takes %d bytes, over the limit of %d", client.ErrIntentRefused, len(record), RecordBytesMax)
	}
	s.mu.Lock()
	at, was := s.index[kept.Key.Value]
	if was {
		one, err := s.intentAt(at)
		s.mu.Unlock()
		switch {
		case err != nil:
			return true, err
		case !sameRequest(one, &kept):
			return true, client.ErrIntentOther
		}
		return true, s.flush(at.offset+at.length, -1) // whoever saved it may still be at it
	}
	if s.file != nil && s.live+int64(len(record)) > s.options.BytesMax {
		s.mu.Unlock()
		return false, fmt.Errorf("%w: its limit is %d bytes", ErrFull, s.options.BytesMax)
	}
	offset := s.size
	err = s.append(record)
	if err == nil {
		s.index[kept.Key.Value] = place{offset, int64(len(record))}
		s.live += int64(len(record))
	}
	end, replaced := s.size, s.replace
	s.mu.Unlock()
	if err != nil {
		return false, err
	}
	return false, s.flush(end, replaced)
}

// sameRequest compares all but the time.
func sameRequest(a, b *client.Intent) bool {
	return a.Key == b.Key && a.Method == b.Method && a.URL == b.URL && a.Host == b.Host && bytes.Equal(a.Body, b.Body) &&
		maps.EqualFunc(a.Header, b.Header, slices.Equal[[]string])
}

// Done forgets an intent. It does not wait for the disk: where a crash of the machine undoes it, the request is replayed.
func (s *Store) Done(_ context.Context, key string) error {
	if _, _, err := s.forget(key); err != nil {
		return err
	}
	return s.compact()
}

// Abandon forgets an intent. It returns when that is on the disk.
func (s *Store) Abandon(_ context.Context, key string) error {
	end, replaced, err := s.forget(key)
	switch {
	case err != nil:
		return err
	case end == 0:
		return client.ErrIntentTaken
	}
	return s.flush(end, replaced)
}

// forget returns where its record ends, for flush, and 0 where the key is not kept.
func (s *Store) forget(key string) (end int64, replaced int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at, was := s.index[key]
	if !was {
		return 0, 0, s.usable()
	}
	if err := s.append(encode(entry{key: key})); err != nil {
		return 0, 0, err
	}
	delete(s.index, key)
	s.live -= at.length
	return s.size, s.replace, nil
}

// Pending returns the keys of all intents that are kept, oldest first.
func (s *Store) Pending(context.Context) ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.inOrder(), s.usable()
}

func (s *Store) inOrder() []string {
	return slices.SortedFunc(maps.Keys(s.index), func(a, b string) int { return cmp.Compare(s.index[a].offset, s.index[b].offset) })
}

// Take returns the intent of a key, nil where it is not kept.
func (s *Store) Take(_ context.Context, key string) (*client.Intent, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at, was := s.index[key]
	if !was {
		return nil, s.usable()
	}
	return s.intentAt(at)
}

// Close lets another process have the file. Every call after it fails.
func (s *Store) Close() error {
	s.syncing.Lock()
	defer s.syncing.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	var failed []error
	if s.file != nil {
		failed = append(failed, s.file.Close())
		s.file = nil
	}
	if s.lock != nil {
		failed = append(failed, unlock(s.lock))
		s.lock = nil
	}
	return errors.Join(failed...)
}

func (s *Store) usable() error {
	if s.broken == nil && s.file == nil {
		return ErrClosed
	}
	return s.broken
}

// append writes a record at the end. Where it can't be written whole it is taken away again.
func (s *Store) append(record []byte) error {
	if err := s.usable(); err != nil {
		return err
	}
	if _, err := s.file.WriteAt(record, s.size); err != nil {
		if undoErr := s.file.Truncate(s.size); undoErr != nil {
			s.broken = fmt.Errorf("write an intent: %w", errors.Join(err, undoErr))
			return s.broken
		}
		return fmt.Errorf("%w: %w", client.ErrIntentRefused, err)
	}
	s.size += int64(len(record))
	return nil
}

// flush returns when the file is durable up to an offset. It was written when the file had been replaced so many times;
// -1 asks for all of the file as it is. Whoever comes while another is at it shares the next fsync.
func (s *Store) flush(end int64, replaced int) error {
	s.syncing.Lock()
	defer s.syncing.Unlock()
	s.mu.Lock()
	file, size, now, err := s.file, s.size, s.replace, s.usable()
	s.mu.Unlock()
	if err != nil {
		return err
	}
	if replaced >= 0 && now != replaced || replaced >= 0 && s.synced >= end {
		return nil
	}
	if err := file.Sync(); err != nil {
		// What was not written may be gone from memory too: a second fsync would say that all is well.
		s.mu.Lock()
		defer s.mu.Unlock()
		s.broken = fmt.Errorf("make intents durable: %w", err)
		return s.broken
	}
	s.synced = size
	return nil
}

// compact writes the file anew where too much of it is forgotten.
func (s *Store) compact() error {
	s.mu.Lock()
	due := s.due()
	s.mu.Unlock()
	if !due {
		return nil
	}
	s.syncing.Lock()
	defer s.syncing.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.due() {
		return nil
	}
	return s.rewrite()
}

func (s *Store) due() bool {
	return s.usable() == nil && s.size-s.live > max(s.options.CompactBytes, s.live) && s.size >= s.later
}

// rewrite replaces the file by one with what is kept and nothing else. Until the rename the old one counts.
func (s *Store) rewrite() error {
	next, index, err := s.copyLive()
	if err != nil {
		s.later = 2 * s.size
		return errors.Join(fmt.Errorf("write intents anew: %w", err), os.Remove(s.path+".new"))
	}
	// Closed first: Windows renames no open file, and onto none.
	err = errors.Join(next.Close(), s.file.Close(), os.Rename(s.path+".new", s.path), syncDir(filepath.Dir(s.path)))
	if err == nil {
		s.file, err = os.OpenFile(s.path, os.O_RDWR, 0o600)
	}
	if err != nil {
		s.broken = fmt.Errorf("replace the file of intents: %w", err)
		return s.broken
	}
	s.index, s.size = index, int64(len(magic))+s.live
	s.synced = s.size
	s.replace++
	return nil
}

func (s *Store) copyLive() (_ *os.File, index map[string]place, err error) {
	next, err := os.OpenFile(s.path+".new", os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, nil, err
	}
	defer func() {
		if err != nil {
			_ = next.Close() // it is removed
		}
	}()
	if _, err := next.WriteString(magic); err != nil {
		return nil, nil, err
	}
	index = make(map[string]place, len(s.index))
	end := int64(len(magic))
	for _, key := range s.inOrder() {
		at := s.index[key]
		if _, err := io.Copy(next, io.NewSectionReader(s.file, at.offset, at.length)); err != nil {
			return nil, nil, err
		}
		index[key] = place{end, at.length}
		end += at.length
	}
	return next, index, next.Sync()
}

// intentAt reads the intent of a record.
func (s *Store) intentAt(at place) (*client.Intent, error) {
	if err := s.usable(); err != nil {
		return nil, err
	}
	payload, err := readRecord(io.NewSectionReader(s.file, at.offset, at.length))
	if err == nil {
		var e entry
		if e, err = decode(payload); err == nil && e.intent != nil {
			return e.intent, nil
		}
	}
	return nil, fmt.Errorf("%w: the record at byte %d can't be read any more", ErrDamaged, at.offset)
}
