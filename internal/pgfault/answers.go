package pgfault

import (
	"encoding/binary"
	"sync"
)

// The messages of PostgreSQL that matter here.
const (
	messageBackendKeyData  = 'K'
	messageCommandComplete = 'C'
	messageCopyBoth        = 'W'
	messageCopyIn          = 'G'
	messageEmptyQuery      = 'I'
	messageErrorResponse   = 'E'
	messageReadyForQuery   = 'Z'
	messageSuspended       = 's'
)

// answers keeps count of what PostgreSQL still owes an answer to. The goroutine of each direction tells it what passes.
type answers struct {
	mu      sync.Mutex
	changed chan struct{} // holds a token after a change; one goroutine waits

	owed     int  // ReadyForQuery messages
	executes int  // Execute messages of the flush that has no Sync yet
	done     int  // of them those that are answered
	failed   bool // one of them failed: the rest is skipped
	simple   bool // the last message with a ReadyForQuery to come was a simple Query
	copying  bool // a COPY from the client is under way
	over     bool // PostgreSQL has hung up
	pid      uint32

	// The message that is passing. Only the server's goroutine uses these.
	header [headerBytes + 4]byte // with the process id of a BackendKeyData
	have   int                   // bytes of header that are there
	skip   int                   // bytes of its body that are to come
}

func newAnswers() *answers { return &answers{changed: make(chan struct{}, 1)} }

// sent is told of a flush, or of its part before the COMMIT, before that is written.
func (a *answers) sent(f flush) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if f.copyEnds {
		a.copying = false
	}
	if !f.ends {
		a.executes = f.executes
		return
	}
	a.executes, a.done, a.failed = 0, 0, false
	if a.copying && !f.simple {
		return // PostgreSQL ignores a Sync during COPY
	}
	a.owed++
	a.simple = f.simple
}

// received is told of everything that comes back.
func (a *answers) received(chunk []byte) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for len(chunk) > 0 {
		if a.skip > 0 {
			n := min(a.skip, len(chunk))
			chunk, a.skip = chunk[n:], a.skip-n
			continue
		}
		want := headerBytes
		if a.have > 0 && a.header[0] == messageBackendKeyData || a.have == 0 && chunk[0] == messageBackendKeyData {
			want = len(a.header)
		}
		n := copy(a.header[a.have:want], chunk)
		chunk, a.have = chunk[n:], a.have+n
		if a.have < want {
			break
		}
		// A length under 4 is not PostgreSQL's; the message then counts as empty.
		a.skip = max(int(binary.BigEndian.Uint32(a.header[1:]))-4-(want-headerBytes), 0)
		a.have = 0
		a.message()
	}
	a.signal()
}

// hungUp is told that PostgreSQL will answer nothing more.
func (a *answers) hungUp() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.over = true
	a.signal()
}

func (a *answers) signal() {
	select {
	case a.changed <- struct{}{}:
	default:
	}
}

func (a *answers) message() {
	switch a.header[0] {
	case messageBackendKeyData:
		a.pid = binary.BigEndian.Uint32(a.header[headerBytes:])
	case messageReadyForQuery:
		a.owed = max(a.owed-1, 0)
	case messageCommandComplete, messageEmptyQuery, messageSuspended:
		if a.owed == 0 {
			a.done++
		}
	case messageErrorResponse:
		a.copying = false
		a.failed = a.failed || a.owed == 0
	case messageCopyIn, messageCopyBoth:
		a.copying = true
		if !a.simple {
			a.owed = 0 // the Sync behind its Execute is ignored too
		}
	}
}

// settled reports whether PostgreSQL has answered all that was sent, or hung up.
func (a *answers) settled() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.over || a.owed == 0 && (a.failed || a.done >= a.executes)
}

func (a *answers) backendPID() uint32 {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.pid
}
