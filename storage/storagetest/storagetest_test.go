package storagetest

import (
	"context"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestStoreInOrderPasses(t *testing.T) {
	t.Parallel()
	Run(t, Features{}, func(*testing.T) *Harness { return newReference("").harness() })
}

// faults names the faults of a store, and a case that finds each.
var faults = map[string]string{
	"one key for all":                 "AbsentKeyIsClaimed",
	"waits":                           "ClaimedKeyIsInProgress",
	"steals claims":                   "ClaimedKeyIsInProgress",
	"claims twice":                    "OneOfManyBeginsClaims",
	"one replay at a time":            "ManyReplaysAtOnce",
	"ignores the scope":               "ScopesAreApart",
	"joins the parts":                 "PartsAreNeverJoined",
	"joins the parts with nothing":    "PartsAreNeverJoined",
	"ignores the case":                "CaseCounts",
	"ignores the case of scopes":      "CaseCounts",
	"truncates":                       "LongestKeys",
	"truncates scopes":                "LongestKeys",
	"trims scopes":                    "EveryCharacterCounts",
	"escapes":                         "EveryCharacterCounts",
	"claims when cancelled":           "CancelledBeginHoldsNothing",
	"is bound by Begin":               "BeginContextBoundsBeginAlone",
	"keyless collides":                "KeylessNeverCollides",
	"keyless records":                 "KeylessNeverCollides",
	"loses the status":                "RecordIsKeptByteForByte",
	"loses headers":                   "RecordIsKeptByteForByte",
	"joins values":                    "RecordIsKeptByteForByte",
	"sorts values":                    "RecordIsKeptByteForByte",
	"makes UTF-8 of values":           "RecordIsKeptByteForByte",
	"trims the body":                  "RecordIsKeptByteForByte",
	"ends the body at NUL":            "RecordIsKeptByteForByte",
	"loses the version":               "RecordIsKeptByteForByte",
	"loses the fingerprint":           "RecordIsKeptByteForByte",
	"loses the attempt":               "RecordIsKeptByteForByte",
	"loses the trace":                 "RecordIsKeptByteForByte",
	"a record with an error":          "RecordIsKeptByteForByte",
	"shares the answer":               "RecordIsTheStoresOwn",
	"shares its record":               "RecordIsTheStoresOwn",
	"ignores the TTL":                 "RecordCountsForItsTTL",
	"hides records of other requests": "BeginComparesNothing",
	"record of the finder":            "BeginComparesNothing",
	"not durable":                     "RecordOutlivesTheStore",
	"expires by the clock":            "RecordCountsUntilItIsDeleted",
	"deletes the wrong ones":          "RecordCountsUntilItIsDeleted",
	"rollback keeps the claim":        "RollbackForgets",
	"seal fails":                      "RollbackForgets",
	"declines are forgotten":          "DeclineRecords",
	"leaks":                           "NothingIsHeldAfterAnEnd",
	"commit keeps the claim":          "RecordCountsUntilItIsDeleted",
	"decline keeps the claim":         "RecordCountsUntilItIsDeleted",
	"loses records":                   "StormHasOneEffectPerKey",
	"lies about commits":              "EndsTellTheTruth",
	"denies commits":                  "EndsTellTheTruth",
	"loses the context":               "ContextIsCarried",
	"loses the context's end":         "ContextIsCarried",
	"overwrites":                      "LostClaim",
	"loser keeps its writes":          "LostClaim",
	"claim wins over record":          "RecordWinsOverClaim",
	"loses writes":                    "CommitKeepsTheWrites",
	"writes at once":                  "CommitKeepsTheWrites",
	"declines keep writes":            "DeclineUndoesTheWrites",
	"rollback keeps writes":           "RollbackUndoesTheWrites",
	"keyless declines keep writes":    "KeylessAttemptsAreTransactions",
	"writes after the seal":           "SealedAttemptTakesNoWrites",
	"writes after the seal unheard":   "SealedAttemptTakesNoWrites",
	"commits what is broken":          "BrokenTransactionCanNotCommit",
	"can't decline what is broken":    "BrokenTransactionCanNotCommit",
	"seals over everything":           "BrokenTransactionCanNotCommit",
	"panic keeps writes":              "PanicFreesTheKey",
	"resolves to itself":              "ResolveFindsTheRecord",
	"resolves its own alone":          "ResolveFindsTheRecord",
	"keeps what it resolves":          "ResolveChangesNothing",
	"forgets what it resolves":        "ResolveChangesNothing",
	"takes what it waits for":         "ResolveChangesNothing",
	"resolves without waiting":        "ResolveWaitsForTheAttempt",
	"looks before it waits":           "ResolveWaitsForTheAttempt",
	"resolves for ever":               "ResolveIsBoundByItsContext",
	"gives up as absent":              "ResolveIsBoundByItsContext",
	"gives up as unavailable":         "ResolveIsBoundByItsContext",
	"resolves in every scope":         "ResolveKeepsScopesApart",
	"resolves one at a time":          "ManyResolveAtOnce",
	"takes an old absence for proof":  "ResolveKnowsWhatMayHaveExpired",
	"does not say when it claimed":    "ResolveKnowsWhatMayHaveExpired",
	"an intent is no record":          "IntentIsKept",
	"loses the input":                 "IntentIsKept",
	"a new attempt's id":              "IntentIsKept",
	"a look-up claims":                "LookUpClaimsNothing",
	"a look-up hides what is open":    "LookUpClaimsNothing",
	"takes over on any route":         "OwnerIsAlone",
	"takes over at any time":          "OwnerIsAlone",
	"takes what is parked":            "OwnerIsAlone",
	"finds every route":               "OwnerIsAlone",
	"leaves for no pause":             "OwnerIsAlone",
	"counts what was not sent":        "ResultIsKept",
	"many take over":                  "OneOfManyTakesOver",
	"no fence":                        "ReplacedOwnerWritesNothing",
	"forgets results":                 "ResultIsKept",
	"the last result counts":          "ResultIsKept",
	"doubts results":                  "ResultIsKept",
	"does not count tries":            "ResultIsKept",
	"tells the new doubt":             "ResultIsKept",
	"an end leaves it open":           "EndCloses",
	"an end loses writes":             "EndCloses",
	"a decline keeps writes":          "EndCloses",
	"leaving keeps writes":            "LeaveUndoesTheWrites",
	"an intent drops writes":          "IntentAfterWritesIsRefused",
	"lazy claims never":               "LazyClaimComesWithTheIntent",
}

// TestEveryFaultIsFound: a case that can't fail guards nothing.
func TestEveryFaultIsFound(t *testing.T) {
	t.Parallel()
	byName := map[string]testCase{}
	for _, one := range cases() {
		byName[one.name] = one
		if !slices.Contains(slices.Collect(maps.Values(faults)), one.name) {
			t.Errorf("no fault makes %s fail", one.name)
		}
	}
	for fault, name := range faults {
		t.Run(fault, func(t *testing.T) {
			t.Parallel()
			log := runCase(t, byName[name], Features{}, newReference(fault).harness())
			if !log.failed {
				t.Fatalf("%s does not find it", name)
			}
			if last := log.lines[len(log.lines)-1]; !strings.Contains(last, byName[name].rule) {
				t.Errorf("%s does not end with its rule but with %q", name, last)
			}
		})
	}
}

func TestHookThatIsMissingIsNotSkipped(t *testing.T) {
	t.Parallel()
	for _, one := range cases() {
		if one.promise == always {
			continue
		}
		log := runCase(t, one, Features{}, &Harness{Store: newReference("")})
		if !log.failed || !strings.Contains(log.lines[0], "Harness.") {
			t.Errorf("%s: %v", one.name, log.lines)
		}
	}
}

func TestFeaturesExcuseCases(t *testing.T) {
	t.Parallel()
	nothing := Features{WritesStay: true, NotDurable: true, NoExpiry: true, ClaimsAreCertain: true, RunsAgain: true, NotKept: true}
	for _, one := range cases() {
		if promised := nothing.lacks(one.promise) == ""; promised != (one.promise == always) {
			t.Errorf("%s is run: %v", one.name, promised)
		}
		if field := (Features{}).lacks(one.promise); field != "" {
			t.Errorf("%s is excused by %s, which is not set", one.name, field)
		}
	}
	// The remaining cases need no hook: a harness without any passes.
	Run(t, nothing, func(*testing.T) *Harness { return &Harness{Store: newReference("")} })
}

// log is a tester that keeps the failures.
type log struct {
	ctx context.Context

	mu     sync.Mutex
	failed bool
	lines  []string
}

// runCase runs a case that may fail, with little patience.
func runCase(t *testing.T, one testCase, features Features, h *Harness) *log {
	l := &log{ctx: t.Context()}
	done := make(chan struct{})
	go func() {
		defer close(done)
		one.check(l, features, h, 500*time.Millisecond)
	}()
	<-done
	return l
}

func (l *log) Helper()                  {}
func (l *log) Context() context.Context { return l.ctx }
func (l *log) Failed() bool             { l.mu.Lock(); defer l.mu.Unlock(); return l.failed }

func (l *log) Logf(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, fmt.Sprintf(format, args...))
}

func (l *log) Errorf(format string, args ...any) {
	l.Logf(format, args...)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failed = true
}

func (l *log) Fatalf(format string, args ...any) {
	l.Errorf(format, args...)
	runtime.Goexit()
}
