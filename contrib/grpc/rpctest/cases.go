package rpctest

import (
	"context"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/protobuf/proto"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/contrib/grpc/rpc"
	"github.com/paidonce/idempotency/contrib/grpc/rpctest/rpctestpb"
)

// RequestBytesMax is the limit of the request, in bytes, in the case of that name.
const RequestBytesMax = 100

var (
	commit  = []string{"COMMIT"}
	decline = []string{"DECLINE"}
	twice   = []string{"ROLLBACK", "ROLLBACK"}
)

var cases = []struct {
	name    string
	rule    string
	options Options
	check   func(c *checker)
}{
	{name: "Ok", rule: "A reply is committed with the handler's writes, and its replay is the same message.", check: func(c *checker) {
		first := c.pay(doReply)
		c.reply(first, "run-1", idempotency.OutcomeExecuted)
		c.reply(c.pay(doReply), "run-1", idempotency.OutcomeReplayed)
		c.state(1, 1, commit, first)
	}},
	{name: "EmptyReply", rule: "A reply without a field is a reply: it is recorded and replayed.", check: func(c *checker) {
		first := c.pay(doEmpty)
		c.reply(first, "", idempotency.OutcomeExecuted)
		c.reply(c.pay(doEmpty), "", idempotency.OutcomeReplayed)
		c.state(1, 1, commit, first)
	}},
	{name: "Nothing", rule: "A handler that returns neither a reply nor an error has failed: nothing is recorded.", check: func(c *checker) {
		c.refused(c.pay(doNothing), code.Code_INTERNAL, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed, false)
		c.refused(c.pay(doNothing), code.Code_INTERNAL, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed, false)
		c.state(2, 0, twice)
	}},
	{name: "Error", rule: "An error that a retry may change is forgotten: the writes are undone, and a retry runs.", check: func(c *checker) {
		c.error(c.pay(doFail), code.Code_INTERNAL, idempotency.OutcomeNotExecuted)
		c.error(c.pay(doFail), code.Code_INTERNAL, idempotency.OutcomeNotExecuted)
		c.state(2, 0, twice)
	}},
	{name: "ReplyAndError", rule: "If a handler returns a reply and an error, the error counts.", check: func(c *checker) {
		c.error(c.pay(doBoth), code.Code_INTERNAL, idempotency.OutcomeNotExecuted)
		c.error(c.pay(doBoth), code.Code_INTERNAL, idempotency.OutcomeNotExecuted)
		c.state(2, 0, twice)
	}},
	{name: "Aborted", rule: "Aborted is forgotten, although its HTTP status is that of AlreadyExists.", check: func(c *checker) {
		c.error(c.pay(doAborted), code.Code_ABORTED, idempotency.OutcomeNotExecuted)
		c.error(c.pay(doAborted), code.Code_ABORTED, idempotency.OutcomeNotExecuted)
		c.state(2, 0, twice)
	}},
	{name: "Canceled", rule: "Canceled is forgotten.", check: func(c *checker) {
		c.error(c.pay(doCanceled), code.Code_CANCELLED, idempotency.OutcomeNotExecuted)
		c.error(c.pay(doCanceled), code.Code_CANCELLED, idempotency.OutcomeNotExecuted)
		c.state(2, 0, twice)
	}},
	{name: "FinalError", rule: "An error about the request is recorded with its message and all details; the writes are undone.", check: func(c *checker) {
		first := c.pay(doFinal)
		c.error(first, code.Code_FAILED_PRECONDITION, idempotency.OutcomeExecuted)
		if len(first.Error.GetDetails()) != 2 {
			c.Errorf("the client got %d details, want 2", len(first.Error.GetDetails()))
		}
		again := c.pay(doFinal)
		c.error(again, code.Code_FAILED_PRECONDITION, idempotency.OutcomeReplayed)
		if !proto.Equal(first.Error, again.Error) {
			c.Errorf("the replay is %v, and the first answer was %v", again.Error, first.Error)
		}
		c.state(1, 0, decline, first)
	}},
	{name: "Panic", rule: "A panic undoes the writes and leaves the server running; a retry runs.", check: func(c *checker) {
		c.refused(c.pay(doPanic), code.Code_INTERNAL, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed, false)
		c.refused(c.pay(doPanic), code.Code_INTERNAL, idempotency.OutcomeNotExecuted, idempotency.ReasonHandlerFailed, false)
		c.state(2, 0, twice)
	}},
	{name: "Again", rule: "After a serialization failure the handler runs again, on the request as it came, and the client gets the answer of the run that was committed.", check: func(c *checker) {
		c.Store.FailCommits(idempotency.ErrNotSerializable)
		first := c.pay(doReply)
		c.reply(first, "run-2", idempotency.OutcomeExecuted)
		c.reply(c.pay(doReply), "run-2", idempotency.OutcomeReplayed)
		c.state(2, 1, []string{"COMMIT failed", "COMMIT"}, first)
	}},
	{name: "KeyMissing", rule: "A call without a key is refused, and its handler does not run.", check: func(c *checker) {
		c.refused(c.send(Pay, nil, &rpctestpb.PayRequest{Do: doReply}), code.Code_INVALID_ARGUMENT, idempotency.OutcomeNotExecuted, idempotency.ReasonKeyMissing, false)
		c.state(0, 0, nil)
	}},
	{name: "Optional", rule: "If the key is optional, a call without one has a transaction, and is not recorded.", options: Options{Optional: true}, check: func(c *checker) {
		c.reply(c.send(Pay, nil, &rpctestpb.PayRequest{Do: doReply}), "run-1", idempotency.OutcomeExecuted)
		c.reply(c.send(Pay, nil, &rpctestpb.PayRequest{Do: doReply}), "run-2", idempotency.OutcomeExecuted)
		c.state(2, 2, []string{"COMMIT", "COMMIT"})
	}},
	{name: "KeyInvalid", rule: "A key that can't be stored is refused.", check: func(c *checker) {
		for _, invalid := range []string{"", "a b", `"open`, strings.Repeat("k", idempotency.KeyBytesMax+1)} {
			c.refused(c.send(Pay, map[string]string{rpc.HeaderKey: invalid}, &rpctestpb.PayRequest{Do: doReply}),
				code.Code_INVALID_ARGUMENT, idempotency.OutcomeNotExecuted, idempotency.ReasonKeyInvalid, false)
		}
		c.state(0, 0, nil)
	}},
	{name: "KeyQuoted", rule: "A key as a quoted string is the same key as the bare one.", check: func(c *checker) {
		first := c.pay(doReply)
		c.reply(first, "run-1", idempotency.OutcomeExecuted)
		c.reply(c.send(Pay, map[string]string{rpc.HeaderKey: `"` + key + `"`}, &rpctestpb.PayRequest{Do: doReply, Amount: 5}), "run-1", idempotency.OutcomeReplayed)
		c.state(1, 1, commit, first)
	}},
	{name: "TwoKeys", rule: "A call whose metadata and message have different keys is refused.", check: func(c *checker) {
		c.refused(c.send(Pay, map[string]string{rpc.HeaderKey: key}, &rpctestpb.PayRequest{RequestId: "another", Do: doReply}),
			code.Code_INVALID_ARGUMENT, idempotency.OutcomeNotExecuted, idempotency.ReasonKeyInvalid, false)
		c.state(0, 0, nil)
	}},
	{name: "RequestID", rule: "The message's request_id is the key if the metadata have none, and is no part of the fingerprint.", check: func(c *checker) {
		first := c.send(Pay, nil, &rpctestpb.PayRequest{RequestId: key, Do: doReply, Amount: 5})
		c.reply(first, "run-1", idempotency.OutcomeExecuted)
		c.reply(c.send(Pay, nil, &rpctestpb.PayRequest{RequestId: key, Do: doReply, Amount: 5}), "run-1", idempotency.OutcomeReplayed)
		c.reply(c.pay(doReply), "run-1", idempotency.OutcomeReplayed)
		c.reply(c.send(Pay, map[string]string{rpc.HeaderKey: key}, &rpctestpb.PayRequest{RequestId: key, Do: doReply, Amount: 5}), "run-1", idempotency.OutcomeReplayed)
		c.state(1, 1, commit, first)
	}},
	{name: "OtherMessage", rule: "A key belongs to one message: with another it is a mismatch, and the handler does not run.", check: func(c *checker) {
		first := c.pay(doReply)
		c.reply(first, "run-1", idempotency.OutcomeExecuted)
		c.refused(c.send(Pay, map[string]string{rpc.HeaderKey: key}, &rpctestpb.PayRequest{Do: doReply, Amount: 6}),
			code.Code_INVALID_ARGUMENT, idempotency.OutcomeMismatch, idempotency.ReasonKeyReused, false)
		c.state(1, 1, commit, first)
	}},
	{name: "OtherMethod", rule: "A key belongs to one method: with another it is a mismatch, even with the same message.", check: func(c *checker) {
		first := c.pay(doReply)
		c.reply(first, "run-1", idempotency.OutcomeExecuted)
		c.refused(c.send(Refund, map[string]string{rpc.HeaderKey: key}, &rpctestpb.PayRequest{Do: doReply, Amount: 5}),
			code.Code_INVALID_ARGUMENT, idempotency.OutcomeMismatch, idempotency.ReasonKeyReused, false)
		c.state(1, 1, commit, first)
	}},
	{name: "InProgress", rule: "A duplicate of a call that runs is refused with the time after which to retry, and runs nothing.", check: func(c *checker) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		replies := c.held(ctx)
		c.refused(c.pay(doHold), code.Code_ABORTED, idempotency.OutcomeInProgress, idempotency.ReasonInProgress, true)
		close(c.release)
		first := wait(c, replies)
		c.reply(first, "run-1", idempotency.OutcomeExecuted)
		c.reply(c.pay(doHold), "run-1", idempotency.OutcomeReplayed)
		c.state(1, 1, commit, first)
	}},
	{name: "CanceledByClient", rule: "Work that has begun is finished if the client cancels, and a retry finds it.", check: func(c *checker) {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		replies := c.held(ctx)
		cancel()
		if lost := wait(c, replies); code.Code(lost.Error.GetCode()) != code.Code_CANCELLED {
			c.Errorf("the client that canceled got %v", lost)
		}
		wait(c, c.gone) // the server knows
		close(c.release)
		found := c.pay(doHold)
		for found.first(rpc.HeaderStatus) == string(idempotency.OutcomeInProgress) {
			found = c.pay(doHold)
		}
		c.reply(found, "run-1", idempotency.OutcomeReplayed)
		c.state(1, 1, commit, found)
	}},
	{name: "RequestBytesMax", rule: "A message over the limit is refused before its handler runs, and one at the limit is not.", options: Options{RequestBytesMax: RequestBytesMax}, check: func(c *checker) {
		at := &rpctestpb.PayRequest{RequestId: key, Do: doReply, Amount: 1}
		at.RequestId += strings.Repeat("k", RequestBytesMax-proto.Size(at))
		first := c.send(Pay, nil, at)
		c.reply(first, "run-1", idempotency.OutcomeExecuted)
		over := &rpctestpb.PayRequest{RequestId: at.GetRequestId() + "k", Do: doReply, Amount: 1}
		c.refused(c.send(Pay, nil, over), code.Code_INVALID_ARGUMENT, idempotency.OutcomeNotExecuted, idempotency.ReasonBodyTooLarge, false)
		c.state(1, 1, commit, first)
	}},
	{name: "NoSideEffects", rule: "A method with idempotency_level = NO_SIDE_EFFECTS passes untouched, with and without a key.", check: func(c *checker) {
		for range 2 {
			r := c.send(Look, map[string]string{rpc.HeaderKey: key}, &rpctestpb.PayRequest{Do: doLook})
			if r.Error != nil || r.first(rpc.HeaderStatus) != "" {
				c.Errorf("got %v", r)
			}
		}
		c.state(2, 0, nil)
	}},
	{name: "StreamRefused", rule: "If streams are refused, the handler of one does not run.", options: Options{RefuseStreams: true}, check: func(c *checker) {
		c.refused(c.send(Watch, nil, &rpctestpb.PayRequest{}), code.Code_UNIMPLEMENTED, idempotency.OutcomeNotExecuted, rpc.ReasonStreamRefused, false)
		c.state(0, 0, nil)
	}},
	{name: "StreamPasses", rule: "By default a stream passes, unless it comes with a key.", check: func(c *checker) {
		if r := c.send(Watch, nil, &rpctestpb.PayRequest{}); r.Error != nil || r.Message.GetId() != "stream" {
			c.Errorf("the stream got %v", r)
		}
		c.refused(c.send(Watch, map[string]string{rpc.HeaderKey: key}, &rpctestpb.PayRequest{}), code.Code_UNIMPLEMENTED, idempotency.OutcomeNotExecuted, rpc.ReasonStreamRefused, false)
		c.state(1, 0, nil)
	}},
}
