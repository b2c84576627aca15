package probe

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// effects returns the number of effects at the effects URL.
func (e *examiner) effects(ctx context.Context) (int64, error) {
	a, err := e.client.send(ctx, &request{method: http.MethodGet, url: e.EffectsURL, fields: e.fields(e.Header)})
	if err != nil {
		return 0, fmt.Errorf("effects: %w", err)
	}
	if !a.ok() {
		return 0, fmt.Errorf("effects: a GET of the effects URL got %v", a)
	}
	n, err := numberAt(a.body, e.EffectsPath)
	if err != nil {
		return 0, fmt.Errorf("effects: %w", err)
	}
	return n, nil
}

// numberAt returns the number at a JSON pointer (RFC 6901), or the length of an array there.
func numberAt(document []byte, pointer string) (int64, error) {
	decoder := json.NewDecoder(bytes.NewReader(document))
	decoder.UseNumber()
	var value any
	if err := decoder.Decode(&value); err != nil {
		return 0, errors.New("the effects URL does not answer with JSON")
	}
	for _, name := range strings.Split(pointer, "/")[1:] {
		name = strings.NewReplacer("~1", "/", "~0", "~").Replace(name)
		var found bool
		switch in := value.(type) {
		case map[string]any:
			value, found = in[name]
		case []any:
			if i, err := strconv.Atoi(name); err == nil && i >= 0 && i < len(in) {
				value, found = in[i], true
			}
		}
		if !found {
			return 0, errors.New("there is nothing at --effects-path")
		}
	}
	switch at := value.(type) {
	case json.Number:
		if n, err := at.Int64(); err == nil {
			return n, nil
		}
		if n, err := at.Float64(); err == nil && n == float64(int64(n)) { // 5.0, in some languages
			return int64(n), nil
		}
	case []any:
		return int64(len(at)), nil
	case nil: // an empty list, in some languages
		return 0, nil
	}
	return 0, errors.New("there is neither an integer nor an array at --effects-path")
}

// counter counts the effects of one case. If there is no effects URL, it can't: known reports
// false, and added returns the wanted number.
type counter struct {
	e      *examiner
	before int64
}

// count begins to count.
func (e *examiner) count(ctx context.Context) (*counter, error) {
	c := &counter{e: e}
	if e.EffectsURL == nil {
		return c, nil
	}
	var err error
	c.before, err = e.effects(ctx)
	return c, err
}

func (c *counter) known() bool { return c.e.EffectsURL != nil }

// added returns the number of effects since the count began. If there are fewer than want, it waits
// for late ones. If there are as many, it counts once more, to find one too many. The pause before
// is longer if effects were counted late so far.
func (c *counter) added(ctx context.Context, want int64) (int64, error) {
	if !c.known() {
		return want, nil
	}
	settled, began := false, time.Now()
	for deadline := began.Add(c.e.EffectsWait); ; {
		now, err := c.e.effects(ctx)
		if err != nil {
			return 0, err
		}
		n := now - c.before
		switch {
		case n == want && settled:
			return n, nil
		case n > want: // let the others arrive, so that they do not count in the next case
			return n, sleep(ctx, c.e.lag)
		case n < want && time.Now().After(deadline):
			return n, nil
		}
		pause := c.e.Settle
		if settled = n == want; settled {
			if want > 0 { // those that came together are counted almost together
				c.e.lag = max(c.e.lag, time.Since(began))
				pause += c.e.lag / 2
			} else {
				pause += c.e.lag
			}
		}
		if err := sleep(ctx, pause); err != nil {
			return 0, err
		}
	}
}

// leaf is a value in an answer.
type leaf struct{ path, value string }

// leaves returns the values in an answer: its Location, and the values of a JSON body, or else the
// whole body.
func (a *answer) leaves() []leaf {
	var all []leaf
	if location := a.header.Get("Location"); location != "" {
		all = append(all, leaf{"Location", location})
	}
	decoder := json.NewDecoder(bytes.NewReader(a.body))
	decoder.UseNumber()
	var document any
	if decoder.Decode(&document) != nil {
		return append(all, leaf{"body", string(a.body)})
	}
	var walk func(path string, value any)
	walk = func(path string, value any) {
		switch in := value.(type) {
		case map[string]any:
			for name, value := range in {
				walk(path+"/"+name, value)
			}
		case []any:
			for i, value := range in {
				walk(path+"/"+strconv.Itoa(i), value)
			}
		default:
			all = append(all, leaf{path, fmt.Sprint(in)})
		}
	}
	walk("", document)
	return all
}

// identity has the paths of the values that identify an effect in an answer.
type identity []string

// identityOf finds these paths by the answers to two logical requests. The values there differ, and
// do not echo what was filled in for the requests: their keys and placeholders. If some are a
// Location or have the name id or uuid, only those count. If others are named like payment_id, only
// those count.
func identityOf(a, b *answer, filledIn [][]string) identity {
	second := map[string]string{}
	for _, l := range b.leaves() {
		second[l.path] = l.value
	}
	var ids, named, others identity
	for _, l := range a.leaves() {
		other, found := second[l.path]
		if !found || other == l.value {
			continue
		}
		spelled := l.path[strings.LastIndexByte(l.path, '/')+1:]
		name := strings.ToLower(spelled)
		switch {
		case echoes(l.value, filledIn[0]) && echoes(other, filledIn[1]):
		case l.path == "Location" || name == "id" || name == "uuid":
			ids = append(ids, l.path)
		case namedAsID(spelled):
			named = append(named, l.path)
		default:
			others = append(others, l.path)
		}
	}
	switch {
	case len(ids) > 0:
		return ids
	case len(named) > 0:
		return named
	}
	return others
}

// named reports whether the values are ids by their names. Other values, such as a balance or a
// time, may be equal in answers that tell of two effects.
func (id identity) named() bool {
	return slices.ContainsFunc(id, func(path string) bool {
		name := path[strings.LastIndexByte(path, '/')+1:]
		return path == "Location" || strings.EqualFold(name, "id") || strings.EqualFold(name, "uuid") || namedAsID(name)
	})
}

// namedAsID reports whether a name is like payment_id or paymentId. Ids of one answer are none.
func namedAsID(name string) bool {
	lower := strings.ToLower(name)
	for _, of := range []string{"request", "trace", "span", "correlation"} {
		if strings.Contains(lower, of) {
			return false
		}
	}
	return strings.HasSuffix(lower, "_id") || strings.HasSuffix(name, "Id") || strings.HasSuffix(name, "ID") || strings.HasSuffix(lower, "uuid")
}

// echoes reports whether a value of an answer is one that was filled in, or contains a long one.
func echoes(value string, filledIn []string) bool {
	return slices.ContainsFunc(filledIn, func(v string) bool {
		return v == value || len(v) == len("00000000-0000-0000-0000-000000000000") && strings.Contains(value, v)
	})
}

// same reports whether two answers tell of the same effect, and whether that is known.
func (id identity) same(a, b *answer) (same, known bool) {
	values := map[string]string{}
	for _, l := range a.leaves() {
		values[l.path] = l.value
	}
	same = true
	for _, l := range b.leaves() {
		if value, found := values[l.path]; found && slices.Contains(id, l.path) {
			known = true
			same = same && value == l.value
		}
	}
	return same && known, known
}

// distinct returns the number of effects that the answers tell of, and whether it is known.
func (id identity) distinct(answers []*answer) (n int, known bool) {
	var firsts []*answer
	for _, a := range answers {
		if _, has := id.same(a, a); !has {
			continue // a replay with another body, for example
		}
		known = true
		if !slices.ContainsFunc(firsts, func(first *answer) bool {
			same, comparable := id.same(first, a)
			return same || !comparable
		}) {
			firsts = append(firsts, a)
		}
	}
	return len(firsts), known
}
