package postgres

import (
	"cmp"
	"encoding/binary"
	"errors"
	"strconv"
	"time"
)

// The encodings of PostgreSQL's binary format that our statements need. Text, bytea and uuid are their bytes.

func encodeInt2(v int16) (encoded [2]byte) {
	binary.BigEndian.PutUint16(encoded[:], uint16(v))
	return encoded
}

func encodeInt8(v int64) (encoded [8]byte) {
	binary.BigEndian.PutUint64(encoded[:], uint64(v))
	return encoded
}

// decoder reads the columns of a row one after another and keeps the first error.
type decoder struct {
	values [][]byte
	err    error
}

func (d *decoder) next(bytes int) []byte {
	if d.err == nil && len(d.values) == 0 {
		d.err = errors.New("row is too short")
	}
	if d.err != nil {
		return make([]byte, max(bytes, 0))
	}
	value := d.values[0]
	d.values = d.values[1:]
	if bytes >= 0 && len(value) != bytes {
		d.err = errors.New("column has " + strconv.Itoa(len(value)) + " bytes instead of " + strconv.Itoa(bytes))
		return make([]byte, bytes)
	}
	return value
}

func (d *decoder) bool() bool { return d.next(1)[0] != 0 }

func (d *decoder) int2() int16 {
	b := d.next(2)
	return int16(b[0])<<8 | int16(b[1])
}

// bytes returns a copy: the connection's buffer is used again.
func (d *decoder) bytes() []byte { return append([]byte{}, d.next(-1)...) }

// position reads the position of the server's log.
func (d *decoder) position() (timeline uint32, position uint64) {
	const digits = 24 // in the name of a log file
	name := d.next(digits)
	position = binary.BigEndian.Uint64(d.next(8))
	for _, digit := range name[:8] {
		switch {
		case digit >= '0' && digit <= '9':
			timeline = timeline<<4 | uint32(digit-'0')
		case digit >= 'A' && digit <= 'F':
			timeline = timeline<<4 | uint32(digit-'A'+10)
		default:
			d.err = cmp.Or(d.err, errors.New("name of a file of the log is not hexadecimal"))
		}
	}
	return timeline, position
}

// timestamp reads microseconds since the year 2000.
func (d *decoder) timestamp() time.Time {
	var us int64
	for _, b := range d.next(8) {
		us = us<<8 | int64(b)
	}
	return time.UnixMicro(us + 946_684_800_000_000).UTC()
}
