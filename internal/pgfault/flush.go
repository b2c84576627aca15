package pgfault

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
)

// The messages of a client that the proxy reads.
const (
	messageBind         = 'B'
	messageClose        = 'C'
	messageDescribe     = 'D'
	messageExecute      = 'E'
	messageFunctionCall = 'F'
	messageFlush        = 'H'
	messageParse        = 'P'
	messageQuery        = 'Q'
	messageSync         = 'S'
	messageTerminate    = 'X'
	messageCopyDone     = 'c'
	messageCopyData     = 'd'
	messageCopyFail     = 'f'
)

const (
	headerBytes     = 5       // type and length
	messageBytesMax = 1 << 30 // PostgreSQL refuses longer ones
	bufferBytes     = 16 << 10

	// flushBytesMax is the maximum size of a flush that is kept together. The rest of a longer one
	// is forwarded in parts.
	flushBytesMax = 8 << 20
)

var errMalformed = errors.New("message is malformed")

// frame returns the type and the size, header included, of the message at the start of buf. The
// size is 0 if the header is incomplete.
func frame(buf []byte) (kind byte, size int, err error) {
	if len(buf) < headerBytes {
		return 0, 0, nil
	}
	length := binary.BigEndian.Uint32(buf[1:headerBytes])
	if length < 4 || length > messageBytesMax {
		return 0, 0, errMalformed
	}
	return buf[0], int(length) + 1, nil
}

// flush is a part of the client's data that is forwarded at once: the messages up to one that the
// server answers immediately.
type flush struct {
	raw []byte // valid until the next read
	// The offset in raw at which the messages of its COMMIT begin; -1 if there is none.
	commit int

	// messages is a copy of all messages since the last Sync, if there is a COMMIT.
	messages []byte

	ends     bool // a ReadyForQuery answers the last message
	simple   bool // the last message is also a simple Query
	copyEnds bool // the last message ends a COPY
	leaves   bool // the last message is the client's Terminate

	executes     int // Execute messages since the last Sync
	beforeCommit int // Execute messages before the COMMIT
}

// splitter cuts the client's data into flushes.
type splitter struct {
	buf   []byte
	start int // offset in buf: everything before it was handed out

	// The current flush. Offsets count from start.
	at int // the end of its last complete message
	// If the next Execute is a COMMIT, its own messages begin at this offset. -1 if there are none
	// yet.
	own     int
	copying bool
	current flush

	// The messages handed out since the last Sync, up to flushBytesMax, without COPY data.
	history []byte

	statements names // prepared statements that are a COMMIT
	portals    names // portals bound to one of them
}

func newSplitter() *splitter {
	return &splitter{own: -1, current: flush{commit: -1}, buf: make([]byte, 0, bufferBytes)}
}

// names is a set. The empty name is that of the unnamed statement or portal.
type names map[string]struct{}

func (n *names) set(name []byte, in bool) {
	switch {
	case in && *n == nil:
		*n = names{string(name): {}}
	case in:
		(*n)[string(name)] = struct{}{}
	default:
		delete(*n, string(name))
	}
}

func (n names) has(name []byte) bool {
	_, ok := n[string(name)]
	return ok
}

// read reads once. It invalidates everything that was handed out.
func (s *splitter) read(r io.Reader) error {
	if s.start > 0 {
		s.buf = s.buf[:copy(s.buf, s.buf[s.start:])]
		s.start = 0
	}
	if cap(s.buf)-len(s.buf) < bufferBytes/4 {
		// Grow only as data comes, whatever a length claims.
		grown := make([]byte, len(s.buf), 2*cap(s.buf))
		copy(grown, s.buf)
		s.buf = grown
	}
	n, err := r.Read(s.buf[len(s.buf):cap(s.buf)])
	s.buf = s.buf[:len(s.buf)+n]
	if n > 0 {
		return nil // the error comes again
	}
	return err
}

// next returns the next complete flush, or false if there is none. If the client has hung up, next
// returns an incomplete flush too, because PostgreSQL executes it as far as it arrived.
func (s *splitter) next(hungUp bool) (flush, bool, error) {
	for {
		message := s.buf[s.start+s.at:]
		kind, size, err := frame(message)
		if err != nil && s.at > 0 {
			return s.handOut(), true, nil // the error comes again
		}
		if err != nil {
			return flush{}, false, err
		}
		if size == 0 || len(message) < size {
			if s.at > 0 && (s.copying || hungUp) {
				return s.handOut(), true, nil
			}
			return flush{}, false, nil
		}
		s.see(kind, message[headerBytes:size])
		s.at += size
		switch kind {
		case messageParse, messageBind, messageDescribe, messageExecute, messageClose:
			if s.at < flushBytesMax {
				continue
			}
		case messageCopyData:
			s.copying = true
			if s.at < flushBytesMax {
				continue // more of them may be there
			}
		}
		return s.handOut(), true, nil
	}
}

// see processes the message at s.at.
func (s *splitter) see(kind byte, body []byte) {
	begin := s.own
	s.own = -1
	switch kind {
	case messageQuery:
		if sql, _ := cut(body); hasCommit(sql) {
			s.found(s.at)
		}
		s.current.ends, s.current.simple = true, true
	case messageSync, messageFunctionCall:
		s.current.ends = true
	case messageCopyDone, messageCopyFail:
		s.current.copyEnds = true
	case messageTerminate:
		s.current.leaves = true
	case messageParse:
		name, rest := cut(body)
		sql, _ := cut(rest)
		commit := hasCommit(sql)
		s.statements.set(name, commit)
		if commit {
			s.own = s.at
		}
	case messageBind:
		portal, rest := cut(body)
		name, _ := cut(rest)
		commit := s.statements.has(name)
		s.portals.set(portal, commit)
		if commit {
			s.own = orElse(begin, s.at)
		}
	case messageDescribe:
		s.own = begin
	case messageExecute:
		if portal, _ := cut(body); s.portals.has(portal) {
			s.found(orElse(begin, s.at))
		}
		s.current.executes++
	case messageClose:
		if len(body) > 0 {
			name, _ := cut(body[1:])
			if body[0] == 'S' {
				s.statements.set(name, false)
			} else {
				s.portals.set(name, false)
			}
		}
	}
}

// cut cuts off a string that ends with a zero byte.
func cut(body []byte) (text, rest []byte) {
	end := bytes.IndexByte(body, 0)
	if end < 0 {
		return body, nil
	}
	return body[:end], body[end+1:]
}

func orElse(offset, other int) int {
	if offset < 0 {
		return other
	}
	return offset
}

// found records the first COMMIT of the flush.
func (s *splitter) found(own int) {
	if s.current.commit < 0 {
		s.current.commit, s.current.beforeCommit = own, s.current.executes
	}
}

func (s *splitter) handOut() flush {
	f := s.current
	f.raw = s.buf[s.start : s.start+s.at]
	if f.commit >= 0 {
		f.messages = append(append(make([]byte, 0, len(s.history)+len(f.raw)), s.history...), f.raw...)
	}
	s.start += s.at
	s.at, s.own, s.current = 0, -1, flush{commit: -1}
	if !f.ends {
		s.current.executes = f.executes
	}
	if f.ends || s.copying || len(s.history)+len(f.raw) > flushBytesMax {
		s.history = s.history[:0]
	} else {
		s.history = append(s.history, f.raw...)
	}
	s.copying = false
	return f
}

// rest returns the remainder of a message when the client has hung up.
func (s *splitter) rest() []byte { return s.buf[s.start+s.at:] }
