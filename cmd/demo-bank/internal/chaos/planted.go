package chaos

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/check"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/storm"
	"github.com/paidonce/idempotency/internal/deadline"
)

const (
	plantInterval = 300 * time.Millisecond
	plantRows     = 5 // expired ones; one live record comes with them

	contentType  = "application/json"
	scopeExpired = "chaos-expired"
	scopeLive    = "chaos-live"
	plantedBody  = `{"planted":true}` + "\n"

	reapWaitMax = 20 * time.Second // for the records that were planted last
)

// plantedAnswer is the hash of a planted record's answer.
var plantedAnswer = storm.AnswerOf(http.StatusOK, contentType, "", []byte(plantedBody))

// plantedHeaders returns the planted answer's recorded headers: version 1, one pair, and each
// string after its length.
func plantedHeaders() []byte {
	const name = "Content-Type"
	b := append([]byte{1, 1, byte(len(name))}, name...)
	return append(append(b, byte(len(contentType))), contentType...)
}

// planter adds to the table records with an expiry long ago, and live records beside them. The
// reaper must delete all of the expired ones and none of the live ones. Some records have a key
// that a client is about to use.
type planter struct {
	owner   *run
	session session

	expired atomic.Int64 // planted in scopeExpired
	reused  atomic.Int64 // planted for keys that clients use

	mu     sync.Mutex
	live   []check.Key
	unsure int64 // live ones with no reply to their INSERT: they may be there
}

// seed is a record to plant.
type seed struct {
	scope, key  string
	hours       int // from now until it expires
	fingerprint idempotency.Fingerprint
}

const plantStatement = `
	INSERT INTO idempotency_keys (created_at, expires_at, status, fingerprint_version, attempt_id, scope, key, fingerprint, headers, body)
	SELECT now() - interval '2 days', now() + hours * interval '1 hour', 200, $1, gen_random_uuid(), scope, key, fingerprint, $2, $3
	FROM unnest($4::text[], $5::text[], $6::int[], $7::bytea[]) AS seeds (scope, key, hours, fingerprint)
	ON CONFLICT DO NOTHING`

// plant adds records to the table, in one commit.
func (p *planter) plant(ctx context.Context, seeds ...seed) error {
	var scopes, keys []string
	var hours []int
	var fingerprints [][]byte
	for _, s := range seeds {
		scopes, keys, hours, fingerprints = append(scopes, s.scope), append(keys, s.key), append(hours, s.hours), append(fingerprints, s.fingerprint.Sum[:])
	}
	return p.session.use(ctx, p.owner.cluster, func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, plantStatement, seeds[0].fingerprint.Version, plantedHeaders(), []byte(plantedBody), scopes, keys, hours, fingerprints)
		return err
	})
}

// run plants until ctx ends or the run is healed. Nothing is planted while the cluster is down.
func (p *planter) run(ctx context.Context) {
	fingerprint := idempotency.NewFingerprintV1(http.MethodPost, "/", "", contentType, nil)
	for deadline.Sleep(ctx, plantInterval) == nil && !p.owner.healed.Load() {
		seeds := make([]seed, plantRows+1)
		for n := range seeds {
			var id [12]byte
			_, _ = rand.Read(id[:]) // never fails
			seeds[n] = seed{scope: scopeExpired, key: hex.EncodeToString(id[:]), hours: -24, fingerprint: fingerprint}
		}
		live := &seeds[plantRows]
		live.scope, live.hours = scopeLive, +24
		err := p.plant(ctx, seeds...)
		p.mu.Lock()
		if err == nil {
			p.expired.Add(plantRows)
			p.live = append(p.live, check.Key{Scope: live.scope, Key: live.key})
		} else {
			p.unsure++
		}
		p.mu.Unlock()
	}
}

// reuse plants an expired record of a key that is about to be used. While the record exists it is
// replayed; afterwards the key is new.
func (p *planter) reuse(ctx context.Context, k *key) {
	f := idempotency.NewFingerprintV1(http.MethodPost, k.path(), "", contentType, k.body(false))
	if p.plant(ctx, seed{tenants[k.tenant].scope, k.text, -24, f}) == nil {
		p.reused.Add(1)
	}
}

// drainPlanted blocks until no expired record is left, or reapWaitMax has elapsed.
func (r *run) drainPlanted(ctx context.Context) error {
	until := time.Now().Add(reapWaitMax)
	for {
		var left int64
		err := r.cluster.with(ctx, databaseTimeout, func(ctx context.Context, conn *pgx.Conn) error {
			return conn.QueryRow(ctx, `SELECT count(*) FROM idempotency_keys WHERE expires_at < now()`).Scan(&left)
		})
		if err != nil {
			return err
		}
		if left == 0 || time.Now().After(until) {
			return nil // check.Live finds the rest
		}
		if err := deadline.Sleep(ctx, scrapeInterval); err != nil {
			return err
		}
	}
}
