package idempotency

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Request is a caller's request to an [Engine].
type Request struct {
	// Key names the request. If its Value is empty the request is keyless: the handler gets a
	// transaction, and nothing is locked, looked up or recorded.
	Key Key

	// Fingerprint is compared with the record's on every path that answers. It is required for a
	// request with a key.
	Fingerprint Fingerprint

	// FingerprintAt returns the fingerprint of this request by another version of the function, for
	// a record that another version of the program made. It reports false for a version that it
	// does not know. If it is nil, only the version of Fingerprint is known.
	FingerprintAt func(version int16) (Fingerprint, bool)

	// TTL is the time that the record counts, from its commit on, by the store's clock. At least 1
	// second ([TTLMin]). Defaults to the TTL in [Options].
	TTL time.Duration

	// TraceID is recorded, so that a replay can be linked to the trace of the attempt that was
	// executed. May be empty. It is left out unless it is 1 to 255 ([TraceIDBytesMax]) visible
	// ASCII characters.
	TraceID string

	// Resumable is the name of a handler that may call other services (package effect), with a
	// version, such as "topup/1". An open request runs again on the handler with this name, in any
	// process that has it. 1 to 100 visible ASCII characters ([ResumableBytesMax]). Empty, the
	// default, means that the handler makes no such calls. It needs a key and a [Keeper].
	Resumable string

	// Stored returns the request as it is kept for later runs: the function of [Engine.Resumable] gets
	// it. Required if Resumable is set.
	Stored func() []byte

	// ClaimFirst makes a resumable request claim its key before its handler runs, which costs a round
	// trip. Otherwise the claim travels with the handler's first use of its transaction or its first
	// call, and the handler may run up to there even if the answer is recorded already. A request that
	// has waited ([Options.Wait]) always claims first.
	ClaimFirst bool

	// Route is the request's route, such as "POST /transfers". Only the [Tracer] gets it. It must
	// come from a small set, never from the path. May be empty.
	Route string

	resumed bool // by Engine.Resume
}

// Claim is one attempt's claim on a key. The [Store] notes in it the time of the claim, in case the
// reply to COMMIT is lost.
type Claim struct {
	// Set by the engine for each attempt.
	Key         Key // Value is empty for a keyless request
	Fingerprint Fingerprint
	TTL         time.Duration // in force, at least TTLMin
	TraceID     string        // may be empty
	Attempt     AttemptID
	Resumable   string        // empty unless the request may become open
	Stored      func() []byte // of the request

	// Set by Begin, by the store's own clock and log, for Resolve.
	At       time.Time // zero if nothing was claimed
	Timeline uint32    // of the log; 0 if the store has none, or does not report it
	Position uint64    // in the log
}

// Keyless reports whether the request came without a key: nothing is locked, looked up or recorded.
func (c *Claim) Keyless() bool { return c.Key.Value == "" }

// Answer is the handler's answer. A replay repeats it byte by byte.
type Answer struct {
	Status int
	// Header holds the headers to record. Values are lists and are never joined.
	Header map[string][]string
	Body   []byte
}

// Limits of a record.
const (
	StatusMin       = 200
	StatusMax       = 599
	HeaderBytesMax  = 64 << 10 // names and values of all headers
	TraceIDBytesMax = 255

	ResumableBytesMax = 100
)

// Validate reports whether the answer can be recorded and replayed: a status from [StatusMin] to
// [StatusMax], and headers of at most [HeaderBytesMax] whose names and values are those of RFC
// 9110, section 5, so that none can end a line early. The error quotes nothing.
func (r *Answer) Validate() error {
	if r.Status < StatusMin || r.Status > StatusMax {
		return fmt.Errorf("answer can't be recorded: its status is not from %d to %d", StatusMin, StatusMax)
	}
	size := 0
	for name, values := range r.Header {
		if !validHeaderName(name) {
			return errors.New("answer can't be recorded: a header's name is not a token")
		}
		for _, value := range values {
			if !validHeaderValue(value) {
				return errors.New("answer can't be recorded: a header's value has a control character")
			}
			size += len(name) + len(value)
		}
	}
	if size > HeaderBytesMax {
		return fmt.Errorf("answer can't be recorded: its headers have %d bytes, over the limit of %d", size, HeaderBytesMax)
	}
	return nil
}

func validHeaderName(s string) bool {
	for i := range len(s) {
		c := s[i]
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', strings.IndexByte("!#$%&'*+-.^_`|~", c) >= 0:
		default:
			return false
		}
	}
	return s != ""
}

func validHeaderValue(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

// Record is an executed attempt, as the store keeps it.
type Record struct {
	Fingerprint Fingerprint
	Attempt     AttemptID
	Answer      Answer
	TraceID     string
	// CreatedAt is the start of the transaction that recorded the answer, by the store's clock.
	CreatedAt time.Time
	// ExpiresAt is the TTL after the commit, by the store's clock. The record counts until it is
	// deleted, not until then.
	ExpiresAt time.Time
	Open      bool // the request is open: there is no answer yet
}

// The errors of a [Store] and an [Attempt]. Any other error counts as ErrUnavailable from Begin, as
// ErrAborted from Seal, and as ErrUnknown from Commit, Decline and Resolve.
var (
	// ErrInProgress: another attempt holds the key.
	ErrInProgress = errors.New("key is in progress")
	// ErrUnavailable: there is no connection, or the database failed; nothing was executed.
	ErrUnavailable = errors.New("store is unavailable")
	// ErrNotSerializable: the transaction must be started again (SQLSTATE 40001, 40P01, a stale
	// plan); nothing was executed.
	ErrNotSerializable = errors.New("transaction must be started again")
	// ErrAborted: the transaction can't commit; nothing was executed.
	ErrAborted = errors.New("transaction is aborted")
	// ErrKeyRecorded: another attempt recorded the key first; nothing of this one remains.
	ErrKeyRecorded = errors.New("key was recorded by another attempt")
	// ErrTransactionLost: the handler ended the transaction behind the store's back. Its writes
	// until then may stand.
	ErrTransactionLost = errors.New("transaction was ended by the handler")
	// ErrUnknown: COMMIT was sent, and it is not known whether it happened.
	// From Begin: there is a record that can't be read or is not safe yet, or one may be hidden
	// from this store.
	ErrUnknown = errors.New("outcome is unknown")
	// ErrRecordCorrupt: there is a record, and somebody changed it, or an encryption key has
	// another secret here.
	ErrRecordCorrupt = errors.New("record is corrupt")
)

// Store keeps records and runs attempts in transactions. Implementations are safe for concurrent
// use. The suite in storage/storagetest checks that they keep this contract.
type Store interface {
	// Begin opens a transaction, claims the key and looks its record up. Exactly one of the three
	// results is set:
	//
	//   - an Attempt: the key is absent and ours; the caller must end it with Commit, Decline or
	//     Rollback
	//   - a Record: the key is recorded; no transaction is left open, and no fingerprint was compared
	//   - an error: ErrInProgress if another attempt holds the key, ErrNotSerializable if Begin
	//     should be called again (with ErrKeyRecorded if a record was seen), ErrUnknown if there is a
	//     record that can't be read or is not safe yet, or if one may be hidden, ErrRecordCorrupt if
	//     it was tampered with, and anything else if the store is unavailable; nothing is left open
	//
	// A record wins over the claim: it is returned even while others hold the key. Begin never
	// waits for another attempt. ctx bounds only Begin. For a keyless claim Begin returns an
	// Attempt that records nothing. Begin sets the claim's At, Timeline and Position. The engine
	// changes nothing of the claim until the attempt has ended.
	Begin(ctx context.Context, claim *Claim) (Attempt, *Record, error)

	// Resolve finds the record of an attempt that got ErrUnknown from Commit or Decline, or of any
	// other attempt with this key. It blocks until nobody holds the key, and returns the key's
	// record, or nil if there is none. After a Commit nil is proof that nothing was recorded; after
	// a Decline it is not, because the record may still appear. If the store can't vouch for nil,
	// it returns ErrUnknown: if a record may be hidden from it, if its database may be behind the
	// one of the claim, or if half of the TTL has passed since the claim by its own clock,
	// because the record may have expired. No fingerprint was compared. The error is ErrUnknown if
	// the result can't be found before ctx ends, and ErrRecordCorrupt if the record was tampered
	// with. It changes nothing and may be called again. The claim has a key.
	Resolve(ctx context.Context, claim *Claim) (*Record, error)
}

// Attempt is one run of a handler inside an open transaction. It is used by one goroutine, and
// ended exactly once: after Commit, Decline or Rollback has returned, with or without an error, it
// holds nothing, and no method may be called.
type Attempt interface {
	// Context returns ctx carrying the transaction for the handler.
	Context(ctx context.Context) context.Context

	// Seal takes the transaction away from the handler and reports its state: nil if it can commit,
	// else ErrNotSerializable, ErrUnavailable, ErrTransactionLost or ErrAborted. From now on every
	// handle that the handler still holds returns errors. Seal sends nothing.
	Seal() error

	// Lost reports whether the transaction may have ended by itself, because its connection was
	// closed from the other side, for example. It sends nothing and does not wait. It may report true
	// although all is well, and it reports false if it can't know. Unlike the other methods it may be
	// called at any time, from any goroutine, even after the end.
	Lost() bool

	// Commit records the answer and commits it with the handler's writes. Nil means that it is
	// durable. Errors: ErrKeyRecorded, ErrNotSerializable, ErrUnavailable, ErrAborted,
	// ErrTransactionLost; anything else is ErrUnknown. ctx is never the request's.
	Commit(ctx context.Context, answer *Answer) error

	// Decline undoes the handler's writes, records the answer and commits it. It works on an
	// aborted transaction too. It returns the errors of Commit; if the claim is lost between the
	// undo and the record, that is ErrKeyRecorded or ErrUnknown. For a keyless attempt it is
	// Rollback.
	Decline(ctx context.Context, answer *Answer) error

	// Rollback undoes everything and forgets the attempt. If its own message is lost, the
	// transaction still ends, together with its connection; that is no error. Errors:
	// ErrTransactionLost, ErrKeyRecorded if another attempt recorded the key unseen by the claim,
	// and ErrUnknown if the store could not find that out.
	Rollback(ctx context.Context) error
}
