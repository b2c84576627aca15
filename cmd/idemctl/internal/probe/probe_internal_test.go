package probe

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestNumberAt(t *testing.T) {
	t.Parallel()
	const document = `{"a/b":{"~c":[1,2]},"n":7,"x":1.5,"list":[{},{},{}],"null":null,"":{"":3},"f":7.0}`
	for pointer, want := range map[string]int64{"/n": 7, "/a~1b/~0c/1": 2, "/list": 3, "/null": 0, "//": 3, "/f": 7} {
		if got, err := numberAt([]byte(document), pointer); got != want || err != nil {
			t.Errorf("%q: %d, %v, want %d", pointer, got, err, want)
		}
	}
	for _, pointer := range []string{"", "/x", "/none", "/list/3", "/list/-1", "/n/0", "/a~1b"} {
		if got, err := numberAt([]byte(document), pointer); err == nil {
			t.Errorf("%q: %d", pointer, got)
		}
	}
	if got, err := numberAt([]byte(" 12\n"), ""); got != 12 || err != nil {
		t.Errorf("a bare number: %d, %v", got, err)
	}
	if got, err := numberAt([]byte("<html>"), ""); err == nil {
		t.Errorf("HTML: %d", got)
	}
}

func TestBodies(t *testing.T) {
	t.Parallel()
	b := &bodies{template: `{"n":{{int}},"again":{{int}},"id":"{{uuid}}"}`}
	seen := map[string]bool{}
	for _, number := range []string{"1", "3", "5"} {
		body := string(b.next())
		if !strings.HasPrefix(body, `{"n":`+number+`,"again":`+number+`,"id":"`) || !json.Valid([]byte(body)) || seen[body[len(body)-38:]] {
			t.Errorf("body %s", body)
		}
		seen[body[len(body)-38:]] = true
	}
	if !b.varies() || (&bodies{template: "{{"}).varies() {
		t.Error("varies is wrong")
	}
}

// Another body differs in its meaning, and is of the same kind.
func TestOtherBodies(t *testing.T) {
	t.Parallel()
	for template, want := range map[string][]string{
		``: {`{"probe":1}`},
		`{"to":"bob-1","amount": 1250, "deep":[{"n":9}],"x":1.5}`: {
			`{"to":"bob-1","amount": 1251, "deep":[{"n":9}],"x":1.5}`, `{"to":"bob-1","amount": 1250, "deep":[{"n":10}],"x":1.5}`,
			`{"amount":1250,"deep":[{"n":9}],"probe":1,"to":"bob-1","x":1.5}`,
		},
		`{"to":"bob"}`:        {`{"probe":1,"to":"bob"}`},
		`amount=99&to=bob`:    {`amount=100&to=bob`, `amount=99&to=bob1`},
		`a=1&b=2&c=3&d=4&e=5`: {`a=2&b=2&c=3&d=4&e=5`, `a=1&b=3&c=3&d=4&e=5`, `a=1&b=2&c=4&d=4&e=5`, `a=1&b=2&c=3&d=5&e=5`},
	} {
		var got []string
		for _, other := range (&bodies{template: template}).others() {
			got = append(got, string(other))
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", template, got, want)
		}
	}
}

func TestIdentity(t *testing.T) {
	t.Parallel()
	made := func(location, body string) *answer {
		a := &answer{status: 201, header: http.Header{}, body: []byte(body)}
		if location != "" {
			a.header.Set("Location", location)
		}
		return a
	}
	filledIn := [][]string{{"1", "0198c0de-4b1e-4a3c-9d02-2f6a81c0e7d4"}, {"3", "0198c0de-4b1e-4a3c-9d02-2f6a81c0e7d5"}}
	for name, test := range map[string]struct {
		a, b *answer
		want []string
	}{
		"Location and id":       {made("/p/1", `{"id":1,"at":"x"}`), made("/p/2", `{"id":2,"at":"y"}`), []string{"Location", "/id"}},
		"id in an object":       {made("", `{"p":{"ID":"a"}}`), made("", `{"p":{"ID":"b"}}`), []string{"/p/ID"}},
		"a balance":             {made("", `{"balance":99,"amount":1}`), made("", `{"balance":96,"amount":3}`), []string{"/balance"}},
		"a number like the int": {made("", `{"order":1,"amount":1}`), made("", `{"order":2,"amount":3}`), []string{"/order"}},
		"an echo":               {made("", `{"amount":1,"text":"order 0198c0de-4b1e-4a3c-9d02-2f6a81c0e7d4"}`), made("", `{"amount":3,"text":"order 0198c0de-4b1e-4a3c-9d02-2f6a81c0e7d5"}`), nil},
		"the client's id":       {made("", `{"id":"0198c0de-4b1e-4a3c-9d02-2f6a81c0e7d4"}`), made("", `{"id":"0198c0de-4b1e-4a3c-9d02-2f6a81c0e7d5"}`), nil},
		"text":                  {made("", "payment 1"), made("", "payment 2"), []string{"body"}},
		"named as ids are":      {made("", `{"payment_id":1,"request_id":7,"at":"x"}`), made("", `{"payment_id":2,"request_id":8,"at":"y"}`), []string{"/payment_id"}},
		"the same text":         {made("", "paid"), made("", "paid"), nil},
		"no body":               {made("", ""), made("", ""), nil},
	} {
		if got := identityOf(test.a, test.b, filledIn); !slices.Equal(got, test.want) {
			t.Errorf("%s: %q, want %q", name, got, test.want)
		}
	}
	id := identity{"Location", "/id"}
	one, two, bare := made("/p/1", `{"id":1}`), made("/p/2", `{"id":2}`), made("", `{"state":"paid"}`)
	for name, test := range map[string]struct {
		answers []*answer
		n       int
		known   bool
	}{
		"one": {[]*answer{one}, 1, true}, "copies": {[]*answer{one, one, one}, 1, true}, "two": {[]*answer{one, two, one}, 2, true},
		"without its Location": {[]*answer{one, made("", `{"id":1}`)}, 1, true}, "without ids": {[]*answer{bare, bare}, 0, false}, "one of two": {[]*answer{bare, one}, 1, true},
	} {
		if n, known := id.distinct(test.answers); n != test.n || known != test.known {
			t.Errorf("%s: %d, %v", name, n, known)
		}
	}
}

func TestShellQuoted(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"a b": "'a b'", "it's $HOME": `'it'\''s $HOME'`, "Größe": "'Größe'", "a\nb\x1b'\\": `$'a\x0ab\x1b\'\\'`, "": "''",
	} {
		if got := shellQuoted(text); got != want {
			t.Errorf("%q: %s, want %s", text, got, want)
		}
	}
}

// docs/idemctl.md has each rule with its level in each profile.
func TestDocsHaveTheRules(t *testing.T) {
	t.Parallel()
	text, err := os.ReadFile("../../../../docs/idemctl.md")
	if err != nil {
		t.Fatal(err)
	}
	var documented, want []string
	for line := range strings.Lines(string(text)) {
		if cells := strings.Split(line, "|"); len(cells) == 7 && strings.HasPrefix(cells[1], " `") {
			for i := range cells {
				cells[i] = strings.TrimSpace(cells[i])
			}
			documented = append(documented, strings.Join(cells[1:5], ";"))
		}
	}
	for _, r := range rules {
		want = append(want, fmt.Sprintf("`%s`;%s;%s;%s", r.id, r.ietf, r.stripe, r.paidonce))
		for _, profile := range Profiles {
			if level, source := r.in(profile); level != levelNone && source == "" {
				t.Errorf("%s has no source in %s", r.id, profile)
			}
		}
	}
	if !slices.Equal(documented, want) {
		t.Errorf("docs/idemctl.md has the rules\n%s\nwant\n%s", strings.Join(documented, "\n"), strings.Join(want, "\n"))
	}
	for _, limit := range []string{fmt.Sprintf("%d requests at most", RequestsMax), fmt.Sprintf("average %d a second", RequestsPerSecondMax), fmt.Sprintf("%v seconds at most", TimeMax.Seconds())} {
		if !strings.Contains(strings.Join(strings.Fields(string(text)), " "), limit) {
			t.Errorf("docs/idemctl.md does not say %q", limit)
		}
	}
}

// An answer over the limit counts as no answer.
func TestAnswerBytesMax(t *testing.T) {
	t.Parallel()
	for size, fits := range map[int]bool{answerBytesMax: true, answerBytesMax + 1: false} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, size)) }))
		t.Cleanup(server.Close)
		u, err := url.Parse(server.URL)
		if err != nil {
			t.Fatal(err)
		}
		a, err := (&client{left: 1}).send(t.Context(), &request{method: http.MethodGet, url: u})
		if err != nil || (a.err == nil) != fits || a.ok() != fits {
			t.Errorf("%d bytes: %v, %v", size, a, err)
		}
	}
}

// Copies are sent together, and count one by one for the rate and the number of requests.
func TestPace(t *testing.T) {
	t.Parallel()
	c := &client{interval: time.Millisecond, left: 10}
	begun := time.Now()
	for _, n := range []int{1, 8, 1} {
		if err := c.pace(t.Context(), n); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(begun); took < 9*time.Millisecond {
		t.Errorf("ten requests at 1 ms each were let through after %v", took)
	}
	if err := c.pace(t.Context(), 1); err == nil {
		t.Error("an eleventh request of ten is let through")
	}
}
