package boltintent

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
	"slices"
)

// bbolt's own Tx.Check can't be used on a file that may be damaged: it runs in a goroutine of its
// own, reads past the end of the file and follows cycles, and each of the three can end the
// process. So the file is read here, with bounds.

// The layout of bbolt's file, version 2. Numbers are in the machine's own order.
const (
	boltMagic, boltVersion = 0xED0CDAED, 2

	headBytes    = 16 // of a page: number, kind, how many elements, how many pages follow it
	metaBytes    = 64 // after its head
	elementBytes = 16
	bucketBytes  = 16 // root page, sequence

	pageBranch, pageLeaf, pageMeta, pageFree = 0x01, 0x02, 0x04, 0x10

	elementIsBucket = 1
	countIsFirst    = 0xFFFF // a free list's number of elements is its first

	pageSizeMin, pageSizeMax = 1 << 10, 1 << 24
)

var order = binary.NativeEndian

// contents are the contents of a file.
type contents struct {
	bytes int64
	sum   sum
}

// reader reads one file.
type reader struct {
	file     io.ReaderAt
	pageSize uint64
	pages    uint64 // the number of pages by the file's head
	seen     map[uint64]bool
	buckets  map[string]bool
	found    contents
	want     []byte // the sum that is stored in the file
}

func damaged(format string, values ...any) error {
	return fmt.Errorf("%w: "+format+"; it is left as it is: move it away, look its requests up at the server, and start with a new one",
		append([]any{ErrDamaged}, values...)...)
}

// read returns the contents of a file, which must not change meanwhile. An empty file is a new one.
func read(file *os.File) (contents, error) {
	info, err := file.Stat()
	if err != nil || info.Size() == 0 {
		return contents{}, err
	}
	return readFrom(file, uint64(info.Size()))
}

func readFrom(file io.ReaderAt, size uint64) (contents, error) {
	r := &reader{file: file, seen: map[uint64]bool{0: true, 1: true}, buckets: map[string]bool{}}
	root, free, commits, err := r.readMeta(size)
	if err != nil {
		return contents{}, err
	}
	if err := r.readPage(root, nil, nil, nil); err != nil {
		return contents{}, err
	}
	if err := r.readFree(free); err != nil {
		return contents{}, err
	}
	if len(r.buckets) == 0 && commits < 2 { // its creator died before the first commit
		return contents{}, nil
	}
	want, err := decodeSum(r.want)
	if err != nil || !r.buckets[string(bucketIntents)] || want != r.found.sum {
		return contents{}, damaged("there are %d intents in it that can be read, which are not those that it should have", r.found.sum.records)
	}
	return r.found, nil
}

// readMeta reads the two heads. bbolt itself accepts a file with only one valid head, even the one
// from before the last commit.
func (r *reader) readMeta(size uint64) (root, free, last uint64, err error) {
	r.pageSize = pageSizeMin
	for number := range uint64(2) {
		page := make([]byte, headBytes+metaBytes)
		if _, err := r.file.ReadAt(page, int64(number*r.pageSize)); err != nil {
			return 0, 0, 0, unread(err)
		}
		m := page[headBytes:]
		h := fnv.New64a()
		_, _ = h.Write(m[:metaBytes-8]) // a hash returns no error
		pageSize, pages, transaction := uint64(order.Uint32(m[8:])), order.Uint64(m[40:]), order.Uint64(m[48:])
		switch {
		case order.Uint32(m) != boltMagic || order.Uint32(m[4:]) != boltVersion || order.Uint64(m[56:]) != h.Sum64() ||
			order.Uint64(page) != number || order.Uint16(page[8:]) != pageMeta || transaction%2 != number:
			return 0, 0, 0, damaged("head %d is not one of a file of intents", number)
		case pageSize < pageSizeMin || pageSize > pageSizeMax || pageSize&(pageSize-1) != 0 || number == 1 && pageSize != r.pageSize:
			return 0, 0, 0, damaged("head %d has pages of %d bytes", number, pageSize)
		case pages < 2 || pages > size/pageSize:
			return 0, 0, 0, damaged("it was cut: it has %d bytes of %d pages of %d", size, pages, pageSize)
		case number == 1 && last != transaction+1 && last+1 != transaction:
			return 0, 0, 0, damaged("its heads are of the commits %d and %d", last, transaction)
		}
		r.pageSize = pageSize
		if number == 0 || transaction > last {
			root, free, r.pages, last = order.Uint64(m[16:]), order.Uint64(m[32:]), pages, transaction
		}
	}
	return root, free, last, nil
}

func unread(err error) error {
	if errors.Is(err, io.EOF) {
		return damaged("it was cut")
	}
	return err
}

// page returns a page with its overflow pages. Each is read once.
func (r *reader) page(number uint64) ([]byte, error) {
	head := make([]byte, headBytes)
	if number < 2 || number >= r.pages {
		return nil, damaged("page %d is not in it", number)
	}
	if _, err := r.file.ReadAt(head, int64(number*r.pageSize)); err != nil {
		return nil, unread(err)
	}
	more := uint64(order.Uint32(head[12:]))
	if order.Uint64(head) != number || more >= r.pages-number {
		return nil, damaged("page %d is not one", number)
	}
	for n := number; n <= number+more; n++ {
		if r.seen[n] {
			return nil, damaged("page %d has two places in it", n)
		}
		r.seen[n] = true
	}
	page := make([]byte, (more+1)*r.pageSize)
	if _, err := r.file.ReadAt(page, int64(number*r.pageSize)); err != nil {
		return nil, unread(err)
	}
	return page, nil
}

// readPage reads a page of a bucket, and the pages below it. bucket is nil for the bucket of
// buckets. The page's keys are from first up to last.
func (r *reader) readPage(number uint64, bucket, first, last []byte) error {
	page, err := r.page(number)
	if err != nil {
		return err
	}
	return r.readElements(page, number, bucket, first, last)
}

func (r *reader) readElements(page []byte, number uint64, bucket, first, last []byte) error {
	kind, count := order.Uint16(page[8:]), int(order.Uint16(page[10:]))
	if kind != pageBranch && kind != pageLeaf || headBytes+count*elementBytes > len(page) || kind == pageBranch && count == 0 {
		return damaged("page %d is not one of a bucket", number)
	}
	// part returns bytes at an offset from an element's beginning.
	part := func(element int, behind, length uint64) ([]byte, error) {
		from := uint64(headBytes+element*elementBytes) + behind
		if behind > uint64(len(page)) || length > uint64(len(page)) || from+length > uint64(len(page)) {
			return nil, damaged("page %d ends within an element", number)
		}
		return page[from : from+length], nil
	}
	keys := make([][]byte, count)
	for i := range keys {
		e := page[headBytes+i*elementBytes:]
		behind, length := uint64(order.Uint32(e)), uint64(order.Uint32(e[4:]))
		if kind == pageLeaf {
			behind, length = uint64(order.Uint32(e[4:])), uint64(order.Uint32(e[8:]))
		}
		var err error
		if keys[i], err = part(i, behind, length); err != nil {
			return err
		}
		if i == 0 && bytes.Compare(keys[i], first) < 0 || i > 0 && bytes.Compare(keys[i], keys[i-1]) <= 0 || last != nil && bytes.Compare(keys[i], last) >= 0 {
			return damaged("keys of page %d are not in order", number)
		}
	}
	for i, key := range keys {
		e := page[headBytes+i*elementBytes:]
		if kind == pageBranch {
			end := last
			if i+1 < count {
				end = keys[i+1]
			}
			if err := r.readPage(order.Uint64(e[8:]), bucket, key, end); err != nil {
				return err
			}
			continue
		}
		value, err := part(i, uint64(order.Uint32(e[4:]))+uint64(len(key)), uint64(order.Uint32(e[12:])))
		if err != nil {
			return err
		}
		if err := r.readValue(bucket, order.Uint32(e), key, value); err != nil {
			return err
		}
	}
	return nil
}

func (r *reader) readValue(bucket []byte, flags uint32, key, value []byte) error {
	switch {
	case bucket == nil && flags == elementIsBucket && len(value) >= bucketBytes && (bytes.Equal(key, bucketIntents) || bytes.Equal(key, bucketSum)):
		r.buckets[string(key)] = true
		if root := order.Uint64(value); root != 0 {
			return r.readPage(root, key, nil, nil)
		}
		page := value[bucketBytes:] // a small bucket lies within the page
		if len(page) < headBytes || order.Uint16(page[8:]) != pageLeaf {
			return damaged("a bucket is not one")
		}
		return r.readElements(page, 0, key, nil, nil)
	case bytes.Equal(bucket, bucketIntents) && flags == 0:
		if _, err := check(key, value); err != nil {
			return damaged("an intent is not what was written")
		}
		r.found.sum.add(value, 1)
		r.found.bytes += size(key, value)
		return nil
	case bytes.Equal(bucket, bucketSum) && flags == 0 && bytes.Equal(key, keySum):
		r.want = value
		return nil
	}
	return damaged("there is something in it that no intent is")
}

// readFree reads the list of free pages. None of them may be in use: the next commit overwrites
// them.
func (r *reader) readFree(number uint64) error {
	page, err := r.page(number)
	if err != nil {
		return err
	}
	list := page[headBytes:]
	count := uint64(order.Uint16(page[10:]))
	if count == countIsFirst {
		count, list = order.Uint64(list), list[8:]
	}
	if order.Uint16(page[8:]) != pageFree || count > uint64(len(list))/8 {
		return damaged("its list of free pages is not one")
	}
	free := make([]uint64, count)
	for i := range free {
		free[i] = order.Uint64(list[8*i:])
		if free[i] < 2 || free[i] >= r.pages || r.seen[free[i]] {
			return damaged("page %d is in use and free", free[i])
		}
	}
	if slices.Sort(free); len(slices.Compact(free)) != len(free) {
		return damaged("a page is free twice")
	}
	return nil
}
