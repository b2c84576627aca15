package idempotency

import (
	"errors"
	"fmt"
	"maps"
	"testing"
)

func TestDecideEveryRow(t *testing.T) {
	t.Parallel()
	rows := map[fact]decision{
		factClaimed:            {action: actionRun},
		factRunsHere:           {actionRefuse, OutcomeInProgress, ReasonInProgress},
		factInProgress:         {actionRefuse, OutcomeInProgress, ReasonInProgress},
		factAwaited:            {action: actionWait},
		factTurn:               {action: actionClaim},
		factRecordedSame:       {action: actionReplay, outcome: OutcomeReplayed},
		factRecordedOther:      {actionRefuse, OutcomeMismatch, ReasonKeyReused},
		factRecordedUnreadable: {actionRefuse, OutcomeUnknown, ReasonOutcomeUnknown},
		factUnavailable:        {actionRefuse, OutcomeNotExecuted, ReasonUnavailable},
		factSerialization:      {action: actionRestart},
		factRestartsSpent:      {actionRefuse, OutcomeNotExecuted, ReasonUnavailable},
		factRecordUnread:       {actionRefuse, OutcomeUnknown, ReasonOutcomeUnknown},
		factAnsweredCommit:     {action: actionCommit},
		factAnsweredDecline:    {action: actionDecline},
		factAnsweredForget:     {action: actionForget},
		factRefused:            {actionRefuse, OutcomeNotExecuted, reasonOfRefusal},
		factHandlerFailed:      {actionRefuse, OutcomeNotExecuted, ReasonHandlerFailed},
		factTransactionLost:    {actionRefuse, OutcomeUnknown, ReasonTransactionLost},
		factCommitted:          {action: actionAnswer, outcome: OutcomeExecuted},
		factDeclined:           {action: actionAnswer, outcome: OutcomeExecuted},
		factForgotten:          {action: actionAnswer, outcome: OutcomeNotExecuted},
		factKeyRecorded:        {action: actionRestart},
		factCommitAborted:      {actionRefuse, OutcomeNotExecuted, ReasonHandlerFailed},
		factDeclineFailed:      {actionRefuse, OutcomeNotExecuted, ReasonUnavailable},
		factRecordCorrupt:      {actionRefuse, OutcomeUnknown, ReasonRecordCorrupt},
		factCommitUnknown:      {action: actionResolve},
		factResolvedOurs:       {action: actionAnswer, outcome: OutcomeExecuted},
		factResolvedAbsent:     {actionRefuse, OutcomeNotExecuted, ReasonUnavailable},
		factCallForgotten:      {action: actionAnswer, outcome: OutcomeUnknown},
		factCallUnknown:        {actionRefuse, OutcomeUnknown, ReasonCallUnknown},
		factOpen:               {actionTakeOver, OutcomeUnknown, ReasonOutcomeUnknown},
		factTakenOver:          {action: actionRun},
		factBackingOff:         {actionRefuse, OutcomeUnknown, ReasonOutcomeUnknown},
		factParked:             {actionRefuse, OutcomeUnknown, ReasonNeedsAttention},
		factUnsettled:          {actionLeave, OutcomeUnknown, ReasonOutcomeUnknown},
		factContradiction:      {actionPark, OutcomeUnknown, ReasonNeedsAttention},
		factFenced:             {actionRefuse, OutcomeInProgress, ReasonInProgress},
		factOutcomeUnknown:     {actionRefuse, OutcomeUnknown, ReasonOutcomeUnknown},
	}
	unknown := rows[factOutcomeUnknown]
	for f := range fact(255) {
		want, ok := rows[f]
		if known := f >= factRunsHere && f <= factOutcomeUnknown; ok != known {
			t.Errorf("fact %d is in the test: %v, in the table: %v", f, ok, known)
		}
		if !ok {
			want = unknown
		}
		if got := decide(f); got != want {
			t.Errorf("fact %d: %+v, want %+v", f, got, want)
		}
	}
}

// A decision either continues, or answers, or names the reason for not answering. The actions on an
// open request may end in a refusal, so they name its reason too.
func TestDecisionsAreWhole(t *testing.T) {
	t.Parallel()
	for f := range fact(255) {
		d := decide(f)
		refuses := d.action == actionRefuse || d.action == actionTakeOver || d.action == actionLeave || d.action == actionPark
		ends := d.action == actionAnswer || d.action == actionReplay || refuses
		if ends != (d.outcome != "") || refuses != (d.reason != "") {
			t.Errorf("fact %d: %+v", f, d)
		}
	}
}

// After a call of DerivedKey no end without a record reports not-executed, or suggests a new key.
// After an attempt saw another one's record, no end reports not-executed without a look-up. All
// other facts stay as they are.
func TestFactOfEnd(t *testing.T) {
	t.Parallel()
	recorded := map[fact]fact{
		factUnavailable: factRecordUnread, factRestartsSpent: factRecordUnread, factDeclineFailed: factRecordUnread,
		factResolvedAbsent: factRecordUnread, factRefused: factRecordUnread,
	}
	derived := map[fact]fact{
		factForgotten: factCallForgotten,

		factUnavailable: factCallUnknown, factRestartsSpent: factCallUnknown, factHandlerFailed: factCallUnknown,
		factCommitAborted: factCallUnknown, factDeclineFailed: factCallUnknown, factResolvedAbsent: factCallUnknown,
		factRecordedOther: factCallUnknown, factRefused: factCallUnknown,
	}
	both := maps.Clone(derived)
	maps.Copy(both, recorded)
	for f := range fact(255) {
		for _, test := range []struct {
			recorded, derived bool
			want              map[fact]fact
		}{{false, false, nil}, {true, false, recorded}, {false, true, derived}, {true, true, both}} {
			want, ok := test.want[f]
			if !ok {
				want = f
			}
			got := factOfEnd(f, test.recorded, test.derived)
			if got != want {
				t.Errorf("fact %d, recorded %v, derived %v: %d, want %d", f, test.recorded, test.derived, got, want)
			}
			decision := decide(got)
			if test.derived && (decision.outcome == OutcomeNotExecuted || decision.outcome == OutcomeMismatch) || decision.action != decide(f).action {
				t.Errorf("fact %d, recorded %v, derived %v: %+v, alone %+v", f, test.recorded, test.derived, decision, decide(f))
			}
		}
	}
}

// Waiting requests run after every result that left their key free, and after no other.
func TestPassesTurn(t *testing.T) {
	t.Parallel()
	answer := &Answer{Status: 504}
	for name, test := range map[string]struct {
		result Result
		want   bool
	}{
		"a record":                      {Result{Outcome: OutcomeReplayed, Record: &Record{}}, false},
		"executed":                      {Result{Outcome: OutcomeExecuted, Answer: answer}, true},
		"not executed":                  {Result{Outcome: OutcomeNotExecuted, Reason: ReasonUnavailable}, true},
		"in progress":                   {Result{Outcome: OutcomeInProgress, Reason: ReasonInProgress}, true},
		"unknown":                       {refuse(decide(factOutcomeUnknown), nil), false},
		"transaction lost":              {refuse(decide(factTransactionLost), nil), false},
		"corrupt":                       {refuse(decide(factRecordCorrupt), nil), false},
		"answered after a derived key":  {Result{Outcome: decide(factCallForgotten).outcome, Answer: answer}, true},
		"otherwise after a derived key": {refuse(decide(factCallUnknown), nil), true},
	} {
		if got := passesTurn(&test.result); got != test.want {
			t.Errorf("%s: %v, want %v", name, got, test.want)
		}
	}
}

func TestDefaultDisposition(t *testing.T) {
	t.Parallel()
	forget := map[int]bool{401: true, 403: true, 407: true, 408: true, 421: true, 425: true, 429: true, 499: true}
	for status := range 1000 {
		want := DispositionForget
		switch {
		case forget[status]:
		case status >= 200 && status <= 399:
			want = DispositionCommit
		case status >= 400 && status <= 499:
			want = DispositionDecline
		}
		if got := DefaultDisposition(Answer{Status: status}); got != want {
			t.Errorf("%d: %d, want %d", status, got, want)
		}
	}
	if Disposition(0) != DispositionForget {
		t.Error("a policy that forgets to decide must forget the attempt")
	}
}

var errOther = errors.New("an error nobody knows")

// sentinels are all errors of the contract, and one that is not.
var sentinels = []error{
	nil, ErrInProgress, ErrUnavailable, ErrNotSerializable, ErrAborted, ErrKeyRecorded, ErrTransactionLost, ErrUnknown,
	ErrRecordCorrupt, errOther,
}

func wrap(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("step: %w: detail", err)
}

// checkFacts calls f with each error of the contract, wrapped, and compares. Errors that are not in
// want must give other.
func checkFacts(t *testing.T, f func(error) fact, want map[error]fact, other fact) {
	t.Helper()
	for _, err := range sentinels {
		fact, ok := want[err]
		if !ok {
			fact = other
		}
		if got := f(wrap(err)); got != fact {
			t.Errorf("%v: fact %d, want %d", err, got, fact)
		}
	}
}

func TestFactAfterClaim(t *testing.T) {
	t.Parallel()
	checkFacts(t, func(err error) fact { return factAfterClaim(&Request{}, nil, err) }, map[error]fact{
		nil: factClaimed, ErrInProgress: factInProgress, ErrNotSerializable: factSerialization, ErrUnknown: factRecordedUnreadable,
		ErrRecordCorrupt: factRecordCorrupt,
	}, factUnavailable)
}

func TestFactAfterClaimComparesFingerprints(t *testing.T) {
	t.Parallel()
	one, two := NewFingerprintV1("POST", "/1", "", "", nil), NewFingerprintV1("POST", "/2", "", "", nil)
	of := func(version int16) Fingerprint { return NewFingerprint(version, []byte("request")) }
	knows := func(versions ...int16) func(int16) (Fingerprint, bool) {
		return func(version int16) (Fingerprint, bool) {
			for _, v := range versions {
				if v == version {
					return of(v), true
				}
			}
			return of(version), false // the value that comes with false is ignored
		}
	}
	otherVersion := one
	otherVersion.Version = 100
	lastBit := one
	lastBit.Sum[31] ^= 1
	for name, test := range map[string]struct {
		ours     Fingerprint
		at       func(int16) (Fingerprint, bool)
		recorded Fingerprint
		want     fact
	}{
		"same":                                  {one, nil, one, factRecordedSame},
		"other":                                 {one, nil, two, factRecordedOther},
		"other by one bit":                      {one, nil, lastBit, factRecordedOther},
		"same version asks nobody":              {one, func(int16) (Fingerprint, bool) { panic("asked") }, one, factRecordedSame},
		"other version, none known":             {one, nil, otherVersion, factRecordedUnreadable},
		"other version, not known":              {one, knows(101), of(100), factRecordedUnreadable},
		"other version, known and same":         {one, knows(100, 101), of(101), factRecordedSame},
		"other version, known and different":    {one, knows(100), NewFingerprint(100, []byte("another")), factRecordedOther},
		"other version, answered with our own":  {one, func(int16) (Fingerprint, bool) { return one, true }, otherVersion, factRecordedOther},
		"other version, answered with no print": {one, func(int16) (Fingerprint, bool) { return Fingerprint{}, true }, otherVersion, factRecordedOther},
	} {
		req := &Request{Fingerprint: test.ours, FingerprintAt: test.at}
		if got := factAfterClaim(req, &Record{Fingerprint: test.recorded}, nil); got != test.want {
			t.Errorf("%s: fact %d, want %d", name, got, test.want)
		}
	}
}

func TestFactOfWait(t *testing.T) {
	t.Parallel()
	if factOfWait(true) != factAwaited || factOfWait(false) != factInProgress {
		t.Errorf("facts %d and %d", factOfWait(true), factOfWait(false))
	}
}

// The end of a leader gives its followers one of three facts: a record, which each compares with
// its own request; an unknown outcome; or a turn for one of them.
func TestFactOfLeader(t *testing.T) {
	t.Parallel()
	print, other := NewFingerprintV1("POST", "/1", "", "", nil), NewFingerprintV1("POST", "/2", "", "", nil)
	req := &Request{Fingerprint: print}
	of := func(f Fingerprint) *Result { return &Result{Outcome: OutcomeReplayed, Record: &Record{Fingerprint: f}} }
	unknown := refuse(decide(factCommitUnknown), errOther)
	for name, test := range map[string]struct {
		told *Result
		want fact
	}{
		"nothing":                      {nil, factTurn},
		"a record of this request":     {of(print), factRecordedSame},
		"a record of another request":  {of(other), factRecordedOther},
		"a record of another version":  {of(NewFingerprint(100, nil)), factRecordedUnreadable},
		"that it is unknown":           {&unknown, factOutcomeUnknown},
		"something nobody should tell": {&Result{Outcome: OutcomeNotExecuted}, factOutcomeUnknown},
		"an answer without a record":   {&Result{Outcome: OutcomeExecuted, Answer: &Answer{Status: 201}}, factOutcomeUnknown},
	} {
		if got := factOfLeader(req, test.told); got != test.want {
			t.Errorf("%s: fact %d, want %d", name, got, test.want)
		}
	}
}

func TestFactAfterHandler(t *testing.T) {
	t.Parallel()
	panicked := &PanicError{Value: "value"}
	type row struct {
		failed      error
		disposition Disposition
		want        map[error]fact // by the error of Seal
		other       fact
	}
	first := map[error]fact{
		ErrTransactionLost: factTransactionLost, ErrNotSerializable: factSerialization, ErrUnavailable: factUnavailable,
	}
	with := func(err error, f fact) map[error]fact {
		all := map[error]fact{err: f}
		for err, f := range first {
			all[err] = f
		}
		return all
	}
	for name, row := range map[string]row{
		"commit":                    {nil, DispositionCommit, with(nil, factAnsweredCommit), factHandlerFailed},
		"decline":                   {nil, DispositionDecline, first, factAnsweredDecline},
		"forget":                    {nil, DispositionForget, first, factAnsweredForget},
		"no disposition we know":    {nil, Disposition(9), first, factAnsweredForget},
		"failed":                    {errOther, DispositionForget, first, factHandlerFailed},
		"panicked":                  {panicked, DispositionForget, first, factHandlerFailed},
		"took longer":               {wrap(errHandlerTimeout), DispositionForget, map[error]fact{ErrTransactionLost: factTransactionLost, ErrNotSerializable: factSerialization}, factUnavailable},
		"refused":                   {&Refusal{Reason: ReasonQuotaExceeded}, DispositionForget, first, factRefused},
		"refused without a reason":  {&Refusal{}, DispositionForget, first, factHandlerFailed},
		"panicked with a refusal":   {&PanicError{Value: &Refusal{Reason: ReasonQuotaExceeded}}, DispositionForget, first, factHandlerFailed},
		"failed, unavailable":       {wrap(ErrUnavailable), DispositionForget, first, factHandlerFailed},
		"failed with a serializing": {wrap(ErrNotSerializable), DispositionForget, first, factHandlerFailed},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			checkFacts(t, func(sealed error) fact { return factAfterHandler(sealed, row.failed, row.disposition) }, row.want, row.other)
		})
	}
}

func TestFactAfterCommit(t *testing.T) {
	t.Parallel()
	for keyless, unknown := range map[bool]fact{false: factCommitUnknown, true: factOutcomeUnknown} {
		checkFacts(t, func(err error) fact { return factAfterCommit(keyless, err) }, map[error]fact{
			nil: factCommitted, ErrTransactionLost: factTransactionLost, ErrKeyRecorded: factKeyRecorded,
			ErrNotSerializable: factSerialization, ErrUnavailable: factUnavailable, ErrAborted: factCommitAborted,
		}, unknown)
		// A request that may have been executed is never reported as not executed.
		for _, err := range sentinels {
			if err == nil {
				continue
			}
			if got := factAfterCommit(keyless, errors.Join(err, ErrUnknown)); got != unknown {
				t.Errorf("%v together with ErrUnknown: fact %d, want %d", err, got, unknown)
			}
		}
	}
}

func TestFactAfterDecline(t *testing.T) {
	t.Parallel()
	checkFacts(t, factAfterDecline, map[error]fact{
		nil: factDeclined, ErrTransactionLost: factTransactionLost, ErrKeyRecorded: factKeyRecorded,
		ErrNotSerializable: factDeclineFailed, ErrUnavailable: factDeclineFailed, ErrAborted: factDeclineFailed,
	}, factCommitUnknown)
}

// A record is this attempt's only if it has the attempt's id. Any other record is compared, as on
// every path.
func TestFactAfterResolve(t *testing.T) {
	t.Parallel()
	print, other := NewFingerprintV1("POST", "/1", "", "", nil), NewFingerprintV1("POST", "/2", "", "", nil)
	req := &ongoing{Request: Request{Key: Key{Scope: "acme", Value: "k"}, Fingerprint: print}, claim: Claim{Attempt: NewAttemptID()}}
	checkFacts(t, func(err error) fact { return factAfterResolve(req, DispositionCommit, nil, err) }, map[error]fact{
		nil: factResolvedAbsent, ErrRecordCorrupt: factRecordCorrupt,
	}, factOutcomeUnknown)
	// The record of a decline may come after the look-up.
	checkFacts(t, func(err error) fact { return factAfterResolve(req, DispositionDecline, nil, err) }, map[error]fact{
		ErrRecordCorrupt: factRecordCorrupt,
	}, factOutcomeUnknown)
	for name, test := range map[string]struct {
		record Record
		want   fact
	}{
		"ours":                              {Record{Attempt: req.claim.Attempt, Fingerprint: print}, factResolvedOurs},
		"another's, of the same request":    {Record{Attempt: NewAttemptID(), Fingerprint: print}, factRecordedSame},
		"another's, of a different request": {Record{Attempt: NewAttemptID(), Fingerprint: other}, factRecordedOther},
		"another's, of another version":     {Record{Attempt: NewAttemptID(), Fingerprint: NewFingerprint(100, nil)}, factRecordedUnreadable},
	} {
		for _, disposition := range []Disposition{DispositionCommit, DispositionDecline} {
			if got := factAfterResolve(req, disposition, &test.record, nil); got != test.want {
				t.Errorf("%s: fact %d, want %d", name, got, test.want)
			}
		}
		if got := factAfterResolve(req, DispositionCommit, &test.record, ErrUnknown); got != factOutcomeUnknown {
			t.Errorf("%s, with an error: fact %d, want %d", name, got, factOutcomeUnknown)
		}
	}
}

// A rollback may find another attempt's record, or that the transaction is no longer ours. After a
// lost transaction the request is never started again: its committed writes would be made twice.
func TestFactAfterRollback(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		fact fact
		err  error
		want fact
	}{
		{factForgotten, nil, factForgotten},
		{factHandlerFailed, nil, factHandlerFailed},
		{factSerialization, nil, factSerialization},
		{factForgotten, ErrTransactionLost, factTransactionLost},
		{factSerialization, ErrTransactionLost, factTransactionLost},
		{factForgotten, ErrKeyRecorded, factKeyRecorded},
		{factHandlerFailed, ErrUnknown, factOutcomeUnknown},
		{factTransactionLost, nil, factTransactionLost},
		{factTransactionLost, ErrKeyRecorded, factTransactionLost},
		{factTransactionLost, ErrUnknown, factTransactionLost},
	} {
		if got := factAfterRollback(test.fact, test.err); got != test.want {
			t.Errorf("fact %d, %v: %d, want %d", test.fact, test.err, got, test.want)
		}
	}
}
