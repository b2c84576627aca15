package bench

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	hdr "github.com/HdrHistogram/hdrhistogram-go"
	"github.com/google/uuid"
)

const (
	accounts = 1000 // in the bank's seed, with the names from accountOf

	requestTimeout = 30 * time.Second
	latencyMax     = requestTimeout

	runIn = 2 // uncounted requests of each client before a slice
)

func accountOf(n int) string { return fmt.Sprintf("acct-%04d", n) }

// referenceOf makes an answer about 200 bytes long, like the bank's.
func referenceOf(n int) string { return fmt.Sprintf("invoice %06d of the bench, net 30", n) }

// client is one client with its own conn. It implements only the HTTP/1.1 that it needs: the cost
// of net/http here would slow the server down, because both share a machine. Only one goroutine may
// use it at a time.
type client struct {
	address string
	rng     *rand.Rand
	conn    net.Conn
	reader  *bufio.Reader
	out     []byte
	body    []byte // of the last request, like key
	key     string
	latency *hdr.Histogram // in microseconds

	reply clientReply // to the last request
}

type clientReply struct {
	status   int
	location string
	outcome  string
	body     []byte
}

func newClient(address string, seed, number uint64) *client {
	return &client{address: address, rng: rand.New(rand.NewPCG(seed, number)), latency: emptyLatency()}
}

func (c *client) close() {
	if c.conn != nil {
		_ = c.conn.Close() // no request is in progress
		c.conn = nil
	}
}

// record is a request that was answered.
type record struct {
	key, id string
	body    []byte
}

// target is the kind and the path of the clients' requests.
type target struct {
	path    string
	kind    kind
	records []record           // for a replay or a read
	old     func(int64) record // for a replay from anywhere in a full table
	oldMax  int64
}

// send sends one request of the target's kind and checks that the answer is of that kind.
func (c *client) send(ctx context.Context, t *target) error {
	var err error
	wantStatus, wantOutcome := http.StatusCreated, ""
	switch t.kind {
	case fresh:
		c.body = c.transfer(c.body[:0])
		key, keyErr := uuid.NewV7()
		if keyErr != nil {
			return keyErr
		}
		c.key = key.String()
		err = c.post(ctx, t.path, c.key, c.body)
	case replay:
		r := t.records[c.rng.IntN(len(t.records))]
		wantOutcome = "replayed"
		err = c.post(ctx, t.path, r.key, r.body)
	case old:
		r := t.old(c.rng.Int64N(t.oldMax))
		wantOutcome = "replayed"
		err = c.post(ctx, t.path, r.key, r.body)
	case read:
		wantStatus = http.StatusOK
		err = c.get(ctx, t.path+"/"+t.records[c.rng.IntN(len(t.records))].id)
	case plain:
		wantStatus = http.StatusOK
		err = c.get(ctx, t.path)
	}
	switch {
	case err != nil:
		c.close()
		return fmt.Errorf("%s: %w", t.path, err)
	case c.reply.status != wantStatus || wantOutcome != "" && c.reply.outcome != wantOutcome:
		return fmt.Errorf("%s was answered with %d %s: %.200s", t.path, c.reply.status, c.reply.outcome, c.reply.body)
	}
	return nil
}

// transfer appends the body of a new transfer.
func (c *client) transfer(b []byte) []byte {
	from := c.rng.IntN(accounts)
	to := (from + 1 + c.rng.IntN(accounts-1)) % accounts
	return transferBody(b, from, to, 1+c.rng.IntN(9), c.rng.IntN(1_000_000))
}

func transferBody(b []byte, from, to, amount, number int) []byte {
	return fmt.Appendf(b, `{"from":%q,"to":%q,"amount":%d,"currency":"EUR","reference":%q}`, accountOf(from), accountOf(to), amount, referenceOf(number))
}

func (c *client) post(ctx context.Context, path, key string, body []byte) error {
	c.out = append(append(append(c.out[:0], "POST "...), path...), " HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nIdempotency-Key: "...)
	c.out = append(append(c.out, key...), "\r\nContent-Length: "...)
	c.out = append(strconv.AppendInt(c.out, int64(len(body)), 10), "\r\n\r\n"...)
	return c.exchange(ctx, append(c.out, body...))
}

func (c *client) get(ctx context.Context, path string) error {
	return c.exchange(ctx, append(append(append(c.out[:0], "GET "...), path...), " HTTP/1.1\r\nHost: bench\r\n\r\n"...))
}

// exchange sends a request and reads its reply.
func (c *client) exchange(ctx context.Context, request []byte) error {
	c.out = request
	if c.conn == nil {
		conn, err := new(net.Dialer).DialContext(ctx, "tcp", c.address)
		if err != nil {
			return err
		}
		c.conn, c.reader = conn, bufio.NewReader(conn)
	}
	if err := c.conn.SetDeadline(time.Now().Add(requestTimeout)); err != nil {
		return err
	}
	if _, err := c.conn.Write(request); err != nil {
		return err
	}
	return c.read()
}

var errReply = errors.New("the reply is not one that this client reads")

func (c *client) read() error {
	line, err := c.reader.ReadSlice('\n')
	if err != nil {
		return err
	}
	if len(line) < 12 || !bytes.HasPrefix(line, []byte("HTTP/1.1 ")) {
		return errReply
	}
	if c.reply.status, err = strconv.Atoi(string(line[9:12])); err != nil {
		return errReply
	}
	c.reply.location, c.reply.outcome = "", ""
	length := -1
	for {
		line, err := c.reader.ReadSlice('\n')
		if err != nil {
			return err
		}
		line = bytes.TrimRight(line, "\r\n")
		if len(line) == 0 {
			break
		}
		name, value, _ := bytes.Cut(line, []byte(": "))
		switch string(name) {
		case "Content-Length":
			if length, err = strconv.Atoi(string(value)); err != nil {
				return errReply
			}
		case "Location":
			c.reply.location = string(value)
		case "Idempotency-Status":
			c.reply.outcome = string(value)
		}
	}
	if length < 0 || length > bodyBytesMax {
		return errReply
	}
	if cap(c.reply.body) < length {
		c.reply.body = make([]byte, length)
	}
	c.reply.body = c.reply.body[:length]
	_, err = io.ReadFull(c.reader, c.reply.body)
	return err
}

// load is the clients' work in a slice.
type load struct {
	requests int64
	perSec   float64
	latency  *hdr.Histogram
}

// drive makes each client send requests one after another: at least the given number, and until the
// duration has elapsed. It returns when the last request is answered.
func drive(ctx context.Context, clients []*client, t *target, each int, duration time.Duration) (load, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	total := load{latency: emptyLatency()}
	var mu sync.Mutex
	var group sync.WaitGroup
	started := time.Now()
	for _, c := range clients {
		group.Go(func() {
			c.latency.Reset()
			sent, last := 0, started
			for ; (sent < each || last.Sub(started) < duration) && ctx.Err() == nil; sent++ {
				if err := c.send(ctx, t); err != nil {
					cancel(err)
					return
				}
				now := time.Now()
				// An error is impossible: the value is within the range.
				_ = c.latency.RecordValue(max(1, min(now.Sub(last), latencyMax).Microseconds()))
				last = now
			}
			mu.Lock()
			defer mu.Unlock()
			total.requests += int64(sent)
			if took := last.Sub(started); took > 0 {
				// Divided by the client's own time, because some clients end earlier than others.
				total.perSec += float64(sent) / took.Seconds()
			}
			total.latency.Merge(c.latency)
		})
	}
	group.Wait()
	return total, context.Cause(ctx)
}
