package idempotencytest

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/effect"
	"github.com/paidonce/idempotency/internal/crashpoint"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/postgres"
)

// card is what the processor is asked to charge.
type card struct {
	N      int
	Amount int64
	Note   string
}

type charged struct {
	ID     string
	N      int
	Amount int64
}

// shop charges cards and posts the charges. Its price changes all the time.
type shop struct {
	pool   *pgxpool.Pool
	store  *postgres.Store
	psp    *Processor[card, charged]
	charge *effect.Declared[card, charged]
	idem   *middleware.Middleware
	sale   func(s *shop, w http.ResponseWriter, r *http.Request, n int)
	prices atomic.Int64
	lock   chan struct{}

	unnamed bool // its route has no Resumable name
}

func newShop(t *testing.T) *shop {
	t.Helper()
	service := testservice.New(t, &postgres.Options{PoolConfig: func(config *pgxpool.Config) { config.MaxConns = 10 }})
	service.Exec(t, "CREATE TABLE postings (n bigint NOT NULL, charge text NOT NULL, amount bigint NOT NULL, note text NOT NULL DEFAULT '')")
	service.Exec(t, "CREATE TABLE holds (n bigint NOT NULL)")
	s := &shop{pool: service.Pool, store: service.Store, sale: held, lock: make(chan struct{}, 1)}
	s.psp = &Processor[card, charged]{Serve: func(key string, in card) (charged, error) {
		if in.N < 0 {
			return charged{}, effect.Declined(errors.New("there is no money on the card"), nil)
		}
		return charged{"ch_" + key, in.N, in.Amount}, nil
	}}
	s.declare(s.psp.Do)
	return s
}

func (s *shop) declare(do func(context.Context, string, card) (charged, error)) {
	s.charge = effect.New("charge", effect.Effect[card, charged]{Do: do})
}

func (s *shop) price() int64 { return 1000 + s.prices.Add(1) }

func (s *shop) config() Config {
	return Config{
		Store: s.store,
		New: func(store idempotency.Store) http.Handler {
			options := middleware.Options{Resumable: "sale/1", Logger: slog.New(slog.DiscardHandler)}
			if s.unnamed {
				options.Resumable = ""
			}
			s.idem = middleware.New(store, func(r *http.Request) (string, error) { return r.Header.Get("Account"), nil }, &options)
			return s.idem.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				var in struct{ N int }
				if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
					http.Error(w, "send n", http.StatusBadRequest)
					return
				}
				s.sale(s, w, r, in.N)
			}))
		},
		Resume:    func(ctx context.Context, key idempotency.Key) idempotency.Result { return s.idem.Resume(ctx, key) },
		Request:   func(n int) *http.Request { return sale("acme", n) },
		Declined:  func(n int) *http.Request { return sale("acme", -n) },
		Other:     func(n int) *http.Request { return sale("globex", n) },
		Invariant: s.check,
	}
}

func sale(account string, n int) *http.Request {
	r, err := http.NewRequest(http.MethodPost, "/sales", strings.NewReader(fmt.Sprintf(`{"n":%d}`, n)))
	if err != nil {
		panic(err)
	}
	r.Header.Set("Account", account)
	return r
}

// check compares the processor's charges with the postings and with the clients' answers.
func (s *shop) check(ctx context.Context, told Told) error {
	rows, err := s.pool.Query(ctx, "SELECT n, charge, amount, note FROM postings")
	if err != nil {
		return err
	}
	type posting struct {
		N      int
		Charge string
		Amount int64
		Note   string
	}
	posted, err := pgx.CollectRows(rows, pgx.RowToStructByPos[posting])
	if err != nil {
		return err
	}
	books, charges := map[posting]int{}, map[posting]int{}
	for _, p := range posted {
		books[p]++
	}
	var numbers, acknowledged []int
	for _, c := range s.psp.Served() {
		charges[posting{c.Out.N, c.Out.ID, c.Out.Amount, c.In.Note}]++
		numbers = append(numbers, c.Out.N)
	}
	if !maps.Equal(books, charges) {
		return fmt.Errorf("posted %v, charged %v", books, charges)
	}
	for _, answer := range told.Acknowledged {
		acknowledged = append(acknowledged, answer.N)
	}
	slices.Sort(numbers)
	slices.Sort(acknowledged)
	if !slices.Equal(numbers, acknowledged) {
		return fmt.Errorf("charged %v, acknowledged %v", numbers, acknowledged)
	}
	var holds int
	if err := s.pool.QueryRow(ctx, "SELECT count(*) FROM holds").Scan(&holds); err != nil || holds != 0 {
		return fmt.Errorf("%d holds are left: %v", holds, err)
	}
	return nil
}

// held is correct: it holds, charges, and posts or releases.
func held(s *shop, w http.ResponseWriter, r *http.Request, n int) {
	ctx := r.Context()
	if _, err := postgres.Phase(ctx, "hold", func(tx pgx.Tx) (int, error) {
		_, err := tx.Exec(ctx, "INSERT INTO holds (n) VALUES ($1)", n)
		return n, err
	}); err != nil {
		http.Error(w, "it was not held", http.StatusInternalServerError)
		return
	}
	paid, err := s.charge.Call(ctx, card{N: n, Amount: s.price()})
	switch {
	case errors.Is(err, effect.ErrDeclined):
		if _, err := postgres.Phase(ctx, "release", func(tx pgx.Tx) (int, error) {
			_, err := tx.Exec(ctx, "DELETE FROM holds WHERE n = $1", n)
			return n, err
		}); err == nil {
			http.Error(w, "the card was declined", http.StatusPaymentRequired)
		}
		return
	case err != nil:
		return
	}
	if _, err := postgres.Tx(ctx).Exec(ctx, "DELETE FROM holds WHERE n = $1", n); err != nil {
		http.Error(w, "it was not released", http.StatusInternalServerError)
		return
	}
	s.post(w, r, paid.N, paid.ID, paid.Amount, "")
}

// post writes the posting, and answers.
func (s *shop) post(w http.ResponseWriter, r *http.Request, n int, id string, amount int64, note string) {
	if _, err := postgres.Tx(r.Context()).Exec(r.Context(), "INSERT INTO postings (n, charge, amount, note) VALUES ($1, $2, $3, $4)", n, id, amount, note); err != nil {
		http.Error(w, "it was not posted", http.StatusInternalServerError)
		return
	}
	w.WriteHeader(http.StatusCreated)
	_, _ = fmt.Fprintln(w, id, amount)
}

// refuse answers for an error of the call, as a correct handler does.
func refuse(w http.ResponseWriter, err error) {
	if errors.Is(err, effect.ErrDeclined) {
		http.Error(w, "the card was declined", http.StatusPaymentRequired)
	}
}

func TestHandlerWithCallsPasses(t *testing.T) {
	t.Parallel()
	Run(t, newShop(t).config())
}

// Without Config.Resume the clients' retries end every request.
func TestHandlerWithCallsPassesWithoutResume(t *testing.T) {
	t.Parallel()
	config := newShop(t).config()
	config.Resume = nil
	config.Keys, config.Point = 1, 3
	Run(t, config)
}

// The mistakes in handlers that make calls, and the check that finds each.
var callBugs = map[string]struct {
	part  string
	check string
	plant func(s *shop)
	waits bool
}{
	"writes before the call, outside a Phase": {"Prepare", checkSettled, func(s *shop) {
		s.sale = func(s *shop, w http.ResponseWriter, r *http.Request, n int) {
			if _, err := postgres.Tx(r.Context()).Exec(r.Context(), "SELECT 1"); err != nil {
				http.Error(w, "it failed", http.StatusInternalServerError)
				return
			}
			paid, err := s.charge.Call(r.Context(), card{N: n, Amount: s.price()})
			if err != nil {
				refuse(w, err)
				return
			}
			s.post(w, r, paid.N, paid.ID, paid.Amount, "")
		}
	}, true},
	"writes before the call, around the transaction": {crashpoint.AfterReply, checkInvariant, func(s *shop) {
		s.sale = func(s *shop, w http.ResponseWriter, r *http.Request, n int) {
			amount := s.price()
			if n >= 0 {
				if _, err := s.pool.Exec(context.Background(), "INSERT INTO holds (n) VALUES ($1)", n); err != nil {
					return
				}
			}
			paid, err := s.charge.Call(r.Context(), card{N: n, Amount: amount})
			if err != nil {
				refuse(w, err)
				return
			}
			if _, err := postgres.Tx(r.Context()).Exec(r.Context(), "DELETE FROM holds WHERE ctid = (SELECT ctid FROM holds WHERE n = $1 LIMIT 1)", n); err != nil {
				return
			}
			s.post(w, r, paid.N, paid.ID, paid.Amount, "")
		}
	}, false},
	"takes an error that is not settled for a no, and cancels around the transaction": {crashpoint.ResultLost, checkInvariant, func(s *shop) {
		s.sale = func(s *shop, w http.ResponseWriter, r *http.Request, n int) {
			paid, err := s.charge.Call(r.Context(), card{N: n, Amount: s.price()})
			if err != nil {
				if errors.Is(err, effect.ErrUnsettled) && n >= 0 {
					_, _ = s.pool.Exec(context.Background(), "INSERT INTO holds (n) VALUES ($1)", n)
				}
				http.Error(w, "the card was declined", http.StatusPaymentRequired)
				return
			}
			s.post(w, r, paid.N, paid.ID, paid.Amount, "")
		}
	}, false},
	"refuses after the charge": {"Prepare", checkParked, func(s *shop) {
		s.sale = func(s *shop, w http.ResponseWriter, r *http.Request, n int) {
			if _, err := s.charge.Call(r.Context(), card{N: n, Amount: s.price()}); err == nil {
				http.Error(w, "the shop has closed", http.StatusConflict)
			}
		}
	}, false},
	"charges with a new key": {crashpoint.AfterReply, checkInvariant, func(s *shop) {
		s.sale = simple
		s.declare(func(ctx context.Context, _ string, in card) (charged, error) { return s.psp.Do(ctx, rand.Text(), in) })
	}, false},
	"makes the input from the clock, and posts that": {crashpoint.AfterReply, checkInvariant, func(s *shop) {
		s.sale = func(s *shop, w http.ResponseWriter, r *http.Request, n int) {
			now := time.Now().Format(time.RFC3339Nano)
			paid, err := s.charge.Call(r.Context(), card{N: n, Amount: s.price(), Note: now})
			if err != nil {
				refuse(w, err)
				return
			}
			s.post(w, r, paid.N, paid.ID, paid.Amount, now)
		}
	}, false},
	"ignores ErrUnsettled, and posts around the transaction": {crashpoint.ResultNeverArrived, checkInvariant, func(s *shop) {
		s.sale = func(s *shop, w http.ResponseWriter, r *http.Request, n int) {
			paid, err := s.charge.Call(r.Context(), card{N: n, Amount: s.price()})
			if n < 0 || errors.Is(err, idempotency.ErrKeyRecorded) {
				refuse(w, err)
				return
			}
			if _, err := s.pool.Exec(context.Background(), "INSERT INTO postings (n, charge, amount) VALUES ($1, $2, $3)", n, paid.ID, paid.Amount); err != nil {
				return
			}
			w.WriteHeader(http.StatusCreated)
		}
		s.psp.FaultOf = func(string, int) Fault { return NoFault }
	}, false},
	"ignores the error": {"Prepare", checkAccepted, func(s *shop) {
		s.sale = func(s *shop, w http.ResponseWriter, r *http.Request, n int) {
			paid, _ := s.charge.Call(r.Context(), card{N: n, Amount: s.price()})
			s.post(w, r, paid.N, paid.ID, paid.Amount, "")
		}
	}, false},
	"posts without a look at the result": {crashpoint.AfterReply, checkInvariant, func(s *shop) {
		s.sale = func(s *shop, w http.ResponseWriter, r *http.Request, n int) {
			amount := s.price()
			paid, err := s.charge.Call(r.Context(), card{N: n, Amount: amount})
			if err != nil {
				refuse(w, err)
				return
			}
			s.post(w, r, n, paid.ID, amount, "")
		}
		s.psp.FaultOf = func(string, int) Fault { return NoFault } // it is right as long as nothing fails
	}, false},
	"asks for the charge only in its first run": {crashpoint.AfterResult, checkParked, func(s *shop) {
		s.psp.FaultOf = func(string, int) Fault { return NoFault }
		seen := map[int]bool{}
		s.sale = func(s *shop, w http.ResponseWriter, r *http.Request, n int) {
			s.lock <- struct{}{}
			again := seen[n]
			seen[n] = true
			<-s.lock
			if again {
				w.WriteHeader(http.StatusCreated)
				return
			}
			simple(s, w, r, n)
		}
	}, false},
	"its route has no Resumable name": {"Prepare", checkSettled, func(s *shop) { s.unnamed = true }, true},
}

// simple is correct: it charges, and posts.
func simple(s *shop, w http.ResponseWriter, r *http.Request, n int) {
	paid, err := s.charge.Call(r.Context(), card{N: n, Amount: s.price()})
	if err != nil {
		refuse(w, err)
		return
	}
	s.post(w, r, paid.N, paid.ID, paid.Amount, "")
}

func TestMistakesInHandlersWithCallsAreFound(t *testing.T) {
	t.Parallel()
	for name, bug := range callBugs {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newShop(t)
			bug.plant(s)
			wantFinding(t, prove(t, s.config(), bug.part, seeded{waits: bug.waits}.patience()), bug.check)
		})
	}
}

// The engine makes some mistakes good by itself, so they are no findings: it drops any answer after
// an unsettled call, and the writes in the transaction.
func TestAnswersToUnsettledCallsAreDropped(t *testing.T) {
	t.Parallel()
	for name, answer := range map[string]func(s *shop, w http.ResponseWriter, r *http.Request, n int){
		"402": func(_ *shop, w http.ResponseWriter, _ *http.Request, _ int) {
			http.Error(w, "the card was declined", http.StatusPaymentRequired)
		},
		"201": func(s *shop, w http.ResponseWriter, r *http.Request, n int) { s.post(w, r, n, "", 0, "") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			handle := func(s *shop, w http.ResponseWriter, r *http.Request, n int) {
				paid, err := s.charge.Call(r.Context(), card{N: n, Amount: s.price()})
				switch {
				case errors.Is(err, effect.ErrUnsettled):
					answer(s, w, r, n)
				case err != nil:
					refuse(w, err)
				default:
					s.post(w, r, paid.N, paid.ID, paid.Amount, "")
				}
			}
			for _, part := range []string{crashpoint.ResultNeverArrived, crashpoint.ResultLost} {
				s := newShop(t)
				s.sale = handle
				if found := prove(t, s.config(), part, 20*time.Second); len(found) > 0 {
					t.Errorf("%s: %q", part, found)
				}
			}
		})
	}
}
