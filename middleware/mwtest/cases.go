package mwtest

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"sync"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/middleware"
)

var cases = []testCase{
	{
		name: "Answer", rule: "an answer is recorded as the client saw it, in one commit with the handler's writes; a retry gets the same answer, and the handler does not run",
		run: func(c *check) {
			first := c.post(string(Answer), "key-1")
			c.answered(first, idempotency.OutcomeExecuted, 1)
			c.recorded(c.ended("COMMIT"), first)
			c.replayed(c.post(string(Answer), "key-1"), first)
			c.replayed(c.post(string(Answer), "key-1"), first)
			c.ended("COMMIT")
			c.counted(1, 1)
		},
	},
	{
		name: "StatusOnly", needs: statusOnly, rule: "a status without a body is an answer",
		run: func(c *check) {
			first := c.post(string(StatusOnly), "key-1")
			if first.Status != http.StatusNoContent || first.Outcome != string(idempotency.OutcomeExecuted) || first.Body != "" {
				c.Errorf("answer %v, want 204, executed", first)
			}
			c.recorded(c.ended("COMMIT"), first)
			c.replayed(c.post(string(StatusOnly), "key-1"), first)
			c.ended("COMMIT")
			c.counted(1, 1)
		},
	},
	{
		name: "FinalError", rule: "an error with a 4xx is recorded as the client saw it, without the handler's writes; a retry gets the same answer",
		run: func(c *check) {
			first := c.post(string(FinalError), "key-1")
			if first.Status/100 != 4 || first.Outcome != string(idempotency.OutcomeExecuted) {
				c.Errorf("answer %v, want 4xx, executed", first)
			}
			c.recorded(c.ended("DECLINE"), first)
			c.replayed(c.post(string(FinalError), "key-1"), first)
			c.ended("DECLINE")
			c.counted(1, 0)
		},
	},
	{
		name: "ReturnedError", needs: returnedErrors, rule: "if the handler returns an error the client gets a 5xx, its writes are undone and nothing is recorded; a retry runs",
		run: func(c *check) { c.failsTwice(string(ReturnError)) },
	},
	{
		name: "AnswerThenError", needs: undoneAnswers, rule: "if the handler returns an error after it has answered the client gets a 5xx, its writes are undone and nothing is recorded; a retry runs",
		run: func(c *check) { c.failsTwice(string(AnswerThenError)) },
	},
	{
		name: "Nothing", needs: noAnswer, rule: "if the handler returns without an answer it has failed: an answer that went around the middleware looks the same",
		run: func(c *check) { c.failsTwice(string(Nothing)) },
	},
	{
		name: "NothingIsOK", needs: noAnswer, rule: "with Options.EmptyOK a handler that returns without an answer has answered an empty 200",
		options: func(o *middleware.Options) { o.EmptyOK = true },
		run: func(c *check) {
			first := c.post(string(Nothing), "key-1")
			if first.Status != http.StatusOK || first.Outcome != string(idempotency.OutcomeExecuted) || first.Body != "" {
				c.Errorf("answer %v, want an empty 200, executed", first)
			}
			c.recorded(c.ended("COMMIT"), first)
			c.replayed(c.post(string(Nothing), "key-1"), first)
			c.counted(1, 1)
		},
	},
	{
		name: "Panic", rule: "if the handler panics the client gets a 5xx, its writes are undone and nothing is recorded; a retry runs",
		run: func(c *check) { c.failsTwice(doPanic) },
	},
	{
		name: "RunAgain", rule: "if the transaction must be started again (40001) the handler runs again from the start, and only the answer and the writes of the last run count",
		run: func(c *check) {
			c.Store.FailCommits(idempotency.ErrNotSerializable, idempotency.ErrNotSerializable)
			first := c.post(string(Answer), "key-1")
			c.answered(first, idempotency.OutcomeExecuted, 3)
			if strings.Contains(first.Body, "run-1") || strings.Contains(first.Body, "run-2") {
				c.Errorf("the answer %v has parts of an earlier run's", first)
			}
			c.recorded(c.ended("COMMIT failed", "COMMIT failed", "COMMIT"), first)
			c.replayed(c.post(string(Answer), "key-1"), first)
			c.counted(3, 1)
		},
	},
	{
		name: "CommitFails", rule: "nothing of the handler's answer reaches the client before COMMIT has returned",
		run: func(c *check) {
			c.Store.FailCommits(idempotency.ErrUnavailable)
			c.refused(c.post(string(Answer), "key-1"), http.StatusServiceUnavailable, idempotency.OutcomeNotExecuted, idempotency.ReasonUnavailable)
			c.ended("COMMIT failed")
			c.answered(c.post(string(Answer), "key-1"), idempotency.OutcomeExecuted, 2)
			c.counted(2, 1)
		},
	},
	{
		name: "Stream", needs: stream, rule: "an answer is not streamed: it is refused, or goes out as a whole after COMMIT",
		run: func(c *check) {
			c.Store.FailCommits(idempotency.ErrUnavailable)
			if got := c.post(string(Stream), "key-1"); got.Status < 500 || strings.Contains(got.Body, "run-1") {
				c.Errorf("answer %v, want 5xx and no part of the handler's: COMMIT failed", got)
			}
			if ends := c.Store.Ends(); len(ends) != 1 || ends[0].String() == "COMMIT" {
				c.Errorf("the transactions ended with %q", ends)
			}
		},
	},
	{
		name: "Hijack", needs: hijack, rule: "a handler can't take the conn over",
		run: func(c *check) {
			if _, err := c.send(c.ctx, string(Hijack), content, "key-1"); err != nil {
				c.Errorf("%v", err)
			}
			if got := c.Runs(); got != 1 {
				c.Errorf("the handler ran %d times, want 1", got)
			}
		},
	},
	{
		name: "KeyMissing", rule: "a request without a key is refused, and the handler does not run",
		run: func(c *check) {
			c.refused(c.post(string(Answer)), http.StatusBadRequest, idempotency.OutcomeNotExecuted, idempotency.ReasonKeyMissing)
			// Some servers drop an empty header: then the key is missing.
			if empty := c.post(string(Answer), ""); empty.Status != http.StatusBadRequest || empty.Outcome != string(idempotency.OutcomeNotExecuted) {
				c.Errorf("answer %v to an empty key, want 400, %s", empty, idempotency.OutcomeNotExecuted)
			}
			c.ended()
			c.counted(0, 0)
		},
	},
	{
		name: "TwoKeys", rule: "a request with two header lines Idempotency-Key is refused, even if they are equal, and the handler does not run",
		run: func(c *check) {
			c.refused(c.post(string(Answer), "key-1", "key-2"), http.StatusBadRequest, idempotency.OutcomeNotExecuted, idempotency.ReasonKeyInvalid)
			c.refused(c.post(string(Answer), "key-1", "key-1"), http.StatusBadRequest, idempotency.OutcomeNotExecuted, idempotency.ReasonKeyInvalid)
			c.ended()
			c.counted(0, 0)
		},
	},
	{
		name: "Mismatch", rule: "a key that belongs to another request is refused, and the handler does not run",
		run: func(c *check) {
			first := c.post(string(Answer), "key-1")
			c.answered(first, idempotency.OutcomeExecuted, 1)
			other, err := c.send(c.ctx, string(Answer), `{"amount":101,"token":"mwtest-1"}`, "key-1")
			if err != nil {
				c.Fatalf("%v", err)
			}
			c.refused(other, http.StatusUnprocessableEntity, idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)
			c.refused(c.post(string(FinalError), "key-1"), http.StatusUnprocessableEntity, idempotency.OutcomeMismatch, idempotency.ReasonKeyReused)
			c.ended("COMMIT")
			c.counted(1, 1)
		},
	},
	{
		name: "InProgress", rule: "a duplicate of a running request is refused, and the handler runs once",
		run: func(c *check) {
			done := c.begin(c.ctx, "key-1")
			c.refused(c.post(doHold, "key-1"), http.StatusConflict, idempotency.OutcomeInProgress, idempotency.ReasonInProgress)
			c.letGo()
			first := c.wait(done)
			c.answered(first, idempotency.OutcomeExecuted, 1)
			c.replayed(c.post(doHold, "key-1"), first)
			c.ended("COMMIT")
			c.counted(1, 1)
		},
	},
	{
		name: "HangUp", rule: "if the client leaves, the handler goes on to its end, and a retry gets its answer",
		run: func(c *check) {
			ctx, leave := context.WithCancel(c.ctx)
			defer leave()
			done := c.begin(ctx, "key-1")
			c.Service.mu.Lock()
			gone := c.gone
			c.Service.mu.Unlock()
			leave()
			if got := <-done; got.err == nil {
				c.Fatalf("the client left, and got %v", got.reply)
			}
			if gone != nil { // the server of Serve notices
				select {
				case <-gone:
				case <-c.ctx.Done():
					c.Fatalf("the server did not notice that the client left")
				}
			}
			c.letGo()
			end := c.ended("COMMIT")[0]
			retry := c.post(doHold, "key-1")
			c.answered(retry, idempotency.OutcomeReplayed, 1)
			c.recorded([]End{end}, retry)
			c.counted(1, 1)
		},
	},
	{
		name: "BigBody", rule: "a body up to BodyBytesMax comes to the handler whole; a longer one is refused, and the handler does not run",
		run: func(c *check) {
			c.answered(c.postLong(BodyBytesMax, true, "key-1"), idempotency.OutcomeExecuted, 1)
			c.answered(c.postLong(BodyBytesMax, false, "key-2"), idempotency.OutcomeExecuted, 2)
			for _, announced := range []bool{true, false} {
				c.refused(c.postLong(BodyBytesMax+1, announced, "key-3"), http.StatusRequestEntityTooLarge, idempotency.OutcomeNotExecuted, idempotency.ReasonBodyTooLarge)
			}
			c.ended("COMMIT", "COMMIT")
			c.counted(2, 2)
		},
	},
	{
		name: "ManyAtOnce", rule: "requests at the same time get their own answers, and the store's keys don't change afterwards",
		run: func(c *check) {
			const clients, each = 8, 8
			c.expectBody("mwtest-1")
			var mu sync.Mutex
			answers := map[string]Reply{}
			var all sync.WaitGroup
			for client := range clients {
				all.Go(func() {
					for n := range each {
						key := fmt.Sprintf("key-%d-%d", client, n)
						got, err := c.send(c.ctx, string(Answer), content, key)
						if err != nil || got.Outcome != string(idempotency.OutcomeExecuted) {
							c.fault("%s: answer %v, %v", key, got, err)
							continue
						}
						mu.Lock()
						answers[key] = got
						mu.Unlock()
					}
				})
			}
			all.Wait()
			c.counted(clients*each, clients*each)
			for _, end := range c.Store.Ends() {
				c.recorded([]End{end}, answers[end.Key.Value])
			}
			for key, first := range answers {
				c.replayed(c.post(string(Answer), key), first)
			}
		},
	},
}

// failsTwice sends a request that fails, and its retry.
func (c *check) failsTwice(do string) {
	c.Helper()
	var ends []string
	for run := range 2 {
		got := c.post(do, "key-1")
		if got.Status < 500 || got.Outcome != string(idempotency.OutcomeNotExecuted) {
			c.Errorf("answer %v, want 5xx, %s", got, idempotency.OutcomeNotExecuted)
		}
		ends = append(ends, "ROLLBACK")
		c.ended(ends...)
		c.counted(run+1, 0)
	}
}
