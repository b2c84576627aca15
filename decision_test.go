package idempotency

import (
	"errors"
	"fmt"
	"maps"
	"testing"
)

func TestDecideEveryRow(t *testing.T) {
	t.Parallel()
	rows := map[Fact]Decision{
		FactClaimed:            {Action: ActionRun},
		FactInProgress:         {ActionRefuse, OutcomeInProgress, ReasonInProgress},
		FactAwaited:            {Action: ActionWait},
		FactTurn:               {Action: ActionClaim},
		FactRecordedSame:       {Action: ActionReplay, Outcome: OutcomeReplayed},
		FactRecordedOther:      {ActionRefuse, OutcomeMismatch, ReasonKeyReused},
		FactRecordedUnreadable: {ActionRefuse, OutcomeUnknown, ReasonOutcomeUnknown},
		FactUnavailable:        {ActionRefuse, OutcomeNotExecuted, ReasonUnavailable},
		FactSerialization:      {Action: ActionRestart},
		FactRestartsSpent:      {ActionRefuse, OutcomeNotExecuted, ReasonUnavailable},
		FactRecordUnread:       {ActionRefuse, OutcomeUnknown, ReasonOutcomeUnknown},
		FactAnsweredCommit:     {Action: ActionCommit},
		FactAnsweredDecline:    {Action: ActionDecline},
		FactAnsweredForget:     {Action: ActionForget},
		FactHandlerFailed:      {ActionRefuse, OutcomeNotExecuted, ReasonHandlerFailed},
		FactTransactionLost:    {ActionRefuse, OutcomeUnknown, ReasonTransactionLost},
		FactCommitted:          {Action: ActionAnswer, Outcome: OutcomeExecuted},
		FactDeclined:           {Action: ActionAnswer, Outcome: OutcomeExecuted},
		FactForgotten:          {Action: ActionAnswer, Outcome: OutcomeNotExecuted},
		FactKeyRecorded:        {Action: ActionRestart},
		FactCommitAborted:      {ActionRefuse, OutcomeNotExecuted, ReasonHandlerFailed},
		FactDeclineFailed:      {ActionRefuse, OutcomeNotExecuted, ReasonUnavailable},
		FactRecordCorrupt:      {ActionRefuse, OutcomeUnknown, ReasonRecordCorrupt},
		FactCommitUnknown:      {Action: ActionResolve},
		FactResolvedOurs:       {Action: ActionAnswer, Outcome: OutcomeExecuted},
		FactResolvedAbsent:     {ActionRefuse, OutcomeNotExecuted, ReasonUnavailable},
		FactCallForgotten:      {Action: ActionAnswer, Outcome: OutcomeUnknown},
		FactCallUnknown:        {ActionRefuse, OutcomeUnknown, ReasonCallUnknown},
		FactOutcomeUnknown:     {ActionRefuse, OutcomeUnknown, ReasonOutcomeUnknown},
	}
	unknown := rows[FactOutcomeUnknown]
	for fact := range Fact(255) {
		want, ok := rows[fact]
		if known := fact >= FactClaimed && fact <= FactOutcomeUnknown; ok != known {
			t.Errorf("fact %d is in the test: %v, in the table: %v", fact, ok, known)
		}
		if !ok {
			want = unknown
		}
		if got := Decide(fact); got != want {
			t.Errorf("fact %d: %+v, want %+v", fact, got, want)
		}
	}
}

// A decision either goes on, or answers, or says why it does not: never two of them.
func TestDecisionsAreWhole(t *testing.T) {
	t.Parallel()
	for fact := range Fact(255) {
		d := Decide(fact)
		ends := d.Action == ActionAnswer || d.Action == ActionReplay || d.Action == ActionRefuse
		if ends != (d.Outcome != "") || (d.Action == ActionRefuse) != (d.Reason != "") {
			t.Errorf("fact %d: %+v", fact, d)
		}
	}
}

// After a call of DerivedKey no end without a record reports not-executed, or suggests a new key.
// After an attempt saw another one's record, no end reports not-executed without a look-up. All
// other facts stay as they are.
func TestFactOfEnd(t *testing.T) {
	t.Parallel()
	recorded := map[Fact]Fact{
		FactUnavailable: FactRecordUnread, FactRestartsSpent: FactRecordUnread, FactDeclineFailed: FactRecordUnread,
		FactResolvedAbsent: FactRecordUnread,
	}
	derived := map[Fact]Fact{
		FactForgotten: FactCallForgotten,

		FactUnavailable: FactCallUnknown, FactRestartsSpent: FactCallUnknown, FactHandlerFailed: FactCallUnknown,
		FactCommitAborted: FactCallUnknown, FactDeclineFailed: FactCallUnknown, FactResolvedAbsent: FactCallUnknown,
		FactRecordedOther: FactCallUnknown,
	}
	both := maps.Clone(derived)
	maps.Copy(both, recorded)
	for fact := range Fact(255) {
		for _, test := range []struct {
			recorded, derived bool
			want              map[Fact]Fact
		}{{false, false, nil}, {true, false, recorded}, {false, true, derived}, {true, true, both}} {
			want, ok := test.want[fact]
			if !ok {
				want = fact
			}
			got := factOfEnd(fact, test.recorded, test.derived)
			if got != want {
				t.Errorf("fact %d, recorded %v, derived %v: %d, want %d", fact, test.recorded, test.derived, got, want)
			}
			decision := Decide(got)
			if test.derived && (decision.Outcome == OutcomeNotExecuted || decision.Outcome == OutcomeMismatch) || decision.Action != Decide(fact).Action {
				t.Errorf("fact %d, recorded %v, derived %v: %+v, alone %+v", fact, test.recorded, test.derived, decision, Decide(fact))
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
		"unknown":                       {refuse(Decide(FactOutcomeUnknown), nil), false},
		"transaction lost":              {refuse(Decide(FactTransactionLost), nil), false},
		"corrupt":                       {refuse(Decide(FactRecordCorrupt), nil), false},
		"answered after a derived key":  {Result{Outcome: Decide(FactCallForgotten).Outcome, Answer: answer}, true},
		"otherwise after a derived key": {refuse(Decide(FactCallUnknown), nil), true},
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
		want := Forget
		switch {
		case forget[status]:
		case status >= 200 && status <= 399:
			want = Commit
		case status >= 400 && status <= 499:
			want = Decline
		}
		if got := DefaultDisposition(status); got != want {
			t.Errorf("%d: %d, want %d", status, got, want)
		}
	}
	if Disposition(0) != Forget {
		t.Error("a policy that forgets to decide must forget the attempt")
	}
}

var errOther = errors.New("an error nobody knows")

// sentinels are all errors of the contract, and one that is not.
var sentinels = []error{
	nil, ErrInProgress, ErrUnavailable, ErrSerialization, ErrAborted, ErrKeyRecorded, ErrTransactionLost, ErrUnknown,
	ErrRecordCorrupt, errOther,
}

func wrap(err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("step: %w: detail", err)
}

// checkFacts calls f with each error of the contract, wrapped, and compares. What want leaves out is other.
func checkFacts(t *testing.T, f func(error) Fact, want map[error]Fact, other Fact) {
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
	checkFacts(t, func(err error) Fact { return factAfterClaim(&Request{}, nil, err) }, map[error]Fact{
		nil: FactClaimed, ErrInProgress: FactInProgress, ErrSerialization: FactSerialization, ErrUnknown: FactRecordedUnreadable,
		ErrRecordCorrupt: FactRecordCorrupt,
	}, FactUnavailable)
}

func TestFactAfterClaimComparesFingerprints(t *testing.T) {
	t.Parallel()
	one, two := FingerprintV1("POST", "/1", "", "", nil), FingerprintV1("POST", "/2", "", "", nil)
	of := func(version int16) Fingerprint { return FingerprintOf(version, []byte("request")) }
	knows := func(versions ...int16) func(int16) (Fingerprint, bool) {
		return func(version int16) (Fingerprint, bool) {
			for _, v := range versions {
				if v == version {
					return of(v), true
				}
			}
			return of(version), false // what comes with a false counts for nothing
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
		want     Fact
	}{
		"same":                                  {one, nil, one, FactRecordedSame},
		"other":                                 {one, nil, two, FactRecordedOther},
		"other by one bit":                      {one, nil, lastBit, FactRecordedOther},
		"same version asks nobody":              {one, func(int16) (Fingerprint, bool) { panic("asked") }, one, FactRecordedSame},
		"other version, none known":             {one, nil, otherVersion, FactRecordedUnreadable},
		"other version, not known":              {one, knows(101), of(100), FactRecordedUnreadable},
		"other version, known and same":         {one, knows(100, 101), of(101), FactRecordedSame},
		"other version, known and different":    {one, knows(100), FingerprintOf(100, []byte("another")), FactRecordedOther},
		"other version, answered with our own":  {one, func(int16) (Fingerprint, bool) { return one, true }, otherVersion, FactRecordedOther},
		"other version, answered with no print": {one, func(int16) (Fingerprint, bool) { return Fingerprint{}, true }, otherVersion, FactRecordedOther},
	} {
		req := &Request{Fingerprint: test.ours, FingerprintAt: test.at}
		if got := factAfterClaim(req, &Record{Fingerprint: test.recorded}, nil); got != test.want {
			t.Errorf("%s: fact %d, want %d", name, got, test.want)
		}
	}
}

func TestFactOfWait(t *testing.T) {
	t.Parallel()
	if factOfWait(true) != FactAwaited || factOfWait(false) != FactInProgress {
		t.Errorf("facts %d and %d", factOfWait(true), factOfWait(false))
	}
}

// What the leader's end says to those behind it: a record, which each compares with its own request, or nothing that
// anybody could run on, or that one of them is to ask.
func TestFactOfLeader(t *testing.T) {
	t.Parallel()
	print, other := FingerprintV1("POST", "/1", "", "", nil), FingerprintV1("POST", "/2", "", "", nil)
	req := &Request{Fingerprint: print}
	of := func(f Fingerprint) *Result { return &Result{Outcome: OutcomeReplayed, Record: &Record{Fingerprint: f}} }
	unknown := refuse(Decide(FactCommitUnknown), errOther)
	for name, test := range map[string]struct {
		told *Result
		want Fact
	}{
		"nothing":                      {nil, FactTurn},
		"a record of this request":     {of(print), FactRecordedSame},
		"a record of another request":  {of(other), FactRecordedOther},
		"a record of another version":  {of(FingerprintOf(100, nil)), FactRecordedUnreadable},
		"that it is unknown":           {&unknown, FactOutcomeUnknown},
		"something nobody should tell": {&Result{Outcome: OutcomeNotExecuted}, FactOutcomeUnknown},
		"an answer without a record":   {&Result{Outcome: OutcomeExecuted, Answer: &Answer{Status: 201}}, FactOutcomeUnknown},
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
		want        map[error]Fact // by what Seal returned
		other       Fact
	}
	first := map[error]Fact{
		ErrTransactionLost: FactTransactionLost, ErrSerialization: FactSerialization, ErrUnavailable: FactUnavailable,
	}
	with := func(err error, fact Fact) map[error]Fact {
		all := map[error]Fact{err: fact}
		for err, fact := range first {
			all[err] = fact
		}
		return all
	}
	for name, row := range map[string]row{
		"commit":                    {nil, Commit, with(nil, FactAnsweredCommit), FactHandlerFailed},
		"decline":                   {nil, Decline, first, FactAnsweredDecline},
		"forget":                    {nil, Forget, first, FactAnsweredForget},
		"no disposition we know":    {nil, Disposition(9), first, FactAnsweredForget},
		"failed":                    {errOther, Forget, first, FactHandlerFailed},
		"panicked":                  {panicked, Forget, first, FactHandlerFailed},
		"could not run":             {wrap(ErrUnavailable), Forget, map[error]Fact{ErrTransactionLost: FactTransactionLost, ErrSerialization: FactSerialization}, FactUnavailable},
		"failed with a serializing": {wrap(ErrSerialization), Forget, first, FactHandlerFailed},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			checkFacts(t, func(sealed error) Fact { return factAfterHandler(sealed, row.failed, row.disposition) }, row.want, row.other)
		})
	}
}

func TestFactAfterCommit(t *testing.T) {
	t.Parallel()
	keyed := &Request{Key: Key{Scope: "acme", Value: "k"}}
	for req, unknown := range map[*Request]Fact{keyed: FactCommitUnknown, {}: FactOutcomeUnknown} {
		checkFacts(t, func(err error) Fact { return factAfterCommit(req, err) }, map[error]Fact{
			nil: FactCommitted, ErrTransactionLost: FactTransactionLost, ErrKeyRecorded: FactKeyRecorded,
			ErrSerialization: FactSerialization, ErrUnavailable: FactUnavailable, ErrAborted: FactCommitAborted,
		}, unknown)
		// What may have been executed is never told otherwise.
		for _, err := range sentinels {
			if err == nil {
				continue
			}
			if got := factAfterCommit(req, errors.Join(err, ErrUnknown)); got != unknown {
				t.Errorf("%v together with ErrUnknown: fact %d, want %d", err, got, unknown)
			}
		}
	}
}

func TestFactAfterDecline(t *testing.T) {
	t.Parallel()
	checkFacts(t, factAfterDecline, map[error]Fact{
		nil: FactDeclined, ErrTransactionLost: FactTransactionLost, ErrKeyRecorded: FactKeyRecorded,
		ErrSerialization: FactDeclineFailed, ErrUnavailable: FactDeclineFailed, ErrAborted: FactDeclineFailed,
	}, FactCommitUnknown)
}

// Only this attempt's own id makes a record its own; any other is compared as on every path.
func TestFactAfterResolve(t *testing.T) {
	t.Parallel()
	print, other := FingerprintV1("POST", "/1", "", "", nil), FingerprintV1("POST", "/2", "", "", nil)
	req := &Request{Key: Key{Scope: "acme", Value: "k"}, Fingerprint: print, Attempt: NewAttemptID()}
	checkFacts(t, func(err error) Fact { return factAfterResolve(req, Commit, nil, err) }, map[error]Fact{
		nil: FactResolvedAbsent, ErrRecordCorrupt: FactRecordCorrupt,
	}, FactOutcomeUnknown)
	// A decline's record may come after the look.
	checkFacts(t, func(err error) Fact { return factAfterResolve(req, Decline, nil, err) }, map[error]Fact{
		ErrRecordCorrupt: FactRecordCorrupt,
	}, FactOutcomeUnknown)
	for name, test := range map[string]struct {
		record Record
		want   Fact
	}{
		"ours":                              {Record{Attempt: req.Attempt, Fingerprint: print}, FactResolvedOurs},
		"another's, of the same request":    {Record{Attempt: NewAttemptID(), Fingerprint: print}, FactRecordedSame},
		"another's, of a different request": {Record{Attempt: NewAttemptID(), Fingerprint: other}, FactRecordedOther},
		"another's, of another version":     {Record{Attempt: NewAttemptID(), Fingerprint: FingerprintOf(100, nil)}, FactRecordedUnreadable},
	} {
		for _, disposition := range []Disposition{Commit, Decline} {
			if got := factAfterResolve(req, disposition, &test.record, nil); got != test.want {
				t.Errorf("%s: fact %d, want %d", name, got, test.want)
			}
		}
		if got := factAfterResolve(req, Commit, &test.record, ErrUnknown); got != FactOutcomeUnknown {
			t.Errorf("%s, with an error: fact %d, want %d", name, got, FactOutcomeUnknown)
		}
	}
}

// A rollback may find more than it was called for: another attempt's record, or that the transaction was not ours any
// more. A lost transaction is never started again for it: what it committed would be paid twice.
func TestFactAfterRollback(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		fact Fact
		err  error
		want Fact
	}{
		{FactForgotten, nil, FactForgotten},
		{FactHandlerFailed, nil, FactHandlerFailed},
		{FactSerialization, nil, FactSerialization},
		{FactForgotten, ErrTransactionLost, FactTransactionLost},
		{FactSerialization, ErrTransactionLost, FactTransactionLost},
		{FactForgotten, ErrKeyRecorded, FactKeyRecorded},
		{FactHandlerFailed, ErrUnknown, FactOutcomeUnknown},
		{FactTransactionLost, nil, FactTransactionLost},
		{FactTransactionLost, ErrKeyRecorded, FactTransactionLost},
		{FactTransactionLost, ErrUnknown, FactTransactionLost},
	} {
		if got := factAfterRollback(test.fact, test.err); got != test.want {
			t.Errorf("fact %d, %v: %d, want %d", test.fact, test.err, got, test.want)
		}
	}
}
