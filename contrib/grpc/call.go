package grpcidem

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/contrib/grpc/rpc"
)

// call has a handler, and all that the handler needs to run again from the start.
type call struct {
	options *Options
	method  string
	message proto.Message // as it came; runs get copies
	handler grpc.UnaryHandler

	result rpc.Result // of the last run
	stream *heldStream
}

var (
	errNoReply    = errors.New("handler returned neither a reply nor an error")
	errNotMessage = errors.New("handler's reply is not a message of protobuf, so it can't be recorded: such methods must pass (Options.Pass)")
)

// run runs the handler on a copy of the request.
func (c *call) run(ctx context.Context) (*idempotency.Answer, error) {
	stream := &heldStream{method: c.method}
	reply, err := c.handler(grpc.NewContextWithServerTransportStream(ctx, stream), proto.Clone(c.message))
	stream.end()
	var result rpc.Result
	if err != nil {
		result.Error = errorOf(err).Proto()
	} else {
		message, ok := reply.(proto.Message)
		switch {
		case reply == nil || ok && !message.ProtoReflect().IsValid():
			return nil, errNoReply
		case !ok:
			return nil, errNotMessage
		}
		result.Reply = message
	}
	answer, err := rpc.Encode(result)
	if err != nil {
		return nil, err
	}
	if len(answer.Body) > c.options.ReplyBytesMax {
		return nil, fmt.Errorf("answer has %d bytes, over the limit of %d (Options.ReplyBytesMax)", len(answer.Body), c.options.ReplyBytesMax)
	}
	c.result, c.stream = result, stream
	return answer, nil
}

// errorOf returns the status that a server sends for a handler's error.
func errorOf(err error) *status.Status {
	s, ok := status.FromError(err)
	switch {
	case !ok:
		return status.FromContextError(err)
	case s.Code() == codes.OK:
		return status.New(codes.Unknown, err.Error())
	}
	return s
}

// heldStream holds the metadata that a run of the handler sets. It is sent after the commit, and
// only if that run counts. heldStream is safe for concurrent use.
type heldStream struct {
	method string

	mu      sync.Mutex
	header  metadata.MD
	trailer metadata.MD
	ended   bool
}

// The errors of a heldStream. If a handler returns one of them, its code makes the engine forget
// the answer.
var (
	errSent  = status.Error(codes.Internal, "idempotency: SendHeader is refused, because the client would learn of a payment before its commit: use SetHeader")
	errEnded = status.Error(codes.Internal, "idempotency: the handler has returned")
)

// Method implements grpc.ServerTransportStream.
func (s *heldStream) Method() string { return s.method }

// SetHeader implements grpc.ServerTransportStream.
func (s *heldStream) SetHeader(md metadata.MD) error { return s.add(&s.header, md) }

// SendHeader implements grpc.ServerTransportStream. It fails.
func (s *heldStream) SendHeader(metadata.MD) error { return errSent }

// SetTrailer implements grpc.ServerTransportStream.
func (s *heldStream) SetTrailer(md metadata.MD) error { return s.add(&s.trailer, md) }

// add adds metadata, without the names that only the interceptor sets.
func (s *heldStream) add(to *metadata.MD, md metadata.MD) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return errEnded
	}
	if *to == nil {
		*to = metadata.MD{}
	}
	for name, values := range md {
		if name = strings.ToLower(name); !strings.HasPrefix(name, "idempotency-") && !strings.HasPrefix(name, "idempotent-") {
			to.Append(name, values...)
		}
	}
	return nil
}

// end makes later calls fail, for example those of a goroutine that the handler left running.
func (s *heldStream) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.ended = true
}
