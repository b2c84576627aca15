package idempotency

import (
	"os"
	"strings"
	"testing"
)

// docs/state-machine.md holds the table of Decide in words. The two must not part.
func TestStateMachineDocIsTheTable(t *testing.T) {
	t.Parallel()
	facts := map[string]Fact{
		"Claimed": FactClaimed, "InProgress": FactInProgress, "Awaited": FactAwaited, "Turn": FactTurn, "RecordedSame": FactRecordedSame, "RecordedOther": FactRecordedOther,
		"RecordedUnreadable": FactRecordedUnreadable, "Unavailable": FactUnavailable, "Serialization": FactSerialization,
		"RestartsSpent": FactRestartsSpent, "RecordUnread": FactRecordUnread, "AnsweredCommit": FactAnsweredCommit, "AnsweredDecline": FactAnsweredDecline,
		"AnsweredForget": FactAnsweredForget, "HandlerFailed": FactHandlerFailed, "TransactionLost": FactTransactionLost,
		"Committed": FactCommitted, "Declined": FactDeclined, "Forgotten": FactForgotten, "KeyRecorded": FactKeyRecorded,
		"CommitAborted": FactCommitAborted, "DeclineFailed": FactDeclineFailed, "OutcomeUnknown": FactOutcomeUnknown,
		"RecordCorrupt": FactRecordCorrupt, "CommitUnknown": FactCommitUnknown, "ResolvedOurs": FactResolvedOurs, "ResolvedAbsent": FactResolvedAbsent,
		"CallForgotten": FactCallForgotten, "CallUnknown": FactCallUnknown,
	}
	if len(facts) != int(FactOutcomeUnknown) {
		t.Fatalf("the test knows %d facts of %d", len(facts), FactOutcomeUnknown)
	}
	actions := map[string]Action{
		"Run": ActionRun, "Wait": ActionWait, "Claim": ActionClaim, "Replay": ActionReplay, "Commit": ActionCommit, "Decline": ActionDecline, "Forget": ActionForget,
		"Answer": ActionAnswer, "Restart": ActionRestart, "Resolve": ActionResolve, "Refuse": ActionRefuse,
	}
	doc, err := os.ReadFile("docs/state-machine.md")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.SplitSeq(string(doc), "\n") {
		cells := strings.Split(line, "|")
		if len(cells) != 7 {
			continue
		}
		for i := range cells {
			cells[i] = strings.TrimSpace(cells[i])
		}
		fact, ok := facts[cells[1]]
		if !ok {
			continue
		}
		delete(facts, cells[1])
		want := Decision{Action: actions[cells[3]], Outcome: Outcome(cells[4]), Reason: Reason(cells[5])}
		if got := Decide(fact); got != want {
			t.Errorf("%s: the doc says %+v, Decide %+v", cells[1], want, got)
		}
	}
	for name := range facts {
		t.Errorf("%s is not in the doc", name)
	}
}
