package bench

import (
	"context"
	"net/http"
	"sync"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
)

// holders counts the conns that marked requests hold. It is a pool's tracer.
type holders struct {
	mu    sync.Mutex
	conns map[*pgx.Conn]struct{}
	most  int
}

var (
	_ pgxpool.AcquireTracer = (*holders)(nil)
	_ pgxpool.ReleaseTracer = (*holders)(nil)
)

type markedKey struct{}

// mark marks requests.
func (h *holders) mark(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), markedKey{}, true)))
	})
}

func (h *holders) TraceAcquireStart(ctx context.Context, _ *pgxpool.Pool, _ pgxpool.TraceAcquireStartData) context.Context {
	return ctx
}

func (h *holders) TraceAcquireEnd(ctx context.Context, _ *pgxpool.Pool, data pgxpool.TraceAcquireEndData) {
	if data.Err != nil || ctx.Value(markedKey{}) == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.conns == nil {
		h.conns = map[*pgx.Conn]struct{}{}
	}
	h.conns[data.Conn] = struct{}{}
	h.most = max(h.most, len(h.conns))
}

func (h *holders) TraceRelease(_ *pgxpool.Pool, data pgxpool.TraceReleaseData) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.conns, data.Conn)
}

func (h *holders) TraceQueryStart(ctx context.Context, _ *pgx.Conn, _ pgx.TraceQueryStartData) context.Context {
	return ctx
}

func (h *holders) TraceQueryEnd(context.Context, *pgx.Conn, pgx.TraceQueryEndData) {}

// take returns the maximum number of conns held at once since the last call.
func (h *holders) take() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	most := h.most
	h.most = len(h.conns)
	return most
}
