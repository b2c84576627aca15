package idempotencytest

import (
	"context"
	"maps"
	"net/http"
	"net/http/httptest"
	"strconv"
)

// serve is the outermost handler. It holds the answer back until it is known how much of it may be
// sent: a dead process sends nothing.
func (l *lab) serve(w http.ResponseWriter, r *http.Request) {
	l.running.Add(1)
	defer l.running.Add(-1)
	x := &exchange{}
	answer := httptest.NewRecorder()
	cut := l.run(answer, r.WithContext(context.WithValue(r.Context(), exchangeKey{}, x)))
	if cut || x.dead.Load() {
		panic(http.ErrAbortHandler)
	}
	body := answer.Body.Bytes()
	maps.Copy(w.Header(), answer.Result().Header)
	if !x.half.Load() {
		w.WriteHeader(answer.Code)
		_, _ = w.Write(body) // a client that is gone retries
		return
	}
	if len(body) > 0 {
		w.Header().Set("Content-Length", strconv.Itoa(len(body)))
		w.WriteHeader(answer.Code)
		_, _ = w.Write(body[:len(body)/2])
		_ = http.NewResponseController(w).Flush()
	}
	panic(http.ErrAbortHandler)
}

// run runs the user's handler and reports whether it wants the connection cut.
func (l *lab) run(w http.ResponseWriter, r *http.Request) (cut bool) {
	defer func() {
		if value := recover(); value != nil {
			if !aborted(value) {
				panic(value)
			}
			cut = true
		}
	}()
	l.handler.ServeHTTP(w, r)
	return false
}
