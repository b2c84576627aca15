package endtoend_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"strconv"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	natsgo "github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/twmb/franz-go/pkg/kadm"
	"github.com/twmb/franz-go/pkg/kfake"
	"github.com/twmb/franz-go/pkg/kgo"

	"github.com/paidonce/idempotency/broker/kafka"
	"github.com/paidonce/idempotency/broker/nats"
	"github.com/paidonce/idempotency/consumer"
	"github.com/paidonce/idempotency/internal/kafkaserver"
	"github.com/paidonce/idempotency/relay"
)

const (
	topic      = "moves"
	partitions = 6

	startMax = 60 * time.Second // of a broker
	askMax   = 10 * time.Second // one question to a broker

	// streamWindow is the shortest that NATS allows. Copies come later, so that it drops none of them.
	streamWindow = 100 * time.Millisecond
)

// source is the subscription of a consumer process.
type source struct {
	NATS           bool // otherwise Kafka
	Address        string
	ServerAssigned bool
	Session        time.Duration
}

// kafka returns a client of Kafka.
func (s source) kafka(logger *slog.Logger) (*kafka.Client, error) {
	return kafka.Connect([]string{s.Address}, &kafka.Options{
		Kgo:            []kgo.Opt{kgo.RetryBackoffFn(func(int) time.Duration { return 50 * time.Millisecond }), kgo.MetadataMinAge(50 * time.Millisecond)},
		ServerAssigned: s.ServerAssigned, SessionTimeout: s.Session, RebalanceTimeout: s.rebalance(), Logger: logger,
	})
}

// nats returns a client of NATS.
func (s source) nats(logger *slog.Logger) (*nats.Client, error) {
	return nats.Connect(s.Address, &nats.Options{
		Nats:           []natsgo.Option{natsgo.ReconnectWait(50 * time.Millisecond), natsgo.ReconnectJitter(time.Millisecond, time.Millisecond)},
		SessionTimeout: s.Session, RebalanceTimeout: s.rebalance(), Logger: logger,
	})
}

func (s source) rebalance() time.Duration { return max(2*s.Session, 3*batchTimeout) }

func (s source) open(logger *slog.Logger) (consumer.Source, error) {
	if s.NATS {
		client, err := s.nats(logger)
		if err != nil {
			return nil, err
		}
		return client.Source(consumerName, topic), nil
	}
	client, err := s.kafka(logger)
	if err != nil {
		return nil, err
	}
	return client.Source(consumerName, topic), nil
}

// brokerServer is a broker's process.
type brokerServer interface {
	start(ctx context.Context) error
	// crash is kill -9. start then starts it again, on its data and at its address.
	crash() error
	address() string
}

// broker is a broker with the topic.
type broker struct {
	brokerServer
	source source

	publisher interface {
		relay.Publisher
		Close()
	}
	// logs returns the offset behind the last message of each partition, and the number of messages.
	logs func(ctx context.Context) (ends map[int32]int64, messages int64, err error)

	closers []func()
}

// open starts the broker and makes the topic.
func (b *broker) open(ctx context.Context) error {
	if err := b.start(ctx); err != nil {
		return err
	}
	b.source.Address = b.address()
	if b.source.NATS {
		return b.openNATS(ctx)
	}
	return b.openKafka(ctx)
}

func (b *broker) openKafka(ctx context.Context) error {
	client, err := b.source.kafka(slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	b.publisher = client.Publisher()
	one, err := kgo.NewClient(kgo.SeedBrokers(b.source.Address), kgo.DisableClientMetrics())
	if err != nil {
		return err
	}
	b.closers = append(b.closers, one.Close)
	admin := kadm.NewClient(one)
	ctx, cancel := context.WithTimeout(ctx, startMax)
	defer cancel()
	created, err := admin.CreateTopic(ctx, partitions, 1, nil, topic)
	if err := cmp.Or(err, created.Err); err != nil {
		return fmt.Errorf("create the topic: %w", err)
	}
	b.logs = func(ctx context.Context) (map[int32]int64, int64, error) {
		ctx, cancel := context.WithTimeout(ctx, askMax)
		defer cancel()
		starts, err := admin.ListStartOffsets(ctx, topic)
		if err != nil {
			return nil, 0, err
		}
		listed, err := admin.ListEndOffsets(ctx, topic)
		if err != nil {
			return nil, 0, err
		}
		ends, messages := map[int32]int64{}, int64(0)
		err = cmp.Or(starts.Error(), listed.Error())
		listed.Each(func(end kadm.ListedOffset) {
			start, _ := starts.Lookup(topic, end.Partition)
			ends[end.Partition] = end.Offset
			messages += end.Offset - start.Offset
		})
		return ends, messages, err
	}
	return nil
}

func (b *broker) openNATS(ctx context.Context) error {
	client, err := b.source.nats(slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	b.publisher = client.Publisher()
	ctx, cancel := context.WithTimeout(ctx, startMax)
	defer cancel()
	if err := client.CreateTopic(ctx, topic, &nats.TopicOptions{Partitions: partitions, Stream: jetstream.StreamConfig{Duplicates: streamWindow}}); err != nil {
		return err
	}
	conn, err := natsgo.Connect(b.source.Address, natsgo.MaxReconnects(-1), natsgo.ReconnectWait(50*time.Millisecond))
	if err != nil {
		return err
	}
	b.closers = append(b.closers, conn.Close)
	js, err := jetstream.New(conn)
	if err != nil {
		return err
	}
	b.logs = func(ctx context.Context) (map[int32]int64, int64, error) {
		ctx, cancel := context.WithTimeout(ctx, askMax)
		defer cancel()
		ends, messages := map[int32]int64{}, int64(0)
		for number := range int32(partitions) {
			stream, err := js.Stream(ctx, fmt.Sprintf("%s+%d", topic, number))
			if err != nil {
				return nil, 0, err
			}
			state := stream.CachedInfo().State
			ends[number] = int64(state.LastSeq) + 1 //nolint:gosec // small
			messages += int64(state.Msgs)           //nolint:gosec // small
		}
		return ends, messages, nil
	}
	return nil
}

func (b *broker) close() {
	if b.publisher != nil {
		b.publisher.Close()
	}
	for _, one := range b.closers {
		one()
	}
	_ = b.crash() // it may not have started
}

// ourServer is a broker that is a child: kfake or a NATS server. It writes each message to its disk
// before it confirms it.
type ourServer struct {
	child   child
	process *process
}

func newKfake(dir string, session time.Duration) *ourServer {
	return &ourServer{child: child{Role: roleKfake, Dir: dir, Session: session}}
}

func newNATS(dir string) *ourServer { return &ourServer{child: child{Role: roleNATS, Dir: dir}} }

// address implements brokerServer.
func (s *ourServer) address() string {
	address := net.JoinHostPort("127.0.0.1", strconv.Itoa(s.child.Port))
	if s.child.Role == roleNATS {
		return "nats://" + address
	}
	return address
}

// start implements brokerServer. The port stays the same.
func (s *ourServer) start(ctx context.Context) error {
	if s.child.Port == 0 {
		port, err := freePort()
		if err != nil {
			return err
		}
		s.child.Port = port
	}
	ready := make(chan struct{}, 1)
	p, err := startChild(s.child, func(line string) {
		if line == readyLine {
			ready <- struct{}{}
		}
	})
	if err != nil {
		return fmt.Errorf("start the broker: %w", err)
	}
	s.process = p
	ctx, cancel := context.WithTimeout(ctx, startMax)
	defer cancel()
	select {
	case <-ready:
		return nil
	case <-p.ended:
		return fmt.Errorf("the broker ended at once: %v\n%s", p.cmd.ProcessState, p.said())
	case <-ctx.Done():
		return fmt.Errorf("the broker is not ready: %w", ctx.Err())
	}
}

// crash implements brokerServer.
func (s *ourServer) crash() error {
	switch {
	case s.process == nil:
		return nil
	case !s.process.kill():
		return fmt.Errorf("the broker died unasked: %v\n%s", s.process.cmd.ProcessState, s.process.said())
	}
	return nil
}

// realKafka is an Apache Kafka.
type realKafka struct {
	dir     string
	session time.Duration
	server  *kafkaserver.Server
}

// address implements brokerServer.
func (k *realKafka) address() string { return k.server.Address() }

// start implements brokerServer.
func (k *realKafka) start(ctx context.Context) (err error) {
	if k.server != nil {
		return k.server.Restart(ctx)
	}
	k.server, err = kafkaserver.Start(ctx, k.dir, &kafkaserver.Options{Settings: map[string]string{
		"group.consumer.session.timeout.ms": strconv.FormatInt(k.session.Milliseconds(), 10),
	}})
	return err
}

// crash implements brokerServer.
func (k *realKafka) crash() error {
	if k.server != nil {
		k.server.Kill()
	}
	return nil
}

// freePort returns a port below those that the system gives to connections, so that nobody takes it
// between two lives of a broker.
func freePort() (int, error) {
	for range 100 {
		port := 20_000 + rand.IntN(12_000)
		if listener, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port))); err == nil {
			return port, listener.Close()
		}
	}
	return 0, errors.New("no port is free")
}

// serveKafka is a kfake process.
func (c child) serveKafka(ctx context.Context) error {
	session := strconv.FormatInt(c.Session.Milliseconds(), 10)
	cluster, err := kfake.NewCluster(
		kfake.Ports(c.Port), kfake.NumBrokers(1), kfake.DataDir(c.Dir), kfake.SyncWrites(), kfake.GroupMinSessionTimeout(100*time.Millisecond),
		kfake.BrokerConfigs(map[string]string{
			"group.initial.rebalance.delay.ms": "0", "group.consumer.heartbeat.interval.ms": "100", "group.consumer.session.timeout.ms": session,
			"group.consumer.min.heartbeat.interval.ms": "50", "group.consumer.min.session.timeout.ms": "500",
		}),
	)
	if err != nil {
		return err
	}
	defer cluster.Close()
	fmt.Println(readyLine)
	<-ctx.Done()
	return nil
}

// serveNATS is a NATS server's process.
func (c child) serveNATS(ctx context.Context) error {
	one, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: c.Port, JetStream: true, StoreDir: c.Dir, SyncAlways: true, NoLog: true, NoSigs: true,
		JetStreamMaxMemory: 64 << 20, JetStreamMaxStore: 4 << 30,
	})
	if err != nil {
		return err
	}
	one.Start()
	defer one.Shutdown()
	if !one.ReadyForConnections(startMax) {
		return errors.New("the server is not ready")
	}
	fmt.Println(readyLine)
	<-ctx.Done()
	return nil
}
