package sqldb

import (
	"database/sql/driver"
	"fmt"
	"io"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgtype"

	"github.com/paidonce/idempotency/storage/postgres/internal/sealed"
)

// formats requests the binary format for the types that decode to something other than text. The
// others come as text, as with pgx's own driver for database/sql.
var formats = pgx.QueryResultFormatsByOID{
	pgtype.BoolOID: pgtype.BinaryFormatCode, pgtype.ByteaOID: pgtype.BinaryFormatCode,
	pgtype.Int2OID: pgtype.BinaryFormatCode, pgtype.Int4OID: pgtype.BinaryFormatCode, pgtype.Int8OID: pgtype.BinaryFormatCode,
	pgtype.OIDOID: pgtype.BinaryFormatCode, pgtype.XIDOID: pgtype.BinaryFormatCode, pgtype.CIDOID: pgtype.BinaryFormatCode,
	pgtype.Float4OID: pgtype.BinaryFormatCode, pgtype.Float8OID: pgtype.BinaryFormatCode,
	pgtype.DateOID: pgtype.BinaryFormatCode, pgtype.TimestampOID: pgtype.BinaryFormatCode, pgtype.TimestamptzOID: pgtype.BinaryFormatCode,
}

// rows are the rows of a query in a handler's transaction.
type rows struct {
	rows   *sealed.Rows
	read   bool // the first row was read ahead, and Next has not returned it yet
	ahead  bool // there is a first row, in values
	values []driver.Value
	fields []pgconn.FieldDescription // set if there are no rows
}

var (
	_ driver.RowsColumnTypeDatabaseTypeName = (*rows)(nil)
	_ driver.RowsColumnTypeLength           = (*rows)(nil)
	_ driver.RowsColumnTypePrecisionScale   = (*rows)(nil)
	_ driver.RowsColumnTypeScanType         = (*rows)(nil)
)

func (r *rows) descriptions() []pgconn.FieldDescription {
	if r.fields != nil {
		return r.fields
	}
	return r.rows.FieldDescriptions()
}

func (r *rows) field(i int) *pgconn.FieldDescription { return &r.descriptions()[i] }

func (r *rows) Columns() []string {
	fields := r.descriptions()
	names := make([]string, len(fields))
	for i := range fields {
		names[i] = fields[i].Name
	}
	return names
}

func (r *rows) Close() error {
	r.rows.Close()
	return r.rows.Err()
}

func (r *rows) Next(dest []driver.Value) error {
	more := r.ahead
	if r.read {
		r.read = false
	} else {
		var err error
		if more, err = r.rows.Read(r.decode); err != nil {
			return err
		}
	}
	if !more {
		return io.EOF
	}
	copy(dest, r.values)
	return nil
}

// decode turns a row into values.
func (r *rows) decode(raw [][]byte) error {
	types := r.rows.TypeMap()
	r.values = r.values[:0]
	for i := range raw {
		value, err := decode(types, r.field(i), raw[i])
		if err != nil {
			return err
		}
		r.values = append(r.values, value)
	}
	return nil
}

func decode(types *pgtype.Map, field *pgconn.FieldDescription, raw []byte) (driver.Value, error) {
	if raw == nil {
		return nil, nil
	}
	oid := field.DataTypeOID
	_, decoded := formats[oid]
	switch {
	case decoded, oid == pgtype.UUIDOID && field.Format == pgtype.BinaryFormatCode:
		if t, ok := types.TypeForOID(oid); ok {
			return t.Codec.DecodeDatabaseSQLValue(types, oid, field.Format, raw)
		}
	case oid == pgtype.JSONOID, oid == pgtype.JSONBOID, oid == pgtype.XMLOID:
		if oid == pgtype.JSONBOID && field.Format == pgtype.BinaryFormatCode {
			raw = raw[1:] // the version
		}
		return slices.Clone(raw), nil
	case field.Format != pgtype.TextFormatCode: // the column got another type since the text ran first
		return nil, fmt.Errorf("idempotency/sqldb: column %s has a type that is not expected in binary format: run the handler again", field.Name)
	}
	return string(raw), nil
}

// anyFormat reports whether decode returns the same values if pgx chooses the formats.
func (r *rows) anyFormat() bool {
	types := r.rows.TypeMap()
	for _, field := range r.descriptions() {
		oid := field.DataTypeOID
		if _, decoded := formats[oid]; !decoded && oid != pgtype.UUIDOID && types.FormatCodeForOID(oid) != pgtype.TextFormatCode {
			return false
		}
	}
	return true
}

// ColumnTypeDatabaseTypeName returns the name of the type, or its OID if pgx does not know it.
func (r *rows) ColumnTypeDatabaseTypeName(i int) string {
	if t, ok := r.rows.TypeMap().TypeForOID(r.field(i).DataTypeOID); ok {
		return strings.ToUpper(t.Name)
	}
	return strconv.FormatUint(uint64(r.field(i).DataTypeOID), 10)
}

// modifierOffset is the number that PostgreSQL adds to the modifier of a type.
const modifierOffset = 4

func (r *rows) ColumnTypeLength(i int) (int64, bool) {
	switch field := r.field(i); {
	case field.DataTypeOID == pgtype.TextOID, field.DataTypeOID == pgtype.ByteaOID:
		return math.MaxInt64, true
	case field.DataTypeOID != pgtype.VarcharOID && field.DataTypeOID != pgtype.BPCharOID:
		return 0, false
	case field.TypeModifier < modifierOffset:
		return math.MaxInt64, true
	default:
		return int64(field.TypeModifier - modifierOffset), true
	}
}

// ColumnTypePrecisionScale returns the fractional digits of a time as its scale, as pgx's driver does
// from 5.13 on.
func (r *rows) ColumnTypePrecisionScale(i int) (precision, scale int64, ok bool) {
	const (
		microseconds = 6      // if the type has no modifier
		digits       = 0xffff // of an interval's modifier; all are set if it has none
	)
	modifier := int64(r.field(i).TypeModifier)
	switch r.field(i).DataTypeOID {
	case pgtype.NumericOID:
		if modifier < modifierOffset {
			return 0, 0, false
		}
		modifier -= modifierOffset
		return modifier >> 16 & 0xffff, modifier & 0xffff, true
	case pgtype.TimestampOID, pgtype.TimestamptzOID, pgtype.TimeOID, pgtype.TimetzOID:
		if modifier < 0 {
			return 0, microseconds, true
		}
		return 0, modifier, true
	case pgtype.IntervalOID:
		if modifier < 0 || modifier&digits == digits {
			return 0, microseconds, true
		}
		return 0, modifier & digits, true
	default:
		return 0, 0, false
	}
}

func (r *rows) ColumnTypeScanType(i int) reflect.Type {
	switch r.field(i).DataTypeOID {
	case pgtype.BoolOID:
		return reflect.TypeFor[bool]()
	case pgtype.Int2OID:
		return reflect.TypeFor[int16]()
	case pgtype.Int4OID:
		return reflect.TypeFor[int32]()
	case pgtype.Int8OID:
		return reflect.TypeFor[int64]()
	case pgtype.Float4OID:
		return reflect.TypeFor[float32]()
	case pgtype.Float8OID:
		return reflect.TypeFor[float64]()
	case pgtype.DateOID, pgtype.TimestampOID, pgtype.TimestamptzOID:
		return reflect.TypeFor[time.Time]()
	case pgtype.ByteaOID, pgtype.JSONOID, pgtype.JSONBOID, pgtype.XMLOID:
		return reflect.TypeFor[[]byte]()
	}
	return reflect.TypeFor[string]()
}
