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

// Each secret in a header is masked, and in answers its parts too.
func TestMasker(t *testing.T) {
	t.Parallel()
	u, err := url.Parse("http://h/payments?api_key=canary%2Bquery&expand=payments&canary-bare&id=")
	if err != nil {
		t.Fatal(err)
	}
	effects, err := url.Parse("http://h/count?token=canary-effects")
	if err != nil {
		t.Fatal(err)
	}
	basic := http.Request{Header: http.Header{}}
	basic.SetBasicAuth("alice", "canary-password")
	m := newMasker(&Config{
		URL: u, EffectsURL: effects,
		Header: []Field{
			{"Cookie", `session=canary-one; theme="canary-two";csrf=canary==`},
			{"Authorization", `Signature keyId="canary-id",signature="canary/sig="`},
			{"Proxy-Authorization", basic.Header.Get("Authorization")},
			{"X-Two", "canary1 canary2"},
			{"X-Short", "abc"},
			{"Prefer", "wait=1"},
		},
		SecondHeader: []Field{{"Cookie", "session=canary-other"}},
	})
	for text, want := range map[string]string{
		"it is canary-one":             "it is $COOKIE",
		"canary-two, canary== and one": "$COOKIE, $COOKIE and one",
		"canary-other":                 "$OTHER_COOKIE",
		"canary-id signed canary/sig=": "$AUTHORIZATION signed $AUTHORIZATION",
		"Signature of canary-password": "Signature of $PROXY_AUTHORIZATION",
		"canary1 and canary2":          "$X_TWO and $X_TWO",
		"canary%2Bquery canary+query":  "$URL_API_KEY $URL_API_KEY",
		"canary-bare canary-effects":   "$URL_QUERY $EFFECTS_URL_TOKEN",
		"abc wait=1 payments":          "abc wait=1 payments",
	} {
		if got := m.whole.Replace(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
	for text, want := range map[string]string{
		"first 8: canary-p...":   "first 8: $PROXY_AUTHORIZATION...",
		"last 8: password":       "last 8: $PROXY_AUTHORIZATION",
		"last 7: assword":        "last 7: assword",
		"inside: ary-passw":      "inside: $PROXY_AUTHORIZATION",
		"ry-passwry-passw":       "$PROXY_AUTHORIZATION",
		"canary-password, whole": "$PROXY_AUTHORIZATION, whole",
		"nothing":                "nothing",
		"":                       "",
	} {
		if got := m.quoted(text); got != want {
			t.Errorf("%q in an answer: %q, want %q", text, got, want)
		}
	}
	const want = "http://h/payments?api_key=$URL_API_KEY&expand=$URL_EXPAND&$URL_QUERY&id="
	if got := maskedURL(u); got != want {
		t.Errorf("the URL is %s, want %s", got, want)
	}
	for size, replaced := range map[int]bool{maskedBytesMin: true, maskedBytesMin - 1: false} {
		secret := strings.Repeat("x", size)
		m := newMasker(&Config{URL: &url.URL{}, Header: []Field{{"A", secret}}})
		if got := m.quoted(secret); (got == "$A") != replaced {
			t.Errorf("a secret of %d bytes: %q", size, got)
		}
	}
}

// A curl line has the variables of the query where a shell fills them in, and nothing else.
func TestCurlLineOfAQuery(t *testing.T) {
	t.Parallel()
	u, err := url.Parse("http://h/$p`?a$b=1&c=canary'\"")
	if err != nil {
		t.Fatal(err)
	}
	line := (&request{method: http.MethodGet, url: u}).curl()
	const want = "curl -i -X GET \"http://h/\\$p%60?a\\$b=$URL_A_B&c=$URL_C\""
	if line != want {
		t.Errorf("%s, want %s", line, want)
	}
}

// A header over the limit counts as no answer.
func TestHeadBytesMax(t *testing.T) {
	t.Parallel()
	const head = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nA: \r\n\r\n"
	const read = 4096 // bufio reads on
	for size, fits := range map[int]bool{headBytesMax - len(head): true, headBytesMax + read: false} {
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			conn, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			defer conn.Close()
			_, _ = fmt.Fprintf(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nA: %s\r\n\r\n", strings.Repeat("x", size))
		}))
		t.Cleanup(server.Close)
		u, err := url.Parse(server.URL)
		if err != nil {
			t.Fatal(err)
		}
		a, err := (&client{left: 1}).send(t.Context(), &request{method: http.MethodGet, url: u})
		if err != nil || (a.err == nil) != fits || !fits && !strings.Contains(a.err.Error(), "header of the answer is longer") {
			t.Errorf("%d bytes: %v, %v", size, a, err)
		}
	}
}
