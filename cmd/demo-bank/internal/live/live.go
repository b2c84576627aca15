// Package live is the bank's page for people and its server side: a storm that the bank sends to
// itself, a stream of events that shows the outcome of every request, and a proof read from the
// books.
//
//   - page.go and assets are the page
//   - storm.go is the storm, plan.go its form, client.go its client, and faults.go its faults
//   - board.go holds everything that can be seen; tracer.go adds requests that are not the storm's
//   - topup.go shows a top-up with a lost reply of the processor, with and without effects
//   - statements.go shows projections of messages with and without an inbox, and consumers.go runs
//     their processes
//   - proof.go reads the proof about the twins' money from PostgreSQL
//   - hub.go and stream.go send it to viewers
//
// A storm sends the same payments to two pairs of accounts, the twins: to one pair through the
// middleware, to the other without it. Both meet the same faults, and the same client retries on
// both.
package live

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"log/slog"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
)

// Live is the server side of the page. It is safe for concurrent use.
type Live struct {
	pool   *pgxpool.Pool
	url    string // of the bank itself
	logger *slog.Logger
	token  string // marks the storm's requests
	board  *board
	hub    *hub
	prove  func(ctx context.Context, run string) (*Proof, error)

	ending context.Context // ends when Stop is called
	end    context.CancelFunc
	storms sync.WaitGroup // storms, demonstrations and processes

	topUp          atomic.Pointer[demonstration] // the one that runs, or nil
	withoutEffects func(ctx context.Context, processor *bank.Processor, account, card string, amount int64) error

	consumers  Consumers
	statements *statements

	mu            sync.Mutex
	stop          context.CancelFunc // of the running storm, or nil
	statementsRun bool               // an act on consumers runs
	closed        bool
}

// New returns the page's server side for a bank that can be reached at url. ttl is the store's TTL.
// A nil logger logs nothing.
func New(pool *pgxpool.Pool, url string, ttl time.Duration, logger *slog.Logger) *Live {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	var epoch [8]byte
	_, _ = rand.Read(epoch[:]) // can't fail: crypto/rand crashes the program first
	b := newBoard()
	l := &Live{pool: pool, url: url, logger: logger, token: newToken(), board: b, hub: newHub(hex.EncodeToString(epoch[:]), b)}
	l.prove = func(ctx context.Context, run string) (*Proof, error) { return prove(ctx, pool, run, ttl) }
	l.statements = &statements{live: l, committed: map[int32]int64{}}
	l.ending, l.end = context.WithCancel(context.Background())
	return l
}

// Mount adds the page's routes to a router. Those that change something refuse requests from other
// sites' pages.
func (l *Live) Mount(r chi.Router) {
	page := newDocument()
	r.Get("/", page.ServeHTTP)
	r.Get("/assets/*", page.serveAssets)
	r.Get("/live/events", l.events)
	r.Group(func(r chi.Router) {
		r.Use(http.NewCrossOriginProtection().Handler)
		r.Post("/live/storm", l.postStorm)
		r.Post("/live/storm/stop", l.postStop)
		r.Post("/live/topup", l.postTopUp)
		r.Post("/live/statements", l.postStatements)
	})
}

// Run serves the streams until ctx ends. It returns after everything that it started has ended.
func (l *Live) Run(ctx context.Context) {
	var group sync.WaitGroup
	group.Go(func() { l.hub.run(ctx) })
	group.Go(func() { l.prover(ctx) })
	group.Go(func() { l.statements.watch(ctx) })
	<-ctx.Done()
	l.Stop()
	group.Wait()
	l.storms.Wait()
	l.statements.close()
}

// Stop ends all streams and the storm at once, and refuses new ones, so that they don't delay a
// bank that stops. It may be called more than once.
func (l *Live) Stop() {
	l.mu.Lock()
	l.closed = true
	if l.stop != nil {
		l.stop()
	}
	l.mu.Unlock()
	l.end()
	l.hub.close()
}

func (l *Live) isClosed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closed
}
