package idempotency

import (
	"os"
	"strings"
	"testing"
)

// docs/state-machine.md has the table of decide in words. The two must stay equal.
func TestStateMachineDocIsTheTable(t *testing.T) {
	t.Parallel()
	facts := map[string]fact{
		"RunsHere": factRunsHere, "Claimed": factClaimed, "InProgress": factInProgress, "Awaited": factAwaited, "Turn": factTurn, "RecordedSame": factRecordedSame, "RecordedOther": factRecordedOther,
		"RecordedUnreadable": factRecordedUnreadable, "Unavailable": factUnavailable, "Serialization": factSerialization,
		"RestartsSpent": factRestartsSpent, "RecordUnread": factRecordUnread, "AnsweredCommit": factAnsweredCommit, "AnsweredDecline": factAnsweredDecline,
		"AnsweredForget": factAnsweredForget, "Refused": factRefused, "HandlerFailed": factHandlerFailed, "TransactionLost": factTransactionLost,
		"Committed": factCommitted, "Declined": factDeclined, "Forgotten": factForgotten, "KeyRecorded": factKeyRecorded,
		"CommitAborted": factCommitAborted, "DeclineFailed": factDeclineFailed, "OutcomeUnknown": factOutcomeUnknown,
		"RecordCorrupt": factRecordCorrupt, "CommitUnknown": factCommitUnknown, "ResolvedOurs": factResolvedOurs, "ResolvedAbsent": factResolvedAbsent,
		"Open": factOpen, "TakenOver": factTakenOver, "BackingOff": factBackingOff, "Parked": factParked, "Unsettled": factUnsettled,
		"Contradiction": factContradiction, "Fenced": factFenced,
		"CallForgotten": factCallForgotten, "CallUnknown": factCallUnknown,
	}
	if len(facts) != int(factOutcomeUnknown) {
		t.Fatalf("the test knows %d facts of %d", len(facts), factOutcomeUnknown)
	}
	actions := map[string]action{
		"Run": actionRun, "Wait": actionWait, "Claim": actionClaim, "Replay": actionReplay, "Commit": actionCommit, "Decline": actionDecline, "Forget": actionForget,
		"Answer": actionAnswer, "Restart": actionRestart, "Resolve": actionResolve, "Refuse": actionRefuse, "TakeOver": actionTakeOver, "Leave": actionLeave, "Park": actionPark,
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
		want := decision{action: actions[cells[3]], outcome: Outcome(cells[4]), reason: Reason(cells[5])}
		if got := decide(fact); got != want {
			t.Errorf("%s: the doc says %+v, decide %+v", cells[1], want, got)
		}
	}
	for name := range facts {
		t.Errorf("%s is not in the doc", name)
	}
}
