package rpc

import (
	"errors"
	"fmt"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/paidonce/idempotency"
)

// MediaType is the Content-Type of a recorded result. The body is an encoded google.rpc.Status. For
// a reply its code is OK, and its only detail is the reply. For an error it is that error, with its
// message and all its details.
const MediaType = "application/grpc-status+proto"

// Result is the result of a call: a reply or an error.
type Result struct {
	Reply proto.Message  // nil for an error
	Error *status.Status // its code is not OK; nil for a reply
}

// Code returns the code of the result.
func (r Result) Code() code.Code { return code.Code(r.Error.GetCode()) }

// Encode returns the answer that is recorded for a result.
func Encode(r Result) (*idempotency.Answer, error) {
	recorded := r.Error
	if recorded == nil {
		reply, err := anypb.New(r.Reply)
		if err != nil {
			return nil, fmt.Errorf("encode the reply: %w", err)
		}
		recorded = &status.Status{Details: []*anypb.Any{reply}}
	}
	body, err := proto.MarshalOptions{Deterministic: true}.Marshal(recorded)
	if err != nil {
		return nil, fmt.Errorf("encode the status: %w", err)
	}
	return &idempotency.Answer{
		Status: HTTPStatus(r.Code()),
		Header: map[string][]string{"Content-Type": {MediaType}},
		Body:   body,
	}, nil
}

// errNotRecorded means that an answer was not made by Encode.
var errNotRecorded = fmt.Errorf("%w: it is not the result of a call", idempotency.ErrRecordCorrupt)

// Decode returns the result in a recorded answer. The error wraps [idempotency.ErrRecordCorrupt] if
// [Encode] can't have made the answer. It does not wrap it if the reply can't be decoded, which
// happens if its type is not linked into this program.
func Decode(answer *idempotency.Answer) (Result, error) {
	recorded := new(status.Status)
	if kind := answer.Header["Content-Type"]; len(kind) != 1 || kind[0] != MediaType {
		return Result{}, errNotRecorded
	}
	if err := proto.Unmarshal(answer.Body, recorded); err != nil {
		return Result{}, errNotRecorded
	}
	if code.Code(recorded.GetCode()) != code.Code_OK {
		return Result{Error: recorded}, nil
	}
	if len(recorded.GetDetails()) != 1 {
		return Result{}, errNotRecorded
	}
	reply, err := recorded.GetDetails()[0].UnmarshalNew()
	if err != nil {
		// Its text may quote the record.
		return Result{}, errors.New("recorded reply can't be decoded: link the package of its type into this program")
	}
	return Result{Reply: reply}, nil
}

// CodeOf returns the code of an answer that [Encode] made, and [code.Code_UNKNOWN] of any other.
func CodeOf(answer *idempotency.Answer) code.Code {
	if answer.Status == HTTPStatus(code.Code_OK) {
		return code.Code_OK
	}
	result, err := Decode(answer)
	if err != nil {
		return code.Code_UNKNOWN
	}
	return result.Code()
}
