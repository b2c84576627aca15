package live

import (
	"fmt"
	"math/rand/v2"
	"time"
)

// BoardForTest lets a test outside the package, which may import livetest, change a board and see
// its events.
type BoardForTest struct {
	hub *hub
	now time.Time
}

// NewBoardForTest returns an empty board.
func NewBoardForTest() *BoardForTest {
	return &BoardForTest{hub: newHub("epoch", newBoard()), now: time.Unix(1_000_000, 0)}
}

// Attempt makes a random attempt.
func (b *BoardForTest) Attempt(draw *rand.Rand) {
	letters := []Dot{DotExecuted, DotReplayed, DotInProgress, DotMismatch, DotFailed, DotLostReply, DotLostRequest}
	b.now = b.now.Add(time.Duration(draw.IntN(400)) * time.Millisecond)
	b.hub.board.attempt(b.now, sides[draw.IntN(2)], fmt.Sprint(draw.IntN(3*lanesMax)), "#", letters[draw.IntN(5)], letters[draw.IntN(7)])
}

// Begin begins a storm.
func (b *BoardForTest) Begin() {
	b.hub.board.begin(Storm{Run: fmt.Sprint(b.now.UnixNano()), State: StormRunning})
}

// Prove shows a proof.
func (b *BoardForTest) Prove(alice int64) { b.hub.board.prove(&Proof{Alice: alice}) }

// Snapshot returns the first event of a new viewer.
func (b *BoardForTest) Snapshot() []byte {
	v, err := b.hub.join("")
	if err != nil {
		panic(err)
	}
	b.hub.leave(v)
	return v.first
}

// Update returns the next update, or nothing.
func (b *BoardForTest) Update() []byte {
	frame := b.hub.board.take(b.now)
	if frame == nil {
		return nil
	}
	return b.hub.encode("update", 1, frame)
}
