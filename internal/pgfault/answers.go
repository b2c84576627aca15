package pgfault

import (
	"encoding/binary"
	"sync"
)

// The messages of PostgreSQL that the proxy reads.
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

// answers counts the replies that PostgreSQL still owes. The goroutine of each direction reports
// the messages that pass.
type answers struct {
	mu      sync.Mutex
	changed chan struct{} // holds a token after a change; one goroutine waits

	owed     int  // ReadyForQuery messages
	executes int  // Execute messages since the last Sync
	done     int  // those of them that were answered
	failed   bool // one of them failed: the rest is skipped
	simple   bool // the last message that a ReadyForQuery will answer was a simple Query
	copying  bool // a COPY from the client is under way
	over     bool // PostgreSQL has hung up
	pid      uint32

	// The message that is passing. Only the server's goroutine uses these fields.
	header [headerBytes + 4]byte // with the process id of a BackendKeyData
	have   int                   // bytes of header that have come
	skip   int                   // bytes of its body that are still to come
}

func newAnswers() *answers { return &answers{changed: make(chan struct{}, 1)} }

// sent records a flush, or the part of it before the COMMIT. Call it before those bytes are
// written.
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

// received records everything that comes back.
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
		// PostgreSQL sends no length under 4; such a message counts as empty.
		a.skip = max(int(binary.BigEndian.Uint32(a.header[1:]))-4-(want-headerBytes), 0)
		a.have = 0
		a.message()
	}
	a.signal()
}

// hungUp records that PostgreSQL will answer nothing more.
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
			a.owed = 0 // the Sync after its Execute is ignored too
		}
	}
}

// settled reports whether PostgreSQL has answered everything that was sent, or hung up.
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
