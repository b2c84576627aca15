//go:build unix

package chaos

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// slotOf returns the slot of a bank that is a shell script.
func slotOf(t *testing.T, script string) (*run, *slot) {
	t.Helper()
	r := &run{started: time.Now(), tally: newTally()}
	diaryOf(t, r)
	r.banks = newBanks(r)
	program := filepath.Join(t.TempDir(), "bank")
	// If another test forks meanwhile, its process holds the file open for writing, and the script
	// cannot run.
	syscall.ForkLock.RLock()
	err := os.WriteFile(program, []byte("#!/bin/sh\n"+script+"\n"), 0o755)
	syscall.ForkLock.RUnlock()
	if err != nil {
		t.Fatal(err)
	}
	s := &slot{run: r, address: "127.0.0.1:1", program: program, log: r.diary}
	r.banks.slots = []*slot{s}
	r.banks.ended.Go(func() { _ = s.supervise() })
	t.Cleanup(func() { _ = r.banks.close() })
	return r, s
}

const servesForLong = `echo "demo-bank is at http://127.0.0.1:1 (x)"; exec sleep 60`

// TestADeathThatNobodyAskedForIsFound: any unasked death is a finding, except a start that found no
// database.
func TestADeathThatNobodyAskedForIsFound(t *testing.T) {
	t.Parallel()
	for name, script := range map[string]string{
		"it served":                           `echo "demo-bank is at http://127.0.0.1:1 (x)"; echo "panic: oh" >&2; exit 1`,
		"a panic at its start":                `echo "panic: oh" >&2; exit 2`,
		"killed by another":                   `kill -9 $$`,
		"a crash point that it was not given": `echo "demo-bank: crash point after_begin" >&2; kill -9 $$`,
		"an end":                              `exit 0`,
	} {
		r, _ := slotOf(t, script)
		eventually(t, name, func() bool {
			r.findings.mu.Lock()
			defer r.findings.mu.Unlock()
			return r.findings.count > 0 && strings.Contains(r.findings.examples[0], "died unasked")
		})
	}
}

func TestAStartWithoutADatabaseIsTriedAgain(t *testing.T) {
	t.Parallel()
	r, _ := slotOf(t, `if [ -e "$0.again" ]; then `+servesForLong+`; fi; touch "$0.again"; exit 1`)
	eventually(t, "the second start serves", func() bool {
		l := r.banks.slots[0].current()
		if l == nil {
			return false
		}
		select {
		case <-l.serving:
			return true
		default:
			return false
		}
	})
	if r.findings.count > 0 || r.tally.faults.get("start refused") != 1 {
		t.Errorf("found %v; refused starts: %d", r.findings.examples, r.tally.faults.get("start refused"))
	}
}

// TestAKillArmsTheNextLife: the life after a kill has the crash point and dies at it; the one after
// that has none.
func TestAKillArmsTheNextLife(t *testing.T) {
	t.Parallel()
	r, s := slotOf(t, `echo "demo-bank is at http://127.0.0.1:1 (x)"
if [ -n "$DEMO_BANK_CRASH_POINT" ]; then echo "demo-bank: crash point ${DEMO_BANK_CRASH_POINT%:*}" >&2; kill -9 $$; fi
exec sleep 60`)
	eventually(t, "it serves", func() bool { return s.awaitServing(t.Context(), nil) == nil })
	first := s.current()
	if !r.banks.disarmed() {
		t.Error("a bank without a crash point is armed")
	}
	if !r.banks.kill(0, arm{"half_response", 3}) || r.banks.disarmed() {
		t.Fatal("it was not killed, or its next life is not armed")
	}
	<-first.ended
	eventually(t, "it died at its crash point", func() bool { return r.tally.crashPoints.get("half_response") == 1 })
	eventually(t, "the third life is not armed", func() bool { return r.banks.disarmed() })
	if kills := r.tally.kills.Load(); kills != 2 || r.findings.count > 0 {
		t.Errorf("%d kills: %v", kills, r.findings.examples)
	}
}

// TestACrashPointThatAKillPushedAsideComesBack: no crash point is lost.
func TestACrashPointThatAKillPushedAsideComesBack(t *testing.T) {
	t.Parallel()
	r, s := slotOf(t, servesForLong)
	eventually(t, "it serves", func() bool { return s.awaitServing(t.Context(), nil) == nil })
	armed := func(point string) func() bool {
		return func() bool {
			l := s.current()
			if l == nil || l.armed.point != point {
				return false
			}
			select {
			case <-l.serving: // otherwise its crash point would stay its own
				return true
			default:
				return false
			}
		}
	}
	r.eventsLeft.Store(1)
	r.banks.kill(0, arm{"after_body", 1})
	eventually(t, "the second life is armed", armed("after_body"))
	r.banks.kill(0, arm{"after_begin", 1})
	eventually(t, "the third life is armed", armed("after_begin"))
	r.banks.kill(0, arm{})
	eventually(t, "the first crash point is back", armed("after_body"))
	s.mu.Lock()
	pending := len(s.pending)
	s.mu.Unlock()
	if pending != 1 || r.findings.count > 0 {
		t.Errorf("%d are pending: %v", pending, r.findings.examples)
	}
}

// TestNoBankOutlivesTheRun: close ends all banks, even one that does not want to end.
func TestNoBankOutlivesTheRun(t *testing.T) {
	t.Parallel()
	r, s := slotOf(t, `trap "exit 0" TERM; echo "demo-bank is at http://127.0.0.1:1 (x)"; while :; do sleep 0.05; done`)
	eventually(t, "it serves", func() bool { return s.awaitServing(t.Context(), nil) == nil })
	l := s.current()
	if err := r.banks.close(); err != nil {
		t.Fatal(err)
	}
	<-l.ended
	if l.cmd.ProcessState.ExitCode() != 0 || r.findings.count > 0 {
		t.Errorf("it ended with %v: %v", l.cmd.ProcessState, r.findings.examples)
	}
}
