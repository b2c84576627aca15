package postgres_test

import (
	"context"
	"errors"
	"log/slog"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/message"
	"github.com/paidonce/idempotency/relay"
	"github.com/paidonce/idempotency/storage/postgres"
)

// CheckMessages names each right that a role lacks for a use. With the rights that it names the use
// works.
func TestCheckMessagesNamesTheRightsThatAreMissing(t *testing.T) {
	t.Parallel()
	quiet := slog.New(slog.DiscardHandler)
	// receive has a consumer handle a message, park one, retry it and bury it.
	receive := func(t *testing.T, store consumer.Store) {
		t.Helper()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		dead := make(chan struct{})
		c := consumer.New("ledger", store, noSource{}, func(_ context.Context, m *consumer.Delivery) error {
			if string(m.Body) == "bad" {
				return errors.New("bad")
			}
			return nil
		}, &consumer.Options{AttemptsInPlace: 1, AttemptsMax: 2, BackoffMax: time.Millisecond, ParkedInterval: time.Millisecond, Logger: quiet, OnBatch: func(end consumer.BatchEnd) {
			if end.Dead > 0 {
				close(dead)
			}
		}})
		all := deliveries(0, 2)
		all[1].Body = []byte("bad")
		deadline := time.Now().Add(30 * time.Second)
		for settled := 0; settled < len(all); {
			n, pause := c.Receive(ctx, ledgerPartition, all[settled:])
			if settled += n; time.Now().After(deadline) {
				t.Fatal("the messages are not settled")
			}
			time.Sleep(min(pause, 10*time.Millisecond))
		}
		done := make(chan error, 1)
		go func() { done <- c.Run(ctx) }()
		select {
		case <-dead:
		case <-time.After(30 * time.Second):
			t.Error("the parked message is not retried")
		}
		cancel()
		<-done
	}
	for use, test := range map[postgres.MessageUse]struct {
		grants int
		do     func(t *testing.T, s *testservice.Service, store *postgres.Store)
	}{
		postgres.UsePublish: {1, func(t *testing.T, s *testservice.Service, store *postgres.Store) {
			s.Engine = idempotency.NewEngine(store, nil)
			publishOne(t, s)
		}},
		postgres.UseRelay: {1, func(t *testing.T, s *testservice.Service, store *postgres.Store) {
			publishOne(t, s)
			for _, result := range []error{relay.ErrRefused, nil} {
				s.Exec(t, "UPDATE message_outbox SET refused = NULL")
				shards, err := store.Outbox().Waiting(t.Context())
				if err != nil || len(shards) != 1 {
					t.Fatalf("%v, %v", shards, err)
				}
				if _, err := store.Outbox().Drain(t.Context(), shards[0], relay.Limits{Messages: 1, Bytes: 1}, func(context.Context, []message.Message) []error { return []error{result} }); err != nil {
					t.Error(err)
				}
			}
		}},
		postgres.UseConsume: {2, func(t *testing.T, _ *testservice.Service, store *postgres.Store) { receive(t, store.Inbox()) }},
		postgres.UseQueue: {3, func(t *testing.T, s *testservice.Service, store *postgres.Store) {
			publishOne(t, s)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			queue := store.Queue("transfers")
			done := make(chan error, 1)
			go func() {
				done <- consumer.New("mailer", queue, queue, func(context.Context, *consumer.Delivery) error { return nil }, &consumer.Options{Logger: quiet}).Run(ctx)
			}()
			for deadline := time.Now().Add(30 * time.Second); s.Count(t, "SELECT count(*) FROM message_outbox") > 0; time.Sleep(5 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Error("the queue is not emptied")
					break
				}
			}
			cancel()
			<-done
		}},
	} {
		t.Run(string(use), func(t *testing.T) {
			t.Parallel()
			s := testservice.New(t, nil)
			grants := []string{"SELECT, INSERT ON idempotency_keys"}
			store, _ := s.Role(t, grants...)
			if err := store.CheckMessages(t.Context()); err != nil {
				t.Errorf("the tables alone: %v", err)
			}
			err := store.CheckMessages(t.Context(), use)
			found := regexp.MustCompile(`GRANT (.* ON \S+) TO test_`).FindAllStringSubmatch(errorText(err), -1)
			if !errors.Is(err, postgres.ErrRightMissing) || len(found) != test.grants {
				t.Fatalf("%v", err)
			}
			for _, grant := range found {
				grants = append(grants, grant[1])
			}
			store, _ = s.Role(t, grants...)
			if err := store.CheckMessages(t.Context(), use); err != nil {
				t.Error(err)
			}
			test.do(t, s, store)
		})
	}
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// publishOne has a request publish a message.
func publishOne(t *testing.T, s *testservice.Service) {
	t.Helper()
	result := s.Engine.Do(t.Context(), testservice.Request(idempotency.Key{Scope: "acme", Value: "k"}), func(ctx context.Context) (*idempotency.Answer, error) {
		return &idempotency.Answer{Status: 201}, message.Publish(ctx, "transfer", message.Message{Topic: "transfers", Body: []byte("paid")})
	})
	if result.Err != nil {
		t.Fatal(result.Err)
	}
}

// CheckMessages finds each fault that could lose a message, and its remedy mends it.
func TestCheckMessagesFindsWhatLosesMessages(t *testing.T) {
	t.Parallel()
	s := testservice.New(t, nil)
	s.Exec(t, "CREATE FUNCTION skip() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$")
	for name, test := range map[string]struct {
		sick string
		want error
	}{
		"unlogged": {"ALTER TABLE message_parked SET UNLOGGED", postgres.ErrTableUnlogged},
		"trigger":  {"CREATE TRIGGER skip BEFORE INSERT ON message_outbox FOR EACH ROW EXECUTE FUNCTION skip()", postgres.ErrTableUnsafe},
		"rule":     {"CREATE RULE skip AS ON DELETE TO message_offsets DO INSTEAD NOTHING", postgres.ErrTableUnsafe},
	} {
		s.Exec(t, test.sick)
		err := s.Store.CheckMessages(t.Context())
		if !errors.Is(err, test.want) {
			t.Errorf("%s: %v", name, err)
			continue
		}
		remedy := regexp.MustCompile(`(ALTER TABLE|DROP RULE) [^,\n]*`).FindString(err.Error())
		s.Exec(t, remedy)
		if err := s.Store.CheckMessages(t.Context()); err != nil {
			t.Errorf("%s: after %s: %v", name, remedy, err)
		}
	}
	role, _ := s.Role(t, "SELECT, INSERT, UPDATE, DELETE ON message_outbox")
	s.Exec(t, "ALTER TABLE message_outbox ENABLE ROW LEVEL SECURITY")
	if err := role.CheckMessages(t.Context(), postgres.UseRelay); !errors.Is(err, postgres.ErrRowSecurityActive) || !strings.Contains(err.Error(), "DISABLE ROW LEVEL SECURITY") {
		t.Errorf("row-level security: %v", err)
	}
	s.Exec(t, "ALTER TABLE message_outbox DISABLE ROW LEVEL SECURITY, DROP CONSTRAINT message_outbox_pkey")
	if err := s.Store.CheckMessages(t.Context()); !errors.Is(err, postgres.ErrSchemaOutdated) || !strings.Contains(err.Error(), "message_outbox_pkey") {
		t.Errorf("no primary key: %v", err)
	}
	s.Exec(t, "DROP TABLE message_outbox")
	if err := s.Store.CheckMessages(t.Context()); !errors.Is(err, postgres.ErrSchemaOutdated) || !strings.Contains(err.Error(), "run the migrations") {
		t.Errorf("no table: %v", err)
	}
	if err := s.Store.CheckMessages(t.Context(), "sell"); err == nil {
		t.Error("an unknown use is checked")
	}
	if err := s.Store.Check(t.Context()); err != nil {
		t.Errorf("a service without messages needs no tables: %v", err)
	}
}
