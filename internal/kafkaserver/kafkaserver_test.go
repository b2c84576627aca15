//go:build unix

package kafkaserver_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/paidonce/idempotency/internal/kafkaserver"
)

// fakeJars is a folder that looks like Kafka's.
func fakeJars(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "kafka_2.13-0.jar"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// fakeProgram puts a script in front of PATH.
func fakeProgram(t *testing.T, name, script string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+string(os.PathListSeparator)+os.Getenv("PATH"))
	t.Setenv("JAVA_HOME", "")
}

// fails starts a broker, and fails the test unless the error has these texts.
func fails(t *testing.T, opts *kafkaserver.Options, texts ...string) error {
	t.Helper()
	s, err := kafkaserver.Start(t.Context(), t.TempDir(), opts)
	if err == nil {
		s.Kill()
		t.Fatal("it started")
	}
	for _, text := range texts {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("the error has no %q: %v", text, err)
		}
	}
	return err
}

func TestStartWithoutJars(t *testing.T) {
	t.Setenv(kafkaserver.JarsVariable, "")
	if err := fails(t, nil, ".ci/run jvm", kafkaserver.JarsVariable); !errors.Is(err, kafkaserver.ErrNoJars) {
		t.Error("it is not ErrNoJars")
	}
	empty := t.TempDir()
	if err := fails(t, &kafkaserver.Options{Jars: empty}, empty, ".ci/kafka"); errors.Is(err, kafkaserver.ErrNoJars) {
		t.Error("a test would skip: the folder is wrong")
	}
}

func TestStartWithoutJava(t *testing.T) {
	jars := fakeJars(t)
	t.Setenv("JAVA_HOME", "")
	t.Setenv("PATH", t.TempDir())
	fails(t, &kafkaserver.Options{Jars: jars}, "no java in PATH", "install a Java 17")
	t.Setenv("JAVA_HOME", t.TempDir())
	fails(t, &kafkaserver.Options{Jars: jars}, "JAVA_HOME has no java")
}

func TestStartOnAPortInUse(t *testing.T) {
	jars := fakeJars(t)
	fakeProgram(t, "java", "echo it was started; exit 1")
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	port := listener.Addr().(*net.TCPAddr).Port
	fails(t, &kafkaserver.Options{Jars: jars, Port: port}, fmt.Sprint("127.0.0.1:", port), "in use", "choose another port")
}

func TestStartOfABrokerThatEnds(t *testing.T) {
	jars := fakeJars(t)
	fakeProgram(t, "java", `case "$*" in *StorageTool*) exit 0;; esac
echo 'the reason'; printf '\tat a.Java.method\n'; exit 3`)
	err := fails(t, &kafkaserver.Options{Jars: jars}, "kafka ended at its start (exit status 3)", "kafka.log:\nthe reason")
	if strings.Contains(err.Error(), "method") {
		t.Errorf("the stack trace hides the reason: %v", err)
	}
}

func TestStartInAFolderThatCannotBeFormatted(t *testing.T) {
	jars := fakeJars(t)
	fakeProgram(t, "java", "echo the reason; exit 2")
	fails(t, &kafkaserver.Options{Jars: jars}, "format the data folder: exit status 2:\nthe reason")
}

// Somebody else's broker may take a port after it was chosen.
func TestStartChoosesOtherPorts(t *testing.T) {
	jars := fakeJars(t)
	fakeProgram(t, "java", `case "$*" in *StorageTool*) exit 0;; esac
if [ -e ../tried ]; then echo Kafka Server started; exec sleep 600; fi
touch ../tried; echo 'java.net.BindException: Address already in use'; exit 1`)
	s, err := kafkaserver.Start(t.Context(), filepath.Join(t.TempDir(), "broker"), &kafkaserver.Options{Jars: jars})
	if err != nil {
		t.Fatal(err)
	}
	s.Kill()
	if text, err := os.ReadFile(s.LogPath()); err != nil || strings.Count(string(text), "Bind") != 1 {
		t.Errorf("%v: %s", err, text)
	}
}

func TestStartEndsWithItsContext(t *testing.T) {
	jars := fakeJars(t)
	fakeProgram(t, "java", `case "$*" in *StorageTool*) exit 0;; esac
echo 'not yet'; exec sleep 600`)
	ctx, cancel := context.WithTimeoutCause(t.Context(), 500*time.Millisecond, errors.New("too late"))
	defer cancel()
	_, err := kafkaserver.Start(ctx, t.TempDir(), &kafkaserver.Options{Jars: jars})
	if err == nil || !strings.Contains(err.Error(), "too late; the end of ") {
		t.Errorf("the error: %v", err)
	}
}

// fetch runs .ci/kafka with an empty cache, and returns its output.
func fetch(t *testing.T) string {
	t.Helper()
	script, err := filepath.Abs("../../.ci/kafka")
	if err != nil {
		t.Fatal(err)
	}
	cache := t.TempDir()
	cmd := exec.CommandContext(t.Context(), "bash", script)
	cmd.Env = append(os.Environ(), "XDG_CACHE_HOME="+cache)
	out, err := cmd.CombinedOutput()
	if err == nil {
		t.Fatalf("it succeeded: %s", out)
	}
	if left, _ := filepath.Glob(filepath.Join(cache, "paidonce", "servers", "*")); len(left) != 0 {
		t.Errorf("it left %q", left)
	}
	return string(out)
}

func TestFetchFails(t *testing.T) {
	fakeProgram(t, "mvn", "echo '[ERROR] Cannot access central in offline mode'; exit 1")
	if out := fetch(t); !strings.Contains(out, "offline mode\nKafka 4.4.0: Maven could not get it: its messages are above") {
		t.Errorf("it says:\n%s", out)
	}
	tools := t.TempDir()
	for _, name := range []string{"bash", "dirname", "id", "rm", "sed"} {
		path, err := exec.LookPath(name)
		if err == nil {
			err = os.Symlink(path, filepath.Join(tools, name))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("PATH", tools)
	if out := fetch(t); !strings.Contains(out, "install Maven") {
		t.Errorf("without Maven it says:\n%s", out)
	}
}

// A broker is killed, paused and stopped, and starts again with its data at its address.
func TestLivesOfABroker(t *testing.T) {
	dir := t.TempDir()
	s, err := kafkaserver.Start(t.Context(), dir, nil)
	if errors.Is(err, kafkaserver.ErrNoJars) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Kill)
	meta := func() string {
		text, err := os.ReadFile(filepath.Join(dir, "data", "meta.properties"))
		if err != nil {
			t.Error(err)
		}
		return string(text)
	}
	answers(t, s)
	address, pid, data := s.Address(), s.PID(), meta()

	if err := s.Restart(t.Context()); err != nil { // without warning
		t.Fatal(err)
	}
	answers(t, s)
	if s.Address() != address || s.PID() == pid || meta() != data {
		t.Errorf("at %s it was process %d; at %s it is %d", address, pid, s.Address(), s.PID())
	}
	if err := syscall.Kill(pid, 0); err == nil {
		t.Error("the killed process is there")
	}

	if err := s.Pause(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	if err := ask(ctx, s); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a paused broker: %v", err)
	}
	if err := s.Resume(); err != nil {
		t.Fatal(err)
	}
	answers(t, s)

	if err := s.Pause(); err != nil {
		t.Fatal(err)
	}
	if err := s.Stop(); err != nil {
		t.Error(err)
	}
	if err := s.Stop(); err != nil {
		t.Error(err)
	}
	s.Kill()
	again, err := kafkaserver.Start(t.Context(), dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Kill()
	answers(t, again)
	if meta() != data {
		t.Error("the data folder was formatted again")
	}

	_, err = kafkaserver.Start(t.Context(), t.TempDir(), &kafkaserver.Options{Settings: map[string]string{"group.min.session.timeout.ms": "many"}})
	if err == nil || !strings.Contains(err.Error(), "group.min.session.timeout.ms") {
		t.Errorf("a bad setting: %v", err)
	}
}

// answers fails the test if the broker does not answer.
func answers(t *testing.T, s *kafkaserver.Server) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := ask(ctx, s); err != nil {
		t.Errorf("the broker: %v", err)
	}
}

// ask sends an ApiVersions request, and waits for the beginning of the answer.
func ask(ctx context.Context, s *kafkaserver.Server) error {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", s.Address())
	if err != nil {
		return err
	}
	defer conn.Close()
	if at, ok := ctx.Deadline(); ok {
		if err := conn.SetDeadline(at); err != nil {
			return err
		}
	}
	// The length, ApiVersions (18) version 0, a number that the answer repeats, no client id.
	if _, err := conn.Write([]byte("\x00\x00\x00\x0a" + "\x00\x12\x00\x00" + "seen" + "\xff\xff")); err != nil {
		return err
	}
	answer := make([]byte, 8)
	for n := 0; n < len(answer); {
		read, err := conn.Read(answer[n:])
		if err != nil {
			return err
		}
		n += read
	}
	if string(answer[4:]) != "seen" {
		return fmt.Errorf("it answers %q", answer)
	}
	return nil
}
