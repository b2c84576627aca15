package psp

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"
)

const (
	// lineBytesMax limits a line of the file. The longest request fits twice, with every character
	// escaped.
	lineBytesMax = 16 * BodyBytesMax

	// lockTimeout is the time that Open waits for a processor that was just killed.
	lockTimeout = 2 * time.Second

	formatName    = "demo-bank psp"
	formatVersion = 1
)

// Errors of a file.
var (
	ErrFileFormat = errors.New("not a file of demo-bank psp")
	ErrFileInUse  = errors.New("file is held by another processor")
)

// header is the first line of the file. Its fields are in this order: headerStart depends on it.
type header struct {
	Format   string `json:"format"`
	Version  int    `json:"version"`
	Instance string `json:"instance"`
}

const headerStart = `{"format":"` + formatName + `",`

// line is each further line of the file: an entry, or the faults that were set. One of them is nil.
type line struct {
	Entry  *entry  `json:"entry,omitempty"`
	Faults *Faults `json:"faults,omitempty"`
}

// journal is a file of JSON lines that is only appended to. A line is on disk before any answer
// depends on it. It is safe for concurrent use.
type journal struct {
	file   *os.File      // nil for a journal in memory
	failed chan struct{} // closed when a write has failed

	writing sync.Mutex // held by the batch that is being written

	mu      sync.Mutex
	batch   *batch // collects the next lines, or nil
	failure error  // of the first write that failed; nothing is written after it
}

// batch is the lines that one fsync makes durable.
type batch struct {
	lines []byte
	apply []func()
	done  chan struct{}
	err   error // valid after done is closed
}

// openJournal opens or creates the file, locks it, and calls read for each line. It cuts off a torn
// last line: the process that wrote it was killed before it sent an answer. instance is used if the
// file is new; openJournal returns the file's own. If path is empty, the journal is in memory.
func openJournal(path, instance string, read func(line) error) (*journal, string, error) {
	j := &journal{failed: make(chan struct{})}
	if path == "" {
		return j, instance, nil
	}
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, "", err
	}
	j.file = file
	if err := lockFor(file, lockTimeout); err != nil {
		return nil, "", errors.Join(err, file.Close())
	}
	found, end, err := readJournal(file, read)
	if err == nil && found == "" {
		err = j.begin(path, instance)
		found = instance
	} else if err == nil {
		err = j.cut(end)
	}
	if err != nil {
		return nil, "", errors.Join(err, j.close())
	}
	return j, found, nil
}

// lockFor takes the file's lock, and waits for it for a moment: the kernel may still be ending a
// processor that was killed.
func lockFor(file *os.File, timeout time.Duration) error {
	for deadline := time.Now().Add(timeout); ; time.Sleep(20 * time.Millisecond) {
		locked, err := tryLock(file)
		switch {
		case err != nil:
			return fmt.Errorf("lock: %w", err)
		case locked:
			return nil
		case time.Now().After(deadline):
			return ErrFileInUse
		}
	}
}

// begin makes an empty file one of ours.
func (j *journal) begin(path, instance string) error {
	first, err := json.Marshal(header{formatName, formatVersion, instance})
	if err != nil {
		return err
	}
	if err := j.cut(0); err != nil {
		return err
	}
	if err := j.write(append(first, '\n')); err != nil {
		return err
	}
	folder, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	_ = folder.Sync() // best effort: Windows and some file systems can't
	return folder.Close()
}

// cut removes everything after end, and continues there.
func (j *journal) cut(end int64) error {
	if err := j.file.Truncate(end); err != nil {
		return fmt.Errorf("cut off a torn line: %w", err)
	}
	_, err := j.file.Seek(end, io.SeekStart)
	return err
}

// readJournal calls read for each complete line after the header. It returns the instance of the
// header, and the end of the last complete line. The instance is empty if the file is empty, or if
// only the header's beginning was written.
func readJournal(r io.Reader, read func(line) error) (instance string, end int64, err error) {
	reader := bufio.NewReaderSize(r, lineBytesMax)
	for n := 1; ; n++ {
		text, err := reader.ReadSlice('\n')
		switch {
		case errors.Is(err, io.EOF):
			if n == 1 && !bytes.HasPrefix([]byte(headerStart), text[:min(len(text), len(headerStart))]) {
				return "", 0, ErrFileFormat
			}
			return instance, end, nil
		case errors.Is(err, bufio.ErrBufferFull) && n == 1:
			return "", 0, ErrFileFormat
		case errors.Is(err, bufio.ErrBufferFull):
			return "", 0, fmt.Errorf("%w: line %d is over %d bytes", ErrFileFormat, n, lineBytesMax)
		case err != nil:
			return "", 0, fmt.Errorf("read line %d: %w", n, err)
		}
		end += int64(len(text))
		if n == 1 {
			var h header
			switch err := json.Unmarshal(text, &h); {
			case err != nil || h.Format != formatName || h.Instance == "":
				return "", 0, ErrFileFormat
			case h.Version != formatVersion:
				return "", 0, fmt.Errorf("%w: its version is %d, this program's is %d", ErrFileFormat, h.Version, formatVersion)
			}
			instance = h.Instance
			continue
		}
		var l line
		if err := decodeObject(text, &l); err != nil {
			return "", 0, fmt.Errorf("%w: line %d: %w", ErrFileFormat, n, err)
		}
		if err := read(l); err != nil {
			return "", 0, fmt.Errorf("%w: line %d: %w", ErrFileFormat, n, err)
		}
	}
}

// enqueue adds a line to the next batch. The caller must call wait, which blocks until the line is
// on disk and apply was called. Lines are applied in the order of enqueue, which is their order in
// the file. If wait returns an error, apply is not called, and the line may or may not be on disk.
func (j *journal) enqueue(l line, apply func()) (wait func() error) {
	text, err := json.Marshal(l)
	if err != nil { // only our own types are passed
		panic(err)
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	b, leads := j.batch, j.batch == nil
	if leads {
		b = &batch{done: make(chan struct{})}
		j.batch = b
	}
	b.lines = append(append(b.lines, text...), '\n')
	b.apply = append(b.apply, apply)
	return func() error {
		if leads {
			j.commit(b)
		}
		<-b.done
		return b.err
	}
}

// commit writes a batch once the previous one is written.
func (j *journal) commit(b *batch) {
	j.writing.Lock()
	defer j.writing.Unlock()
	j.mu.Lock()
	j.batch = nil // b is complete
	b.err = j.failure
	j.mu.Unlock()
	defer close(b.done)
	if b.err == nil {
		b.err = j.write(b.lines)
	}
	if b.err != nil {
		j.fail(b.err)
		return
	}
	for _, apply := range b.apply {
		apply()
	}
}

// write appends to the file and waits until it is on disk.
func (j *journal) write(text []byte) error {
	if j.file == nil {
		return nil
	}
	if _, err := j.file.Write(text); err != nil {
		return fmt.Errorf("append: %w", err)
	}
	if err := j.file.Sync(); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	return nil
}

// fail refuses all further writes: after a failed write the content of the disk is unknown.
func (j *journal) fail(err error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.failure == nil {
		j.failure = err
		close(j.failed)
	}
}

// errClosed refuses the writes of requests that outlived the shutdown.
var errClosed = errors.New("the processor has stopped")

// close waits for the batch that is being written, and closes the file.
func (j *journal) close() error {
	j.fail(errClosed)
	j.writing.Lock()
	defer j.writing.Unlock()
	if j.file == nil {
		return nil
	}
	return unlock(j.file)
}

// reason returns the error of the first write that failed, or errClosed. It is nil until failed is
// closed.
func (j *journal) reason() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.failure
}
