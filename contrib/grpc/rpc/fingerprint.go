package rpc

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"math"

	"github.com/paidonce/idempotency"
)

// Fingerprint returns the fingerprint of a call: SHA-256 over the length-prefixed name of its
// method and the canonical form of its message, without the field that carries the key. It is
// frozen: a change would turn every retry that crosses an upgrade into a mismatch.
//
// The bytes on the wire don't count, because two clients, or two versions of a runtime, may encode
// one message differently. In the canonical form the fields are in the order of their numbers, and
// the entries of a map in the order of their keys. Fields that this program does not know are in
// their places too, with the bytes that came. So a message has the same fingerprint in a program
// that knows a new field and in one that does not, unless that field is a map, or contains bytes
// that are not in canonical form.
func Fingerprint(method string, message proto.Message, field protoreflect.Name) idempotency.Fingerprint {
	m := message.ProtoReflect()
	w := backward{bytes: make([]byte, proto.Size(message)+len(method)+64)}
	w.at = len(w.bytes)
	w.message(m, keyField(m, field))
	w.write([]byte(method))
	w.write(binary.BigEndian.AppendUint64(nil, uint64(len(method))))
	return idempotency.NewFingerprint(idempotency.FingerprintVersionRPC, w.written())
}

// FingerprintAt is the FingerprintAt of an [idempotency.Request] for a call. For the record of an
// HTTP request it returns a fingerprint that equals no other: the key is a mismatch. The versions
// from FingerprintVersionUserMin on are HTTP's too, because calls have no fingerprint functions of
// the service's own.
func FingerprintAt(version int16) (idempotency.Fingerprint, bool) {
	ofHTTP := version == idempotency.FingerprintVersionHTTP || version >= idempotency.FingerprintVersionUserMin
	return idempotency.Fingerprint{Version: version}, ofHTTP
}

// backward is a buffer that is filled from its end: the length of a nested message is known before
// it is written in front of it, so that each byte is written once, however deep the message is.
type backward struct {
	bytes []byte
	at    int // of the first written byte
}

func (w *backward) written() []byte { return w.bytes[w.at:] }

func (w *backward) size() int { return len(w.bytes) - w.at }

func (w *backward) write(p []byte) {
	if w.at < len(p) {
		more := len(w.bytes) + len(p)
		grown := make([]byte, more+len(w.bytes))
		copy(grown[more:], w.bytes)
		w.bytes, w.at = grown, w.at+more
	}
	w.at -= len(p)
	copy(w.bytes[w.at:], p)
}

func (w *backward) varint(v uint64) {
	var buffer [binary.MaxVarintLen64]byte
	w.write(protowire.AppendVarint(buffer[:0], v))
}

func (w *backward) tag(number protowire.Number, kind protowire.Type) {
	w.varint(protowire.EncodeTag(number, kind))
}

// prefix writes the number of bytes that were written since the buffer had this size.
func (w *backward) prefix(size int) { w.varint(uint64(w.size() - size)) }

// message writes the canonical form of a message, without one field of its own.
func (w *backward) message(m protoreflect.Message, without protoreflect.FieldDescriptor) {
	type field struct {
		number     protowire.Number
		descriptor protoreflect.FieldDescriptor // nil: the program does not know it
		value      protoreflect.Value
		raw        []byte
	}
	var fields []field
	m.Range(func(descriptor protoreflect.FieldDescriptor, value protoreflect.Value) bool {
		if descriptor != without {
			fields = append(fields, field{number: descriptor.Number(), descriptor: descriptor, value: value})
		}
		return true
	})
	for raw := []byte(m.GetUnknown()); len(raw) > 0; {
		number, _, n := protowire.ConsumeField(raw)
		if n < 0 { // no parser leaves such bytes
			number, n = protowire.MaxValidNumber, len(raw)
		}
		fields = append(fields, field{number: number, raw: raw[:n]})
		raw = raw[n:]
	}
	slices.SortFunc(fields, func(a, b field) int {
		return cmp.Or(cmp.Compare(a.number, b.number), bytes.Compare(a.raw, b.raw))
	})
	for _, f := range slices.Backward(fields) {
		switch {
		case f.descriptor == nil:
			w.write(f.raw)
		case f.descriptor.IsMap():
			w.entries(f.descriptor, f.value.Map())
		case f.descriptor.IsList():
			w.list(f.descriptor, f.value.List())
		default:
			w.value(f.descriptor, f.value)
			w.tag(f.number, wireType(f.descriptor.Kind()))
		}
	}
}

func (w *backward) list(descriptor protoreflect.FieldDescriptor, list protoreflect.List) {
	size := w.size()
	for i := list.Len() - 1; i >= 0; i-- {
		w.value(descriptor, list.Get(i))
		if !descriptor.IsPacked() {
			w.tag(descriptor.Number(), wireType(descriptor.Kind()))
		}
	}
	if descriptor.IsPacked() {
		w.prefix(size)
		w.tag(descriptor.Number(), protowire.BytesType)
	}
}

func (w *backward) entries(descriptor protoreflect.FieldDescriptor, entries protoreflect.Map) {
	keys := make([]protoreflect.MapKey, 0, entries.Len())
	entries.Range(func(key protoreflect.MapKey, _ protoreflect.Value) bool {
		keys = append(keys, key)
		return true
	})
	slices.SortFunc(keys, func(a, b protoreflect.MapKey) int {
		switch descriptor.MapKey().Kind() {
		case protoreflect.StringKind:
			return cmp.Compare(a.String(), b.String())
		case protoreflect.BoolKind:
			return cmp.Compare(protowire.EncodeBool(a.Bool()), protowire.EncodeBool(b.Bool()))
		case protoreflect.Uint32Kind, protoreflect.Uint64Kind, protoreflect.Fixed32Kind, protoreflect.Fixed64Kind:
			return cmp.Compare(a.Uint(), b.Uint())
		}
		return cmp.Compare(a.Int(), b.Int())
	})
	for _, key := range slices.Backward(keys) {
		size := w.size()
		w.value(descriptor.MapValue(), entries.Get(key))
		w.tag(2, wireType(descriptor.MapValue().Kind()))
		w.value(descriptor.MapKey(), key.Value())
		w.tag(1, wireType(descriptor.MapKey().Kind()))
		w.prefix(size)
		w.tag(descriptor.Number(), protowire.BytesType)
	}
}

// value writes one value, without its tag. A group is written as a message.
func (w *backward) value(descriptor protoreflect.FieldDescriptor, v protoreflect.Value) {
	switch descriptor.Kind() {
	case protoreflect.BoolKind:
		w.varint(protowire.EncodeBool(v.Bool()))
	case protoreflect.EnumKind:
		w.varint(uint64(v.Enum()))
	case protoreflect.Int32Kind, protoreflect.Int64Kind:
		w.varint(uint64(v.Int()))
	case protoreflect.Sint32Kind, protoreflect.Sint64Kind:
		w.varint(protowire.EncodeZigZag(v.Int()))
	case protoreflect.Uint32Kind, protoreflect.Uint64Kind:
		w.varint(v.Uint())
	case protoreflect.Fixed32Kind:
		w.write(protowire.AppendFixed32(nil, uint32(v.Uint())))
	case protoreflect.Sfixed32Kind:
		w.write(protowire.AppendFixed32(nil, uint32(v.Int())))
	case protoreflect.FloatKind:
		w.write(protowire.AppendFixed32(nil, math.Float32bits(float32(v.Float()))))
	case protoreflect.Fixed64Kind:
		w.write(protowire.AppendFixed64(nil, v.Uint()))
	case protoreflect.Sfixed64Kind:
		w.write(protowire.AppendFixed64(nil, uint64(v.Int())))
	case protoreflect.DoubleKind:
		w.write(protowire.AppendFixed64(nil, math.Float64bits(v.Float())))
	case protoreflect.StringKind:
		w.write([]byte(v.String()))
		w.varint(uint64(len(v.String())))
	case protoreflect.BytesKind:
		w.write(v.Bytes())
		w.varint(uint64(len(v.Bytes())))
	case protoreflect.MessageKind, protoreflect.GroupKind:
		size := w.size()
		w.message(v.Message(), nil)
		w.prefix(size)
	}
}

// wireType returns the type of a value in the encoding.
func wireType(kind protoreflect.Kind) protowire.Type {
	switch kind {
	case protoreflect.Fixed32Kind, protoreflect.Sfixed32Kind, protoreflect.FloatKind:
		return protowire.Fixed32Type
	case protoreflect.Fixed64Kind, protoreflect.Sfixed64Kind, protoreflect.DoubleKind:
		return protowire.Fixed64Type
	case protoreflect.StringKind, protoreflect.BytesKind, protoreflect.MessageKind, protoreflect.GroupKind:
		return protowire.BytesType
	}
	return protowire.VarintType
}
