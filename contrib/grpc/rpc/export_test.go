package rpc

import "google.golang.org/protobuf/proto"

// Canonical returns the canonical form of a message, with all of its fields.
func Canonical(message proto.Message) []byte {
	w := new(backward)
	w.message(message.ProtoReflect(), nil)
	return w.written()
}
