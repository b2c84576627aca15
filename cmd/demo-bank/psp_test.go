//go:build unix

package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// processor is a running demo-bank psp.
type processor struct {
	*program
	url string
}

// servePSP starts the program and waits until it has printed its address. It is killed when the
// test ends.
func servePSP(t *testing.T, args ...string) *processor {
	t.Helper()
	cmd := command(t.Context(), append([]string{"psp"}, args...)...)
	p := &program{t: t, cmd: cmd, ended: make(chan struct{})}
	cmd.Stderr = &p.stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said := make(chan string, 1)
	go func() {
		defer close(p.ended)
		for lines := bufio.NewScanner(stdout); lines.Scan(); {
			if rest, ok := strings.CutPrefix(lines.Text(), "demo-bank psp is at "); ok {
				url, _, _ := strings.Cut(rest, " ")
				said <- url
			}
		}
		_ = cmd.Wait() // exitCode reads the code
	}()
	t.Cleanup(p.kill)
	select {
	case url := <-said:
		return &processor{p, url}
	case <-p.ended:
		t.Fatalf("%v ended with %v:\n%s", cmd.Args[1:], cmd.ProcessState, p.stderr.String())
	case <-time.After(waitMax):
		t.Fatalf("%v did not serve in time", cmd.Args[1:])
	}
	return nil
}

// list returns the ids of all charges, and their keys.
func (p *processor) list(client *http.Client) (ids map[string]string, keys map[string]int) {
	p.t.Helper()
	response, err := client.Get(p.url + "/charges")
	if err != nil {
		p.t.Fatal(err)
	}
	defer response.Body.Close()
	var list struct {
		Items []struct{ ID, Key string }
	}
	if err := json.NewDecoder(response.Body).Decode(&list); err != nil {
		p.t.Fatal(err)
	}
	ids, keys = map[string]string{}, map[string]int{}
	for _, item := range list.Items {
		ids[item.ID] = item.Key
		keys[item.Key]++
	}
	return ids, keys
}

// TestAChargeSurvivesKill9OfItsProcessor: processors are killed with -9 while clients charge. Each
// charge that was acknowledged is in the file, each key has one, and a retry finds it. A processor
// starts even if the last line of its file is torn.
func TestAChargeSurvivesKill9OfItsProcessor(t *testing.T) {
	t.Parallel()
	const kills, clients, each = 4, 8, 25
	file, client := filepath.Join(t.TempDir(), "psp"), newClient(t)
	instance := ""
	var mu sync.Mutex
	acknowledged := map[string]string{} // id by key
	body := `{"card":"tok_visa","amount":1250}`
	for round := range kills {
		p := servePSP(t, "--addr", "127.0.0.1:0", "--file", file)
		response, err := client.Get(p.url + "/instance")
		if err != nil {
			t.Fatal(err)
		}
		_ = response.Body.Close()
		switch got := response.Header.Get("Processor-Instance"); {
		case instance == "" && got != "":
			instance = got
		case got != instance:
			t.Errorf("after kill -9 the instance is %s, before it was %s", got, instance)
		}
		var done atomic.Int64
		var group sync.WaitGroup
		for i := range clients {
			group.Go(func() {
				client := newClient(t)
				for n := range each {
					key := fmt.Sprintf("k-%d-%d", i, n)
					response, content, err := postTo(client, p.url+"/charges", key, body)
					if err != nil {
						return // killed
					}
					var answer struct{ ID string }
					if err := json.Unmarshal(content, &answer); err != nil || response.StatusCode != http.StatusCreated {
						t.Errorf("%s: %d %s", key, response.StatusCode, content)
						return
					}
					mu.Lock()
					if before, ok := acknowledged[key]; ok && before != answer.ID {
						t.Errorf("%s was charged as %s, and later as %s", key, before, answer.ID)
					}
					acknowledged[key] = answer.ID
					mu.Unlock()
					// The kill comes in the middle of the charges that this round adds.
					if done.Add(1) == int64(clients*each*(2*round+1)/(2*kills)) {
						p.kill()
					}
				}
			})
		}
		group.Wait()
		p.kill()
		client.CloseIdleConnections()
		if round == 1 { // an append that the kill has cut
			f, err := os.OpenFile(file, os.O_APPEND|os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteString(`{"entry":{"kind":"charges","key":"torn"`); err != nil {
				t.Fatal(err)
			}
			if err := f.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	p := servePSP(t, "--addr", "127.0.0.1:0", "--file", file)
	ids, keys := p.list(client)
	for key, id := range acknowledged {
		if ids[id] != key {
			t.Errorf("the charge %s of %s was acknowledged and is gone", id, key)
		}
	}
	for key, n := range keys {
		if n != 1 {
			t.Errorf("%s was charged %d times", key, n)
		}
	}
	if len(acknowledged) < clients*each/2 {
		t.Errorf("only %d charges were acknowledged", len(acknowledged))
	}
	p.terminate()
	if code := p.exitCode(); code != 0 {
		t.Errorf("exit code after SIGTERM is %d:\n%s", code, p.stderr.String())
	}
}

// TestAStoppingProcessorFinishesWhatItHas: the request in progress is answered, new connections are
// refused, and the exit code is 0.
func TestAStoppingProcessorFinishesWhatItHas(t *testing.T) {
	t.Parallel()
	p := servePSP(t, "--addr", "127.0.0.1:0")
	request, err := http.NewRequest(http.MethodPut, p.url+"/faults", strings.NewReader(`{"slow_ms":1500}`))
	if err != nil {
		t.Fatal(err)
	}
	response, err := newClient(t).Do(request)
	if err != nil || response.StatusCode != http.StatusNoContent {
		t.Fatal(response, err)
	}
	_ = response.Body.Close()
	address := strings.TrimPrefix(p.url, "http://")
	const body = `{"card":"tok","amount":1}`
	answers := make(chan int, 2) // statuses; 0 if the connection broke
	for range 2 {                // the second one gets 409: the other is under way
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := fmt.Fprintf(conn, "POST /charges HTTP/1.1\r\nHost: psp\r\nIdempotency-Key: k\r\nContent-Length: %d\r\n\r\n%s", len(body), body); err != nil {
			t.Fatal(err)
		}
		go func() {
			status := 0
			if answer, err := http.ReadResponse(bufio.NewReader(conn), nil); err == nil {
				status = answer.StatusCode
			}
			answers <- status
		}()
	}
	if status := <-answers; status != http.StatusConflict {
		t.Fatalf("the second request got %d, want 409", status)
	}
	p.terminate()
	eventually(t, "new connections are refused", func() bool {
		other, err := net.Dial("tcp", address)
		if err == nil {
			_ = other.Close()
		}
		return errors.Is(err, syscall.ECONNREFUSED)
	})
	if status := <-answers; status != http.StatusCreated {
		t.Errorf("the charge in progress got %d, want 201", status)
	}
	if code := p.exitCode(); code != 0 {
		t.Errorf("exit code is %d:\n%s", code, p.stderr.String())
	}
}

// TestAProcessorStartFailsInOneLine: each error at the start is one line with its remedy, and no
// file is changed.
func TestAProcessorStartFailsInOneLine(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	held := filepath.Join(dir, "held")
	p := servePSP(t, "--addr", "127.0.0.1:0", "--file", held)

	file := filepath.Join(dir, "new")
	if line := fails(t, "psp", "--addr", strings.TrimPrefix(p.url, "http://"), "--file", file); !strings.Contains(line, "taken") || !strings.Contains(line, "--addr") {
		t.Errorf("a port that is taken: %s", line)
	}
	if _, err := os.Stat(file); !os.IsNotExist(err) {
		t.Errorf("a processor without a port made its file: %v", err)
	}
	if line := fails(t, "psp", "--addr", "127.0.0.1:0", "--file", held); !strings.Contains(line, "held") || !strings.Contains(line, held) || !strings.Contains(line, "--file") {
		t.Errorf("a file that is held: %s", line)
	}
	other := filepath.Join(dir, "other")
	if err := os.WriteFile(other, []byte("my notes"), 0o600); err != nil {
		t.Fatal(err)
	}
	if line := fails(t, "psp", "--addr", "127.0.0.1:0", "--file", other); !strings.Contains(line, "not a file of demo-bank psp") || !strings.Contains(line, other) {
		t.Errorf("a file of another format: %s", line)
	}
	if content, err := os.ReadFile(other); err != nil || string(content) != "my notes" {
		t.Errorf("it changed the other file to %q (%v)", content, err)
	}
	for _, unusable := range []string{filepath.Join(dir, "no", "folder"), dir} {
		if line := fails(t, "psp", "--addr", "127.0.0.1:0", "--file", unusable); !strings.Contains(line, unusable) || !strings.Contains(line, "--file") {
			t.Errorf("a file that can't be made: %s", line)
		}
	}
	if line := failsWith(t, exitUsage, "psp", "--file", ""); !strings.Contains(line, "--file is empty") {
		t.Errorf("an empty name: %s", line)
	}
}

// TestHelpOfThePSPNamesEveryFault: the contract's fields can be found without a browser.
func TestHelpOfThePSPNamesEveryFault(t *testing.T) {
	t.Parallel()
	output, err := command(t.Context(), "psp", "--help").Output()
	if err != nil {
		t.Fatal(err)
	}
	p := servePSP(t, "--addr", "127.0.0.1:0")
	response, err := newClient(t).Get(p.url + "/faults")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	var faults map[string]any
	if err := json.NewDecoder(response.Body).Decode(&faults); err != nil {
		t.Fatal(err)
	}
	for name := range faults {
		if !bytes.Contains(output, []byte(name)) {
			t.Errorf("the help does not name %s:\n%s", name, output)
		}
	}
}
