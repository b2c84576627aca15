package live

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// page returns a Live without a database: these tests need only the stream.
func page(t *testing.T) *Live {
	t.Helper()
	l := New(nil, "http://127.0.0.1:0", time.Hour, nil)
	proofs := int64(0)
	l.prove = func(context.Context, string) (*Proof, error) { // only the prover calls it
		proofs++
		return &Proof{AtMS: time.Now().UnixMilli(), Alice: proofs}, nil
	}
	return l
}

// screen is the ResponseWriter of a viewer. While it is stuck, a Write blocks until its deadline,
// like a connection that is not read.
type screen struct {
	mu       sync.Mutex
	header   http.Header
	status   int
	content  bytes.Buffer
	at       [11]time.Time // of the last updates, newest last
	stuck    bool
	deadline *time.Timer
	over     chan struct{} // closed when the deadline has passed
	end      func()        // closes it
}

func newScreen() *screen {
	over := make(chan struct{})
	return &screen{header: http.Header{}, over: over, end: sync.OnceFunc(func() { close(over) })}
}

func (s *screen) Header() http.Header    { return s.header }
func (s *screen) WriteHeader(status int) { s.status = status }

func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	stuck := s.stuck
	s.mu.Unlock()
	if stuck {
		<-s.over
		return 0, os.ErrDeadlineExceeded
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if bytes.Contains(p, []byte("event: update")) {
		copy(s.at[:], s.at[1:])
		s.at[len(s.at)-1] = time.Now()
	}
	return s.content.Write(p)
}

func (s *screen) FlushError() error { return nil }

func (s *screen) SetWriteDeadline(at time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.deadline != nil {
		s.deadline.Stop()
	}
	s.deadline = time.AfterFunc(time.Until(at), s.end)
	return nil
}

// watch opens a stream on a screen until ctx ends. It returns a channel that is closed when the
// stream has ended.
func watch(ctx context.Context, l *Live, s *screen, last string) <-chan struct{} {
	ended := make(chan struct{})
	r := httptest.NewRequestWithContext(ctx, http.MethodGet, "/live/events", nil)
	if last != "" {
		r.Header.Set("Last-Event-ID", last)
	}
	go func() {
		defer close(ended)
		l.events(s, r)
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.deadline != nil {
			s.deadline.Stop()
		}
	}()
	return ended
}

// events returns the id and kind of each event on a screen.
func (s *screen) events() (list []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	id := ""
	for line := range strings.Lines(s.content.String()) {
		if rest, ok := strings.CutPrefix(line, "id: "); ok {
			id = strings.TrimSpace(rest)
		}
		if kind, ok := strings.CutPrefix(line, "event: "); ok {
			list = append(list, strings.TrimSpace(kind)+" "+id[strings.LastIndex(id, "-")+1:])
		}
	}
	return list
}

func (l *Live) attempts(n int) {
	for i := range n {
		l.board.attempt(time.Now(), sides[i%2], fmt.Sprint(rand.IntN(1000)), "#", DotExecuted, DotExecuted)
	}
}

// TestFiftyViewersOfTwoThousandAttempts: for a minute of fake time there are 2,000 attempts a
// second. Each of 50 viewers gets at most ten updates in any second, hardly fewer, and misses none.
// The bank's memory for them does not grow.
func TestFiftyViewersOfTwoThousandAttempts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const viewers, seconds, rate = 50, 60, 2000
		l := page(t)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go l.Run(ctx)
		var screens []*screen
		for range viewers {
			s := newScreen()
			screens = append(screens, s)
			watch(ctx, l, s, "")
		}
		synctest.Wait()
		seen, first := 0, true
		read := func() { // drops the events read, so that only the bank's own memory is left
			for i, s := range screens {
				got := s.events()
				if i == 0 {
					seen += len(got)
				}
				for n, event := range got {
					if strings.HasPrefix(event, "snapshot ") != (first && n == 0) {
						t.Fatalf("viewer %d sees %s", i, event)
					}
				}
				s.mu.Lock()
				s.content.Reset()
				took := s.at[10].Sub(s.at[0])
				s.mu.Unlock()
				if took < time.Second {
					t.Fatalf("viewer %d got eleven updates in %v", i, took)
				}
			}
			first = false
		}
		heap := func() uint64 {
			runtime.GC()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			return m.HeapAlloc
		}
		var before uint64
		for second := range seconds {
			for range 50 {
				l.attempts(rate / 50)
				time.Sleep(time.Second / 50)
			}
			read()
			if second == 5 {
				before = heap()
			}
		}
		after := heap()
		if grown := int64(after) - int64(before); grown > ringBytesMax {
			t.Errorf("in %d seconds the heap grew by %d bytes, more than the ring may hold, which is full already", seconds-6, grown)
		}
		if l.hub.ringBytes > ringBytesMax || len(l.hub.ring) > ringMax {
			t.Errorf("the ring holds %d events of %d bytes", len(l.hub.ring), l.hub.ringBytes)
		}
		// At most ten updates a second, a snapshot, and one more update at the end.
		if least := seconds*10 - 5; seen < least || seen > seconds*10+2 {
			t.Errorf("a viewer saw %d events in %d seconds", seen, seconds)
		}
		if got := l.board.counts[0].Attempts + l.board.counts[1].Attempts; got != seconds*rate {
			t.Errorf("%d attempts were counted, %d were made", got, seconds*rate)
		}
	})
}

// TestAViewerWhoComesBackMissesNothing: with the id of its last event a viewer gets each later
// event once. If the ring no longer holds them all, or the id is of another process, it gets a
// snapshot.
func TestAViewerWhoComesBackMissesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := page(t)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go l.Run(ctx)
		watch(ctx, l, newScreen(), "") // one viewer stays
		pass := func(updates int) {
			for range updates {
				l.attempts(3)
				time.Sleep(updateInterval)
			}
			synctest.Wait()
		}
		pass(5)
		at := l.hub.sequence
		id := func(sequence int64) string { return fmt.Sprintf("%s-%d", l.hub.epoch, sequence) }
		pass(20)
		s := newScreen()
		watch(ctx, l, s, id(at))
		pass(5)
		var want []string
		for sequence := at + 1; sequence <= l.hub.sequence; sequence++ {
			want = append(want, fmt.Sprintf("update %d", sequence))
		}
		if got := s.events(); !slices.Equal(got, want) {
			t.Errorf("after event %d it got %q, want %q", at, got, want)
		}

		pass(ringMax)
		now, oldest := l.hub.sequence, l.hub.sequence-ringMax
		for last, want := range map[string]string{
			id(now): "", id(oldest): fmt.Sprintf("update %d", oldest+1), id(oldest - 1): fmt.Sprintf("snapshot %d", now),
			id(now + 1): fmt.Sprintf("snapshot %d", now), "0123456789abcdef-3": fmt.Sprintf("snapshot %d", now),
			id(now) + "x": fmt.Sprintf("snapshot %d", now), "": fmt.Sprintf("snapshot %d", now),
		} {
			s := newScreen()
			closing, leave := context.WithCancel(ctx)
			ended := watch(closing, l, s, last)
			synctest.Wait()
			leave()
			<-ended
			got := s.events()
			if want == "" && len(got) > 0 || want != "" && (len(got) == 0 || got[0] != want) {
				t.Errorf("after %q the first of %d events is %q, want %q", last, len(got), got, want)
			}
		}
	})
}

// TestASlowReaderIsDropped: a viewer that does not read is dropped when its queue is full, or when
// a write has taken too long. No other viewer is affected.
func TestASlowReaderIsDropped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := page(t)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go l.Run(ctx)
		slow, quick := newScreen(), newScreen()
		watch(ctx, l, quick, "")
		ended := watch(ctx, l, slow, "")
		synctest.Wait()
		slow.mu.Lock()
		slow.stuck = true
		slow.mu.Unlock()
		for range queueMax + 2 { // one is being written, and one does not fit
			l.attempts(1)
			time.Sleep(updateInterval)
			synctest.Wait()
		}
		synctest.Wait()
		select {
		case <-ended:
		default:
			t.Error("the slow reader's stream goes on")
		}
		if got := len(quick.events()); got < queueMax {
			t.Errorf("beside it another got %d events", got)
		}
	})
}

// TestAStreamWithoutNewsIsPinged: a stream without events is pinged. The ping also finds a viewer
// that is gone without closing its connection.
func TestAStreamWithoutNewsIsPinged(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := page(t) // Run is not called, so there are no proofs
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		s := newScreen()
		ended := watch(ctx, l, s, "")
		time.Sleep(2*pingInterval + time.Second)
		synctest.Wait()
		if got := strings.Count(s.content.String(), pingLine); got != 2 {
			t.Errorf("%d pings in %v", got, 2*pingInterval)
		}
		s.mu.Lock()
		s.stuck = true
		s.mu.Unlock()
		time.Sleep(pingInterval + writeTimeout)
		synctest.Wait()
		select {
		case <-ended:
		default:
			t.Error("the stream of a viewer that is gone goes on")
		}
	})
}

// TestStopEndsStreamsAtOnce: even a stream that is not read ends, and none begins afterwards.
func TestStopEndsStreamsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := page(t)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go l.Run(ctx)
		stuck := newScreen()
		ended := []<-chan struct{}{watch(ctx, l, newScreen(), ""), watch(ctx, l, stuck, "")}
		synctest.Wait()
		stuck.mu.Lock()
		stuck.stuck = true
		stuck.mu.Unlock()
		l.attempts(1)
		time.Sleep(2 * updateInterval)
		synctest.Wait() // it blocks in a write
		before := time.Now()
		l.Stop()
		for _, e := range ended {
			<-e
		}
		if took := time.Since(before); took > 0 {
			t.Errorf("the streams ended after %v", took)
		}
		s := newScreen()
		<-watch(ctx, l, s, "")
		if s.status != http.StatusServiceUnavailable || s.header.Get("Retry-After") == "" {
			t.Errorf("a stream after it was answered %d", s.status)
		}
	})
}

// TestViewersMax: the last viewer within the limit is served. The next gets a 503, and is served
// after another has left.
func TestViewersMax(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := page(t)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		one, leave := context.WithCancel(ctx)
		defer leave()
		first := watch(one, l, newScreen(), "")
		for range ViewersMax - 1 {
			watch(ctx, l, newScreen(), "")
		}
		synctest.Wait()
		s := newScreen()
		<-watch(ctx, l, s, "")
		if s.status != http.StatusServiceUnavailable || s.header.Get("Retry-After") == "" || !strings.Contains(s.content.String(), "#viewers-max") {
			t.Errorf("one too many is answered %d %s", s.status, s.content.String())
		}
		leave()
		<-first
		s = newScreen()
		watch(ctx, l, s, "")
		synctest.Wait()
		if got := s.events(); len(got) != 1 {
			t.Errorf("when one has left the next gets %q, %d", got, s.status)
		}
	})
}

// TestNobodyWatchesNobodyAsks: the books are read only while there are viewers, and once for all of
// them.
func TestNobodyWatchesNobodyAsks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := page(t)
		var asked, atOnce atomic.Int64
		l.prove = func(ctx context.Context, _ string) (*Proof, error) {
			asked.Add(1)
			defer atOnce.Add(-1)
			if atOnce.Add(1) > 1 {
				t.Error("two proofs at once")
			}
			time.Sleep(10 * time.Millisecond)
			return &Proof{}, nil
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go l.Run(ctx)
		time.Sleep(time.Minute)
		if asked := asked.Load(); asked != 0 {
			t.Errorf("with no viewer the books were read %d times", asked)
		}
		watching, leave := context.WithCancel(ctx)
		defer leave()
		for range 5 {
			watch(watching, l, newScreen(), "")
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if asked := asked.Load(); asked < 18 || asked > 21 {
			t.Errorf("in ten seconds the books were read %d times", asked)
		}
		leave()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		before := asked.Load()
		time.Sleep(time.Minute)
		if more := asked.Load() - before; more != 0 {
			t.Errorf("when all had left the books were read %d times more", more)
		}
	})
}

// TestSlowBooksAreReadLessOften: a slow proof is followed by a longer pause. A proof that takes too
// long is canceled and reported as missing, and the last one stays.
func TestSlowBooksAreReadLessOften(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := page(t)
		var took atomic.Int64
		took.Store(int64(time.Second))
		var asked atomic.Int64
		l.prove = func(ctx context.Context, _ string) (*Proof, error) {
			asked.Add(1)
			select {
			case <-time.After(time.Duration(took.Load())):
				return &Proof{Alice: 7}, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go l.Run(ctx)
		watch(ctx, l, newScreen(), "")
		time.Sleep(19 * time.Second)
		synctest.Wait()
		// After 0, 5, 10 and 15 seconds.
		if asked := asked.Load(); asked != 4 {
			t.Errorf("proofs of a second were read %d times in 19 seconds", asked)
		}
		took.Store(int64(time.Hour))
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if p := l.board.lastProof(); p.Error == "" || p.Alice != 7 {
			t.Errorf("the proof is %+v", p)
		}
	})
}

// TestAStreamOutlivesTheServersTimeouts: ReadTimeout and WriteTimeout do not end a stream.
func TestAStreamOutlivesTheServersTimeouts(t *testing.T) {
	t.Parallel()
	l := page(t)
	ctx, cancel := context.WithCancel(t.Context())
	var group sync.WaitGroup
	group.Go(func() { l.Run(ctx) })
	server := httptest.NewUnstartedServer(http.HandlerFunc(l.events))
	server.Config.ReadTimeout, server.Config.WriteTimeout = 150*time.Millisecond, 150*time.Millisecond
	server.Start()
	defer server.Close()
	defer group.Wait()
	defer cancel()
	response, err := http.Get(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	started, updates := time.Now(), 0
	buffer := make([]byte, 64<<10)
	for time.Since(started) < 600*time.Millisecond || updates < 3 {
		l.attempts(1)
		n, err := response.Body.Read(buffer)
		if err != nil {
			t.Fatalf("after %v and %d updates: %v", time.Since(started), updates, err)
		}
		updates += bytes.Count(buffer[:n], []byte("event: update"))
	}
	l.Stop()
	if _, err := io.Copy(io.Discard, response.Body); err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("the stream ended with %v", err)
	}
}

// TestTheBoardIsBounded: it keeps the newest lanes, their last dots and the last seconds.
func TestTheBoardIsBounded(t *testing.T) {
	t.Parallel()
	b := newBoard()
	now := time.Unix(1_000_000, 0)
	for i := range 2 * lanesMax {
		for _, side := range sides {
			b.attempt(now, side, fmt.Sprint(i), fmt.Sprint(i), DotExecuted, DotLostReply)
		}
		now = now.Add(time.Second)
	}
	for range dotsMax + 3 {
		b.attempt(now, Protected, fmt.Sprint(2*lanesMax-1), "", DotReplayed, DotReplayed)
	}
	f := b.snapshot(now)
	if len(f.Lanes) != 2*lanesMax || len(b.byKey) != 2*lanesMax || len(f.Bars) != barsMax || len(b.changed.lanes) > 2*lanesMax {
		t.Errorf("%d lanes, %d names, %d bars, %d changed", len(f.Lanes), len(b.byKey), len(f.Bars), len(b.changed.lanes))
	}
	last := f.Lanes[lanesMax-1]
	want := Lane{ID: last.ID, Side: Protected, Label: fmt.Sprint(2*lanesMax - 1), Dots: strings.Repeat("r", dotsMax), More: 4, Ran: 1}
	if !reflect.DeepEqual(last, want) {
		t.Errorf("the lane is %+v, want %+v", last, want)
	}
	if c := f.Counts[0]; c.Executed != 2*lanesMax || c.LostReplies != 2*lanesMax || c.Replayed != dotsMax+3 || c.Attempts != 2*lanesMax+dotsMax+3 {
		t.Errorf("counts are %+v", c)
	}
}
