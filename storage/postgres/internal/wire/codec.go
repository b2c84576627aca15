package wire

import (
	"cmp"
	"encoding/binary"
	"errors"
	"strconv"
	"time"
)

// The encodings of PostgreSQL's binary format that our statements need. Text, bytea and uuid are
// sent as their bytes.

// EncodeInt2 returns v as smallint.
func EncodeInt2(v int16) (encoded [2]byte) {
	binary.BigEndian.PutUint16(encoded[:], uint16(v))
	return encoded
}

// EncodeInt4 returns v as integer.
func EncodeInt4(v int32) (encoded [4]byte) {
	binary.BigEndian.PutUint32(encoded[:], uint32(v))
	return encoded
}

// EncodeInt8 returns v as bigint.
func EncodeInt8(v int64) (encoded [8]byte) {
	binary.BigEndian.PutUint64(encoded[:], uint64(v))
	return encoded
}

// EncodeArray returns an array of elements that are in binary format already. A nil element is
// NULL.
func EncodeArray(elementOID uint32, elements [][]byte) []byte {
	size, nulls := 20, uint32(0)
	for _, e := range elements {
		size += 4 + len(e)
		if e == nil {
			nulls = 1
		}
	}
	out := make([]byte, 0, size)
	for _, v := range []uint32{1, nulls, elementOID, uint32(len(elements)), 1} { // dimensions, ..., length and lower bound of the first
		out = binary.BigEndian.AppendUint32(out, v)
	}
	for _, e := range elements {
		if e == nil {
			out = binary.BigEndian.AppendUint32(out, 1<<32-1)
			continue
		}
		out = append(binary.BigEndian.AppendUint32(out, uint32(len(e))), e...)
	}
	return out
}

// Decoder reads the columns of a row one after another and keeps the first error.
type Decoder struct {
	Values [][]byte
	Err    error
}

func (d *Decoder) Next(bytes int) []byte {
	if d.Err == nil && len(d.Values) == 0 {
		d.Err = errors.New("row is too short")
	}
	if d.Err != nil {
		return make([]byte, max(bytes, 0))
	}
	value := d.Values[0]
	d.Values = d.Values[1:]
	if bytes >= 0 && len(value) != bytes {
		d.Err = errors.New("column has " + strconv.Itoa(len(value)) + " bytes instead of " + strconv.Itoa(bytes))
		return make([]byte, bytes)
	}
	return value
}

func (d *Decoder) Bool() bool { return d.Next(1)[0] != 0 }

func (d *Decoder) Int2() int16 {
	b := d.Next(2)
	return int16(b[0])<<8 | int16(b[1])
}

func (d *Decoder) Int4() int32 { return int32(binary.BigEndian.Uint32(d.Next(4))) }

func (d *Decoder) Int8() int64 { return int64(binary.BigEndian.Uint64(d.Next(8))) }

// Bytes returns a copy: the connection's buffer is used again.
func (d *Decoder) Bytes() []byte { return append([]byte{}, d.Next(-1)...) }

// Position reads the position of the server's log.
func (d *Decoder) Position() (timeline uint32, position uint64) {
	const digits = 24 // in the name of a log file
	name := d.Next(digits)
	position = binary.BigEndian.Uint64(d.Next(8))
	for _, digit := range name[:8] {
		switch {
		case digit >= '0' && digit <= '9':
			timeline = timeline<<4 | uint32(digit-'0')
		case digit >= 'A' && digit <= 'F':
			timeline = timeline<<4 | uint32(digit-'A'+10)
		default:
			d.Err = cmp.Or(d.Err, errors.New("name of a file of the log is not hexadecimal"))
		}
	}
	return timeline, position
}

// Timestamp reads microseconds since the year 2000.
func (d *Decoder) Timestamp() time.Time {
	var us int64
	for _, b := range d.Next(8) {
		us = us<<8 | int64(b)
	}
	return time.UnixMicro(us + 946_684_800_000_000).UTC()
}
