package client_test

import (
	"fmt"
	"net/http"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
)

// TestResumeSendsFewAtOnce: ResumeAtOnce intents are under way, and the next one when one of them has ended.
func TestResumeSendsFewAtOnce(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		store := newIntents()
		for n := range client.ResumeAtOnce + 1 {
			intent := &client.Intent{Key: idempotency.Key{Value: fmt.Sprint("k", n)}, Method: http.MethodPost, URL: "http://bank.example/"}
			if _, err := store.Save(t.Context(), intent); err != nil {
				t.Fatal(err)
			}
		}
		var sent atomic.Int64
		answer := make(chan struct{})
		transport := client.New(canned(func(r *http.Request) (*http.Response, error) {
			sent.Add(1)
			<-answer
			return answerOf(r, 201, "Idempotency-Status", "executed"), nil
		}), &client.Options{Honours: client.Everywhere, Intents: store})
		ended := make(chan client.Report, 1)
		go func() {
			report, err := transport.Resume(t.Context(), nil)
			if err != nil {
				t.Error(err)
			}
			ended <- report
		}()
		synctest.Wait()
		if n := sent.Load(); n != client.ResumeAtOnce {
			t.Errorf("%d are sent at once, want %d", n, client.ResumeAtOnce)
		}
		answer <- struct{}{}
		synctest.Wait()
		if n := sent.Load(); n != client.ResumeAtOnce+1 {
			t.Errorf("%d are sent when one has its answer, want %d", n, client.ResumeAtOnce+1)
		}
		close(answer)
		if report := <-ended; report != (client.Report{Settled: client.ResumeAtOnce + 1}) || store.count() != 0 {
			t.Errorf("%+v, and %d are kept", report, store.count())
		}
	})
}
