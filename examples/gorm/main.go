// Command gorm shows GORM inside an idempotent handler: one *gorm.DB, opened once. Its writes are
// committed with the answer.
//
//	go run -C examples/gorm .
package main

import (
	"context"
	"crypto/rand"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"gorm.io/driver/postgres"
	"gorm.io/gorm"
	"gorm.io/gorm/logger"

	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/migrations"
	paidonce "github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/sqldb"
)

func main() { start("gorm", "127.0.0.1:8089", run) }

func run(ctx context.Context, address string) error {
	url, stop, err := databaseURL(ctx)
	if err != nil {
		return err
	}
	defer stop()
	store, err := paidonce.Open(ctx, url, nil)
	if err != nil {
		return err
	}
	defer store.Close()
	db := sqldb.Open(store, &sqldb.Options{Pool: true}) // the pool: for GET, and for AutoMigrate
	defer func() { _ = db.Close() }()
	handler, err := newHandler(ctx, store, db)
	if err != nil {
		return err
	}
	return serve(ctx, address, handler, greet)
}

// Account and Transfer are tables of GORM's, in a schema of their own.
type Account struct {
	Name    string `gorm:"primaryKey"`
	Balance int64
}

func (Account) TableName() string { return "gorm_example.accounts" }

type Transfer struct {
	ID     int64  `json:"id"`
	Payer  string `json:"payer"`
	Payee  string `json:"payee"`
	Amount int64  `json:"amount"`
}

func (Transfer) TableName() string { return "gorm_example.transfers" }

// newHandler migrates the database and returns the service.
func newHandler(ctx context.Context, store *paidonce.Store, db *sql.DB) (http.Handler, error) {
	if err := migrations.Up(ctx, store, nil); err != nil {
		return nil, err
	}
	orm, err := gorm.Open(postgres.New(postgres.Config{Conn: db}), &gorm.Config{Logger: logger.Discard})
	if err != nil {
		return nil, err
	}
	setUp := orm.WithContext(ctx)
	if err := setUp.Exec("CREATE SCHEMA IF NOT EXISTS gorm_example").Error; err != nil {
		return nil, err
	}
	if err := setUp.AutoMigrate(&Account{}, &Transfer{}); err != nil {
		return nil, err
	}
	if err := setUp.FirstOrCreate(&Account{Name: "alice", Balance: 10000}).Error; err != nil {
		return nil, err
	}
	if err := setUp.FirstOrCreate(&Account{Name: "bob"}).Error; err != nil {
		return nil, err
	}

	b := &bank{orm}
	idem := middleware.New(store, accountID, nil)
	mux := http.NewServeMux()
	mux.Handle("POST /transfers", idem.Handler(http.HandlerFunc(b.transfer)))
	mux.HandleFunc("GET /transfers", b.transfers)
	return mux, nil
}

// accountID returns the account that your authentication, mounted outside, has found. If it is
// empty the answer is 401.
func accountID(r *http.Request) (string, error) { return r.Header.Get("Account"), nil }

type bank struct{ orm *gorm.DB }

var errOverdrawn = errors.New("there is not enough money")

// transfer writes in the middleware's transaction, because WithContext has the request's context.
func (b *bank) transfer(w http.ResponseWriter, r *http.Request) {
	var t struct {
		To     string
		Amount int64
	}
	if err := json.NewDecoder(r.Body).Decode(&t); err != nil || t.Amount <= 0 {
		http.Error(w, "send to and a positive amount", http.StatusBadRequest)
		return
	}
	transfer := Transfer{Payer: r.Header.Get("Account"), Payee: t.To, Amount: t.Amount}
	// Inside of the handler's transaction this one is a savepoint, which costs no round trip.
	err := b.orm.WithContext(r.Context()).Transaction(func(tx *gorm.DB) error {
		for _, change := range []struct {
			name   string
			amount int64
		}{{transfer.Payer, -t.Amount}, {transfer.Payee, t.Amount}} {
			account := Account{Name: change.name}
			moved := tx.Model(&account).Where("balance + ? >= 0", change.amount).Update("balance", gorm.Expr("balance + ?", change.amount))
			switch {
			case moved.Error != nil:
				return moved.Error
			case moved.RowsAffected == 0 && change.amount < 0:
				return errOverdrawn
			case moved.RowsAffected == 0:
				return gorm.ErrRecordNotFound
			}
		}
		return tx.Create(&transfer).Error
	})
	switch {
	case errors.Is(err, errOverdrawn):
		http.Error(w, errOverdrawn.Error(), http.StatusPaymentRequired)
	case errors.Is(err, gorm.ErrRecordNotFound):
		http.Error(w, "there is no such account", http.StatusNotFound) // the payer's change is undone
	case err != nil:
		http.Error(w, "the transfer failed", http.StatusInternalServerError)
	default:
		writeJSON(w, http.StatusCreated, transfer)
	}
}

// transfers only reads, so it needs no key: the same *gorm.DB uses the pool here.
func (b *bank) transfers(w http.ResponseWriter, r *http.Request) {
	all := []Transfer{}
	if err := b.orm.WithContext(r.Context()).Order("id").Find(&all, "payer = @name OR payee = @name", map[string]any{"name": r.Header.Get("Account")}).Error; err != nil {
		http.Error(w, "the transfers can't be read", http.StatusInternalServerError)
		return
	}
	writeJSON(w, http.StatusOK, all)
}

func writeJSON(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // a client that is gone will retry
}

// greet prints lines to try. It prints the same line twice on purpose: both have the same key.
func greet(url string) {
	curl := fmt.Sprintf(`curl -i %s/transfers -H 'Account: alice' -H 'Idempotency-Key: %s' -d '{"to":"bob","amount":1250}'`, url, rand.Text())
	fmt.Printf(`gorm is at %s

Send a transfer: 201, Idempotency-Status: executed
  %s
Send it again: 201, Idempotency-Status: replayed, and the same bytes
  %s
There is one:
  curl %s/transfers -H 'Account: alice'
`, url, curl, curl, url)
}
