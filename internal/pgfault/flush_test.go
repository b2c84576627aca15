package pgfault

import (
	"bytes"
	"io"
	"testing"
	"testing/iotest"

	"github.com/jackc/pgx/v5/pgproto3"
)

func encode(t testing.TB, messages ...pgproto3.FrontendMessage) (raw []byte) {
	t.Helper()
	for _, message := range messages {
		var err error
		if raw, err = message.Encode(raw); err != nil {
			t.Fatal(err)
		}
	}
	return raw
}

// split reads raw to its end and returns the flushes and the rest.
func split(r io.Reader) (flushes []flush, rest []byte, err error) {
	s := newSplitter()
	for hungUp := false; !hungUp; {
		hungUp = s.read(r) != nil
		for {
			f, ok, err := s.next(hungUp)
			if err != nil {
				return flushes, nil, err
			}
			if !ok {
				break
			}
			f.raw = bytes.Clone(f.raw)
			flushes = append(flushes, f)
		}
	}
	return flushes, bytes.Clone(s.rest()), nil
}

func TestFlushesAreCutAtWhatIsAnswered(t *testing.T) {
	t.Parallel()
	bind := &pgproto3.Bind{}
	execute := &pgproto3.Execute{}
	sync := &pgproto3.Sync{}
	insert := encode(t, &pgproto3.Parse{Query: "INSERT"}, bind, &pgproto3.Describe{ObjectType: 'P'}, execute)
	commit := encode(t, &pgproto3.Parse{Query: "COMMIT"}, bind, &pgproto3.Describe{ObjectType: 'P'}, execute)
	named := encode(t, &pgproto3.Parse{Name: "c", Query: "COMMIT"})
	for name, test := range map[string]struct {
		raw     [][]byte
		flushes int
		// The part with which the COMMIT's own messages begin, counted from all parts; -1: no
		// COMMIT.
		own      int
		messages int // the part with which Messages begin
		executes int // before the COMMIT
	}{
		"query":                     {[][]byte{encode(t, &pgproto3.Query{String: "COMMIT"})}, 1, 0, 0, 0},
		"pipeline":                  {[][]byte{insert, insert, commit, encode(t, sync)}, 1, 2, 0, 2},
		"after a flush":             {[][]byte{insert, encode(t, &pgproto3.Flush{}), commit, encode(t, sync)}, 2, 2, 0, 1},
		"after a sync":              {[][]byte{insert, encode(t, sync), commit, encode(t, sync)}, 2, 2, 2, 0},
		"prepared earlier":          {[][]byte{named, encode(t, sync), insert, encode(t, &pgproto3.Bind{PreparedStatement: "c"}, execute), encode(t, sync)}, 2, 3, 2, 1},
		"prepared, then an insert":  {[][]byte{named, insert, encode(t, &pgproto3.Bind{PreparedStatement: "c"}, execute), encode(t, sync)}, 1, 2, 0, 1},
		"bound, then an insert":     {[][]byte{named, encode(t, &pgproto3.Bind{PreparedStatement: "c", DestinationPortal: "p"}), insert, encode(t, &pgproto3.Execute{Portal: "p"}), encode(t, sync)}, 1, 3, 0, 1},
		"two commits":               {[][]byte{insert, commit, insert, commit, encode(t, sync)}, 1, 1, 0, 1},
		"no sync":                   {[][]byte{insert, commit}, 1, 1, 0, 1},
		"prepared alone":            {[][]byte{named, encode(t, sync)}, 1, -1, 0, 0},
		"bound alone":               {[][]byte{named, encode(t, &pgproto3.Bind{PreparedStatement: "c"}, sync)}, 1, -1, 0, 0},
		"closed":                    {[][]byte{named, encode(t, &pgproto3.Close{ObjectType: 'S', Name: "c"}, &pgproto3.Bind{PreparedStatement: "c"}, execute, sync)}, 1, -1, 0, 0},
		"portal closed":             {[][]byte{named, encode(t, &pgproto3.Bind{PreparedStatement: "c"}, &pgproto3.Close{ObjectType: 'P'}, execute, sync)}, 1, -1, 0, 0},
		"name used again":           {[][]byte{named, encode(t, &pgproto3.Parse{Name: "c", Query: "SELECT"}, &pgproto3.Bind{PreparedStatement: "c"}, execute, sync)}, 1, -1, 0, 0},
		"portal bound anew":         {[][]byte{commit, encode(t, sync), insert, encode(t, sync)}, 2, 0, 0, 0},
		"nothing is a COMMIT":       {[][]byte{insert, encode(t, sync)}, 1, -1, 0, 0},
		"copied data is no history": {[][]byte{encode(t, &pgproto3.CopyData{Data: []byte("x")}, &pgproto3.CopyDone{}), commit, encode(t, sync)}, 2, 1, 0, 0},
	} {
		for reading, reader := range map[string]func(io.Reader) io.Reader{
			"at once": func(r io.Reader) io.Reader { return r }, "byte by byte": iotest.OneByteReader,
		} {
			raw := bytes.Join(test.raw, nil)
			flushes, rest, err := split(reader(bytes.NewReader(raw)))
			if err != nil || len(rest) != 0 {
				t.Errorf("%s: %v, %d bytes left", name, err, len(rest))
			}
			var out []byte
			got := -1
			for _, f := range flushes {
				if f.commit >= 0 && got < 0 {
					got = len(out) + f.commit
					if f.beforeCommit != test.executes {
						t.Errorf("%s: %d Execute messages come before the COMMIT, want %d", name, f.beforeCommit, test.executes)
					}
					if end := len(out) + len(f.raw); name != "copied data is no history" {
						if want := raw[len(bytes.Join(test.raw[:test.messages], nil)):end]; !bytes.Equal(f.messages, want) {
							t.Errorf("%s: messages are %q, want %q", name, f.messages, want)
						}
					} else if bytes.Contains(f.messages, []byte{messageCopyData, 0, 0, 0, 5}) {
						t.Errorf("%s: messages are %q", name, f.messages)
					}
				}
				out = append(out, f.raw...)
			}
			want := -1
			if test.own >= 0 {
				want = len(bytes.Join(test.raw[:test.own], nil))
			}
			if !bytes.Equal(out, raw) || got != want || len(flushes) != test.flushes && name != "copied data is no history" {
				t.Errorf("%s, read %s: %d flushes, the COMMIT's own at %d; want %d, at %d", name, reading, len(flushes), got, test.flushes, want)
			}
		}
	}
}

func TestMalformedLengthIsRefusedBeforeItIsBelieved(t *testing.T) {
	t.Parallel()
	for _, raw := range [][]byte{{'Q', 0, 0, 0, 3}, {'Q', 0xff, 0xff, 0xff, 0xff}, {'Q', 0x40, 0, 0, 1}} {
		if _, _, err := split(bytes.NewReader(raw)); err != errMalformed {
			t.Errorf("%x: %v", raw, err)
		}
	}
	s := newSplitter() // a long message takes memory as it comes
	if err := s.read(bytes.NewReader([]byte{'Q', 0x3f, 0xff, 0xff, 0xff, 'x'})); err != nil || cap(s.buf) > 2*bufferBytes {
		t.Errorf("%v, %d bytes", err, cap(s.buf))
	}
}

func TestLongFlushGoesInParts(t *testing.T) {
	t.Parallel()
	part := encode(t, &pgproto3.Parse{Query: "INSERT"}, &pgproto3.Bind{Parameters: [][]byte{make([]byte, 1<<20)}}, &pgproto3.Execute{})
	raw := append(bytes.Repeat(part, 10), encode(t, &pgproto3.Parse{Query: "COMMIT"}, &pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Sync{})...)
	flushes, _, err := split(bytes.NewReader(raw))
	if err != nil || len(flushes) != 2 || flushes[0].commit >= 0 || flushes[1].commit < 0 || flushes[1].beforeCommit != 10 {
		t.Fatalf("%v, %d flushes", err, len(flushes))
	}
}

// FuzzSplitter: whatever a client sends and however it arrives, every byte goes out once and in
// order, and the same COMMITs are found.
func FuzzSplitter(f *testing.F) {
	bind, execute, sync := &pgproto3.Bind{}, &pgproto3.Execute{}, &pgproto3.Sync{}
	f.Add(encode(f, &pgproto3.Query{String: "begin; /* ; */ commit"}), uint8(1))
	f.Add(encode(f, &pgproto3.Parse{Query: "INSERT"}, bind, execute, &pgproto3.Parse{Query: "COMMIT"}, bind, execute, sync), uint8(7))
	f.Add(encode(f, &pgproto3.Parse{Name: "c", Query: "END"}, &pgproto3.Flush{}, &pgproto3.Bind{PreparedStatement: "c"}, execute, sync), uint8(3))
	f.Add(encode(f, &pgproto3.Query{String: "COPY a FROM STDIN"}, &pgproto3.CopyData{Data: []byte("1")}, &pgproto3.CopyDone{}, &pgproto3.Terminate{}), uint8(2))
	f.Add(encode(f, &pgproto3.Close{ObjectType: 'S', Name: "c"}, &pgproto3.Describe{ObjectType: 'S'}, &pgproto3.CopyFail{Message: "x"}), uint8(0))
	f.Add([]byte{'C', 0, 0, 0, 4, 'P', 0, 0, 0, 4, 'B', 0, 0, 0, 4, 'E', 0, 0, 0, 4, 'Q', 0, 0, 0, 9, 'e', 'n'}, uint8(4))
	f.Fuzz(func(t *testing.T, raw []byte, chunk uint8) {
		whole, wholeRest, wholeErr := split(bytes.NewReader(raw))
		cut, cutRest, cutErr := split(&chunks{raw: raw, size: int(chunk) + 1})
		if wholeErr != cutErr || !bytes.Equal(wholeRest, cutRest) {
			t.Fatalf("read at once: %v, rest %q; in chunks: %v, rest %q", wholeErr, wholeRest, cutErr, cutRest)
		}
		wholeOut, wholeCommits := summary(whole)
		cutOut, cutCommits := summary(cut)
		if !bytes.Equal(wholeOut, cutOut) || !bytes.Equal(wholeCommits, cutCommits) {
			t.Fatalf("read at once: %q, COMMITs %q; in chunks: %q, COMMITs %q", wholeOut, wholeCommits, cutOut, cutCommits)
		}
		if !bytes.HasPrefix(raw, wholeOut) || wholeErr == nil && !bytes.Equal(append(wholeOut, wholeRest...), raw) {
			t.Fatalf("%q went in, %q and %q came out", raw, wholeOut, wholeRest)
		}
	})
}

// summary returns all bytes that were handed out, and the messages of each COMMIT.
func summary(flushes []flush) (out, commits []byte) {
	for _, f := range flushes {
		out = append(out, f.raw...)
		if f.commit >= 0 {
			commits = append(append(commits, f.raw[f.commit:]...), f.messages...)
		}
	}
	return out, commits
}

type chunks struct {
	raw  []byte
	size int
}

func (c *chunks) Read(p []byte) (int, error) {
	if len(c.raw) == 0 {
		return 0, io.EOF
	}
	n := copy(p[:min(c.size, len(p))], c.raw)
	c.raw = c.raw[n:]
	return n, nil
}

// FuzzAnswers: the count of answers does not depend on how they arrive.
func FuzzAnswers(f *testing.F) {
	f.Add([]byte{'K', 0, 0, 0, 12, 0, 0, 1, 2, 9, 9, 9, 9, 'Z', 0, 0, 0, 5, 'I', 'C', 0, 0, 0, 4, 'E', 0, 0, 0, 4}, uint8(0))
	f.Add([]byte{'G', 0, 0, 0, 7, 0, 0, 0, 'Z', 0, 0, 0, 5, 'T', 'K', 0, 0, 0, 0, 1}, uint8(2))
	f.Add([]byte{'K', 0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4, 'Z', 0x80, 0, 0, 0}, uint8(6))
	f.Fuzz(func(t *testing.T, raw []byte, chunk uint8) {
		whole, cut := newAnswers(), newAnswers()
		for _, a := range []*answers{whole, cut} {
			a.sent(flush{ends: true})
			a.sent(flush{ends: true, simple: true})
			a.sent(flush{executes: 2})
		}
		whole.received(raw)
		for rest := raw; len(rest) > 0; {
			n := min(int(chunk)+1, len(rest))
			cut.received(rest[:n])
			rest = rest[n:]
		}
		if whole.settled() != cut.settled() || whole.owed != cut.owed || whole.done != cut.done || whole.pid != cut.pid || whole.skip != cut.skip || whole.have != cut.have {
			t.Fatalf("read at once: %+v\nin chunks: %+v", whole, cut)
		}
	})
}
