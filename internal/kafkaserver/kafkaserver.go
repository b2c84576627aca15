// Package kafkaserver runs an Apache Kafka for tests: one process that is both broker and
// controller (KRaft), and listens on 127.0.0.1.
//
// It downloads nothing. The script .ci/kafka gets Kafka's jars and prints their folder.
package kafkaserver

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/paidonce/idempotency/internal/deadline"
)

// JarsVariable is the environment variable with the folder of Kafka's jars.
const JarsVariable = "PAIDONCE_KAFKA_JARS"

const (
	// startWaitMax bounds the time until a broker is ready, recovery of its log included.
	startWaitMax = 3 * time.Minute
	// stopWaitMax bounds an orderly stop.
	stopWaitMax = 20 * time.Second

	readyPollInterval = 20 * time.Millisecond
	// ready is the line that Kafka logs when clients can use the broker.
	ready = "Kafka Server started"

	// Ports are chosen below those that Linux gives to connections (from 32768). Otherwise a client
	// could get the port of a broker that is about to restart.
	portMin, portMax = 20000, 32000
	portTriesMax     = 5
)

// ErrNoJars: neither Options.Jars nor the environment names the jars. A test skips then.
var ErrNoJars = errors.New("NOT RUN: .ci/run jvm runs this on Apache Kafka; or set " + JarsVariable + " to the folder that .ci/kafka prints")

// Options are optional. Nil means all defaults.
type Options struct {
	// Jars is the folder of Kafka's jars. Defaults to the environment variable PAIDONCE_KAFKA_JARS.
	Jars string

	// Port is the port for clients. Defaults to a free one.
	Port int

	// Settings are lines of server.properties such as "log.retention.bytes": "1000". They override
	// this package's own, which suit tests: one replica, no automatic topics, groups that start at
	// once, and session timeouts from 100 ms.
	Settings map[string]string
}

// settings returns the settings that suit tests.
func settings() map[string]string {
	return map[string]string{
		"auto.create.topics.enable":                        "false",
		"offsets.topic.replication.factor":                 "1",
		"offsets.topic.num.partitions":                     "1",
		"transaction.state.log.replication.factor":         "1",
		"transaction.state.log.min.isr":                    "1",
		"transaction.state.log.num.partitions":             "1",
		"share.coordinator.state.topic.replication.factor": "1",
		"share.coordinator.state.topic.min.isr":            "1",
		"share.coordinator.state.topic.num.partitions":     "1",
		"group.initial.rebalance.delay.ms":                 "0",
		"group.min.session.timeout.ms":                     "100",
		"group.consumer.min.session.timeout.ms":            "100",
		"group.consumer.session.timeout.ms":                "6000",
		"group.consumer.min.heartbeat.interval.ms":         "50",
		"group.consumer.heartbeat.interval.ms":             "100",
	}
}

// Server is an Apache Kafka. Its methods are safe for concurrent use.
type Server struct {
	java, jars, dir string
	port            int

	mu      sync.Mutex // held during a start and a stop
	process *process
}

// process is one process of the broker: each start makes one.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it is gone
}

// Start starts a broker that keeps its data and its log (kafka.log) in the folder dir, and returns
// when clients can use it, after some seconds. It makes the folder if that is missing, and uses
// data that an earlier broker left in it. ctx bounds only Start. If Start fails, it leaves no
// process behind; if Kafka ended or was too slow, the error contains the last lines of its log. On
// Linux the broker dies with this process.
func Start(ctx context.Context, dir string, opts *Options) (*Server, error) {
	if opts == nil {
		opts = &Options{}
	}
	s := &Server{jars: opts.Jars}
	if s.jars == "" {
		s.jars = os.Getenv(JarsVariable)
	}
	if s.jars == "" {
		return nil, ErrNoJars
	}
	if found, _ := filepath.Glob(filepath.Join(s.jars, "kafka_*.jar")); len(found) == 0 {
		return nil, fmt.Errorf("start kafka: there is no kafka_*.jar in %s: set %s to the folder that .ci/kafka prints", s.jars, JarsVariable)
	}
	var err error
	if s.java, err = findJava(); err != nil {
		return nil, fmt.Errorf("start kafka: %w", err)
	}
	if s.dir, err = filepath.Abs(dir); err != nil {
		return nil, fmt.Errorf("start kafka: %w", err)
	}
	for try := 1; ; try++ {
		err := s.configureAndLaunch(ctx, opts)
		if err == nil {
			return s, nil
		}
		// Somebody else may have taken a port between its choice and Kafka's start.
		if opts.Port != 0 || try == portTriesMax || !strings.Contains(err.Error(), "BindException") {
			return nil, fmt.Errorf("start kafka: %w", err)
		}
	}
}

func findJava() (string, error) {
	if home := os.Getenv("JAVA_HOME"); home != "" {
		java := filepath.Join(home, "bin", "java")
		if _, err := exec.LookPath(java); err != nil {
			return "", fmt.Errorf("JAVA_HOME has no java: %w: set it to a Java 17 or newer", err)
		}
		return java, nil
	}
	java, err := exec.LookPath("java")
	if err != nil {
		return "", fmt.Errorf("there is no java in PATH: install a Java 17 or newer (Debian's package openjdk-17-jre-headless), or set JAVA_HOME")
	}
	return java, nil
}

func (s *Server) configureAndLaunch(ctx context.Context, opts *Options) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	controller, err := freePort(0)
	if err != nil {
		return err
	}
	if s.port = opts.Port; s.port == 0 {
		if s.port, err = freePort(controller); err != nil {
			return err
		}
	}
	if err := s.checkPort(); err != nil {
		return err
	}
	all := settings()
	maps.Copy(all, opts.Settings)
	maps.Copy(all, map[string]string{
		"process.roles":             "broker,controller",
		"node.id":                   "1",
		"log.dirs":                  filepath.ToSlash(s.data()),
		"controller.listener.names": "CONTROLLER",
		// A quorum of fixed members: with the other kind, the data contain the controller's port.
		"controller.quorum.voters": fmt.Sprintf("1@127.0.0.1:%d", controller),
		"listeners":                fmt.Sprintf("PLAINTEXT://%s,CONTROLLER://127.0.0.1:%d", s.Address(), controller),
		"advertised.listeners":     "PLAINTEXT://" + s.Address(),
	})
	var lines strings.Builder
	for _, name := range slices.Sorted(maps.Keys(all)) {
		fmt.Fprintf(&lines, "%s=%s\n", name, all[name])
	}
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(s.properties(), []byte(lines.String()), 0o644); err != nil {
		return err
	}
	if err := s.format(ctx); err != nil {
		return err
	}
	return s.launch(ctx)
}

func (s *Server) data() string       { return filepath.Join(s.dir, "data") }
func (s *Server) properties() string { return filepath.Join(s.dir, "server.properties") }

// command returns a command that runs one of Kafka's programs, with little memory and a quick
// start. Its log has warnings, errors, and the line that says that the broker is ready.
func (s *Server) command(ctx context.Context, arguments ...string) *exec.Cmd {
	return exec.CommandContext(ctx, s.java, append([]string{
		"-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1",
		"-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-Dorg.slf4j.simpleLogger.log.kafka.server.KafkaRaftServer=info",
		"-Dorg.slf4j.simpleLogger.showDateTime=true", "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd HH:mm:ss.SSS",
		"-cp", filepath.Join(s.jars, "*"),
	}, arguments...)...)
}

// format prepares the folder for the data, unless an earlier start has done it.
func (s *Server) format(ctx context.Context) error {
	if _, err := os.Stat(filepath.Join(s.data(), "meta.properties")); err == nil {
		return nil
	}
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails
	id[0] &= 0x7f        // in base64 it begins with no "-", which would be an option
	cmd := s.command(ctx, "kafka.tools.StorageTool", "format", "-t", base64.RawURLEncoding.EncodeToString(id), "-c", s.properties())
	if out, err := cmd.CombinedOutput(); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("format the data folder: %w:\n%s", err, lastLines(string(out)))
	}
	return nil
}

// checkPort returns an error if something listens on the port. Kafka would report that too, but
// after some seconds, and not in one line.
func (s *Server) checkPort() error {
	listener, err := net.Listen("tcp", s.Address())
	if err != nil {
		return fmt.Errorf("the port is in use: %w: end the process that listens there, or choose another port", err)
	}
	return listener.Close()
}

// launch starts the broker and returns when it is ready.
func (s *Server) launch(ctx context.Context) error {
	log, err := os.OpenFile(s.LogPath(), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	defer log.Close() // the broker has its own copy
	info, err := log.Stat()
	if err != nil {
		return err
	}
	cmd := s.command(context.WithoutCancel(ctx), "kafka.Kafka", s.properties())
	cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, log, log
	if s.process, err = startProcess(cmd); err != nil {
		return fmt.Errorf("run %s: %w", s.java, err)
	}
	if err := s.awaitReady(ctx, info.Size()); err != nil {
		s.process.kill()
		return err
	}
	return nil
}

// awaitReady returns when the log says that the broker is ready. It reads the log from this offset:
// the part before it is from earlier processes.
func (s *Server) awaitReady(ctx context.Context, logFrom int64) error {
	ctx, cancel := context.WithTimeoutCause(ctx, startWaitMax, fmt.Errorf("kafka was not ready within %s", startWaitMax))
	defer cancel()
	for {
		ended := s.process.gone()
		text, err := os.ReadFile(s.LogPath())
		if err != nil {
			return err
		}
		logged := string(text[min(logFrom, int64(len(text))):])
		switch {
		case ended:
			return fmt.Errorf("kafka ended at its start (%s); the end of %s:\n%s", s.process.cmd.ProcessState, s.LogPath(), lastLines(logged))
		case strings.Contains(logged, ready):
			return nil
		}
		if deadline.Sleep(ctx, readyPollInterval) != nil {
			return fmt.Errorf("%w; the end of %s:\n%s", context.Cause(ctx), s.LogPath(), lastLines(logged))
		}
	}
}

// Address returns the host and port for clients. It stays the same after a restart.
func (s *Server) Address() string { return net.JoinHostPort("127.0.0.1", strconv.Itoa(s.port)) }

// LogPath returns the path of the broker's log: the warnings and errors of all its processes.
func (s *Server) LogPath() string { return filepath.Join(s.dir, "kafka.log") }

// PID returns the id of the broker's process, or of its last one if it has ended.
func (s *Server) PID() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.process.cmd.Process.Pid
}

// Kill ends the broker without warning (SIGKILL), and returns when it has ended. It does nothing if
// the broker has ended already.
func (s *Server) Kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.process.kill()
}

// Restart kills the broker if it runs, starts it again with its data at its address, and returns when
// clients can use it. Its errors are those of [Start].
func (s *Server) Restart(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.process.kill()
	err := s.checkPort()
	if err == nil {
		err = s.launch(ctx)
	}
	if err != nil {
		return fmt.Errorf("restart kafka: %w", err)
	}
	return nil
}

// Stop shuts the broker down (SIGTERM; on Windows it kills it), and returns when it has ended. If
// that takes longer than 20 seconds, it kills the broker and returns an error; the next start
// recovers its data. It does nothing if the broker has ended already.
func (s *Server) Stop() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.process.gone() {
		return nil
	}
	_ = s.process.resume()    // a paused process does not react to SIGTERM
	_ = s.process.terminate() // fails if it is gone, which the wait notices
	select {
	case <-s.process.done:
		return nil
	case <-time.After(stopWaitMax):
		s.process.kill()
		return fmt.Errorf("stop kafka: it did not end within %s and was killed; the end of %s:\n%s", stopWaitMax, s.LogPath(), s.tail())
	}
}

func (s *Server) tail() string {
	text, err := os.ReadFile(s.LogPath())
	if err != nil {
		return err.Error()
	}
	return lastLines(string(text))
}

// Pause stops the broker's process (SIGSTOP): its connections stay open, and nothing answers. On
// Windows it returns errors.ErrUnsupported.
func (s *Server) Pause() error { return s.signal("pause", (*process).pause) }

// Resume continues a paused broker (SIGCONT).
func (s *Server) Resume() error { return s.signal("resume", (*process).resume) }

func (s *Server) signal(verb string, send func(*process) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := send(s.process); err != nil {
		return fmt.Errorf("%s kafka: %w", verb, err)
	}
	return nil
}

func (p *process) gone() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill() // fails only if it is gone
	<-p.done
}

// freePort returns a port on which nothing listens, other than taken.
func freePort(taken int) (int, error) {
	var last error
	for range 100 {
		n, err := rand.Int(rand.Reader, big.NewInt(portMax-portMin))
		if err != nil {
			return 0, err
		}
		port := portMin + int(n.Int64())
		if port == taken {
			continue
		}
		listener, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err == nil {
			return port, listener.Close()
		}
		last = err
	}
	return 0, fmt.Errorf("find a free port: %w", last)
}

// lastLines returns the end of a log without the lines of Java's stack traces. The line that names
// the error comes before them.
func lastLines(text string) string {
	const linesMax = 12
	lines := slices.DeleteFunc(strings.Split(strings.TrimSpace(text), "\n"), func(line string) bool {
		return strings.HasPrefix(line, "\tat ") || strings.HasPrefix(line, "\t... ")
	})
	return strings.Join(lines[max(0, len(lines)-linesMax):], "\n")
}
