package live_test

import (
	"bytes"
	"math/rand/v2"
	"reflect"
	"testing"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/live"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/live/livetest"
)

// TestASnapshotIsWhatTheUpdatesAddUpTo: a viewer from the beginning and a new viewer see the same
// state after any events, including new storms.
func TestASnapshotIsWhatTheUpdatesAddUpTo(t *testing.T) {
	t.Parallel()
	for seed := range uint64(20) {
		draw := rand.New(rand.NewPCG(seed, 1))
		b := live.NewBoardForTest()
		var watched livetest.State
		apply := func(s *livetest.State, stream []byte) {
			for e, err := range livetest.Events(bytes.NewReader(stream)) {
				if err != nil {
					t.Fatal(err)
				}
				if err := s.Apply(e); err != nil {
					t.Fatal(err)
				}
			}
		}
		apply(&watched, b.Snapshot())
		for range 400 {
			switch n := draw.IntN(100); {
			case n < 80:
				b.Attempt(draw)
			case n < 82:
				b.Begin()
			case n < 84:
				b.Prove(draw.Int64())
			default:
				apply(&watched, b.Update())
			}
		}
		apply(&watched, b.Update())
		var fresh livetest.State
		apply(&fresh, b.Snapshot())
		watched.AtMS, fresh.AtMS = 0, 0
		if !reflect.DeepEqual(watched, fresh) {
			t.Fatalf("seed %d: who watched sees\n%+v\nwho comes now\n%+v", seed, watched, fresh)
		}
	}
}
