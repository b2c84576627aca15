package fileintent

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"maps"
	"net/http"
	"slices"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
)

// The file is magic and then records: marker, length and CRC-32C of the payload, payload. The checksum covers the length
// too. In a payload every text has its length before it, and every number is big-endian, so that there is one way to write
// an intent.
const (
	magic  = "paidonce intents 1\n"
	marker = "\x1fINT"

	headBytes = len(marker) + 4 + 4

	kindSaved     = 1
	kindForgotten = 2
)

// RecordBytesMax is the most that one intent may take.
const RecordBytesMax = 64 << 20

var (
	errShort   = errors.New("record is cut off")
	errRecord  = errors.New("record is not one of this format")
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
)

// entry is one record: an intent that was saved, or the key of one that was forgotten.
type entry struct {
	key    string
	intent *client.Intent // nil: forgotten
}

// encode returns the record of an entry.
func encode(e entry) []byte {
	record := append(make([]byte, 0, 512), marker...)
	record = append(record, make([]byte, headBytes-len(marker))...)
	if e.intent == nil {
		record = append(record, kindForgotten)
		record = appendText(record, e.key)
		return seal(record)
	}
	i := e.intent
	record = append(record, kindSaved)
	record = appendText(record, i.Key.Value)
	record = binary.BigEndian.AppendUint64(record, uint64(i.SavedAt.UnixNano()))
	record = appendText(record, i.Method)
	record = appendText(record, i.URL)
	record = appendText(record, i.Host)
	record = binary.BigEndian.AppendUint32(record, uint32(len(i.Header)))
	for _, name := range slices.Sorted(maps.Keys(i.Header)) {
		record = appendText(record, name)
		record = binary.BigEndian.AppendUint32(record, uint32(len(i.Header[name])))
		for _, value := range i.Header[name] {
			record = appendText(record, value)
		}
	}
	record = appendText(record, i.Body)
	return seal(record)
}

func appendText[T string | []byte](record []byte, text T) []byte {
	record = binary.BigEndian.AppendUint32(record, uint32(len(text)))
	return append(record, text...)
}

// seal fills in length and checksum.
func seal(record []byte) []byte {
	length := record[len(marker) : len(marker)+4]
	binary.BigEndian.PutUint32(length, uint32(len(record)-headBytes))
	binary.BigEndian.PutUint32(record[len(marker)+4:], checksum(length, record[headBytes:]))
	return record
}

func checksum(length, payload []byte) uint32 {
	return crc32.Update(crc32.Checksum(length, castagnoli), castagnoli, payload)
}

// decode reads the payload of a record whose checksum is right.
func decode(payload []byte) (entry, error) {
	p := parser{rest: payload}
	kind := p.take(1)
	e := entry{key: p.text()}
	switch {
	case p.failed:
	case kind[0] == kindForgotten:
	case kind[0] == kindSaved:
		i := &client.Intent{Key: idempotency.Key{Value: e.key}, Header: http.Header{}}
		if at := p.take(8); at != nil {
			i.SavedAt = time.Unix(0, int64(binary.BigEndian.Uint64(at)))
		}
		i.Method, i.URL, i.Host = p.text(), p.text(), p.text()
		before := ""
		for n := p.count(); n > 0 && !p.failed; n-- {
			name := p.text()
			values := make([]string, 0, 1)
			for m := p.count(); m > 0 && !p.failed; m-- {
				values = append(values, p.text())
			}
			if len(i.Header) > 0 && name <= before {
				p.failed = true
			}
			i.Header[name], before = values, name
		}
		i.Body = []byte(p.text())
		e.intent = i
	default:
		p.failed = true
	}
	if p.failed || len(p.rest) > 0 {
		return entry{}, errRecord
	}
	return e, nil
}

// parser takes a payload apart. Once something is missing it has failed, and gives nothing more.
type parser struct {
	rest   []byte
	failed bool
}

func (p *parser) take(n int) []byte {
	if p.failed || n > len(p.rest) {
		p.failed = true
		return nil
	}
	taken := p.rest[:n]
	p.rest = p.rest[n:]
	return taken
}

func (p *parser) count() int {
	if length := p.take(4); length != nil {
		return int(binary.BigEndian.Uint32(length))
	}
	return 0
}

func (p *parser) text() string { return string(p.take(p.count())) }

// readRecord reads the record that comes next. An error is [errShort] where the file ends in it, io.EOF where it ends before
// it, errRecord where it is none, or that of the reader.
func readRecord(r io.Reader) (payload []byte, err error) {
	var head [headBytes]byte
	switch n, err := io.ReadFull(r, head[:]); {
	case errors.Is(err, io.ErrUnexpectedEOF) && bytes.HasPrefix(append([]byte(marker), head[min(n, len(marker)):n]...), head[:n]):
		return nil, errShort
	case errors.Is(err, io.ErrUnexpectedEOF):
		return nil, errRecord
	case err != nil:
		return nil, err
	}
	length := binary.BigEndian.Uint32(head[len(marker):])
	if string(head[:len(marker)]) != marker || length > RecordBytesMax {
		return nil, errRecord
	}
	var content bytes.Buffer // grows as far as there is something: the length may be garbage
	if n, err := io.CopyN(&content, r, int64(length)); errors.Is(err, io.EOF) && n < int64(length) {
		return nil, errShort
	} else if err != nil {
		return nil, err
	}
	if checksum(head[len(marker):len(marker)+4], content.Bytes()) != binary.BigEndian.Uint32(head[len(marker)+4:]) {
		return nil, errRecord
	}
	return content.Bytes(), nil
}

// scan reads a file of the given size from its start and visits every record. It returns where the last good one ends:
// what is beyond is what a crash left of one that was being written. An error wraps [ErrDamaged] where it is more than that.
func scan(file io.ReaderAt, size int64, visit func(offset, length int64, e entry)) (end int64, err error) {
	r := bufio.NewReaderSize(io.NewSectionReader(file, 0, size), 1<<16)
	head := make([]byte, len(magic))
	switch n, err := io.ReadFull(r, head); {
	case err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF):
		return 0, err
	case string(head[:n]) != magic[:n]:
		return 0, fmt.Errorf("%w: it is no file of intents", ErrDamaged)
	case n < len(magic):
		return 0, nil // it was being made
	}
	end = int64(len(magic))
	for {
		payload, err := readRecord(r)
		switch {
		case errors.Is(err, io.EOF):
			return end, nil
		case errors.Is(err, errShort), errors.Is(err, errRecord):
			return end, torn(file, end, size)
		case err != nil:
			return end, err
		}
		e, err := decode(payload)
		if err != nil { // its checksum is right: somebody else has written it
			return end, fmt.Errorf("%w: a record at byte %d is of a later release, or none", ErrDamaged, end)
		}
		length := int64(headBytes + len(payload))
		visit(end, length, e)
		end += length
	}
}

// torn reports whether what begins at an offset may be what a crash left at the end of the file: nothing follows it that
// is whole.
func torn(file io.ReaderAt, offset, size int64) error {
	rest := make([]byte, size-offset)
	if _, err := file.ReadAt(rest, offset); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	for at := 1; at < len(rest); {
		next := bytes.Index(rest[at:], []byte(marker))
		if next < 0 {
			return nil
		}
		at += next
		if _, err := readRecord(bytes.NewReader(rest[at:])); err == nil {
			return fmt.Errorf("%w: what is at byte %d can't be read, and at byte %d the records go on", ErrDamaged, offset, offset+int64(at))
		}
		at++
	}
	return nil
}
