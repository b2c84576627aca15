// Package intenttest tests that a client.IntentStore keeps its contract.
package intenttest

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/client"
)

// Intent returns an intent with every field set.
func Intent(key string) *client.Intent {
	return &client.Intent{
		Key: idempotency.Key{Value: key}, Method: http.MethodPost, URL: "https://bank.example/v1/transfers?dry=%20", Host: "internal.example",
		Header: http.Header{"Content-Type": {"application/json"}, "Accept": {"a", "b"}, "X-Empty": {""}, "X-Latin": {"caf\xe9"}},
		Body:   []byte("{\"amount\":1}\x00\xff\n"),
	}
}

// Run runs the conformance cases. It calls open for each of them, to get an empty store.
func Run(t *testing.T, open func(t *testing.T) client.IntentStore) {
	t.Run("what is saved is taken", func(t *testing.T) {
		t.Parallel()
		store := open(t)
		for _, want := range []*client.Intent{
			Intent("full"), {Key: idempotency.Key{Value: "bare"}, Method: "PATCH", URL: "http://h/"},
			Intent(strings.Repeat("k", idempotency.KeyBytesMax)),
		} {
			before := time.Now()
			save(t, store, want, false, nil)
			got, err := store.Take(t.Context(), want.Key.Value)
			if err != nil || got == nil {
				t.Fatalf("taken is %v, %v", got, err)
			}
			if !same(got, want) {
				t.Errorf("taken is %s %s %q %q %q, want %s %s %q %q %q",
					got.Method, got.URL, got.Host, got.Header, got.Body, want.Method, want.URL, want.Host, want.Header, want.Body)
			}
			const slack = 5 * time.Second // between two readings of two clocks
			if got.SavedAt.Before(before.Add(-slack)) || got.SavedAt.After(time.Now().Add(slack)) {
				t.Errorf("it was saved at %v, now is %v", got.SavedAt, time.Now())
			}
		}
		if got, err := store.Take(t.Context(), "another"); got != nil || err != nil {
			t.Errorf("what was never saved is %v, %v", got, err)
		}
	})
	t.Run("saved twice", func(t *testing.T) {
		t.Parallel()
		store := open(t)
		save(t, store, Intent("k"), false, nil)
		save(t, store, Intent("k"), true, nil)
		for name, change := range map[string]func(i *client.Intent){
			"method": func(i *client.Intent) { i.Method = "PATCH" }, "URL": func(i *client.Intent) { i.URL += "x" },
			"host": func(i *client.Intent) { i.Host = "" }, "header": func(i *client.Intent) { i.Header.Set("Content-Type", "text/plain") },
			"body": func(i *client.Intent) { i.Body = i.Body[1:] },
		} {
			other := Intent("k")
			change(other)
			_, err := store.Save(t.Context(), other)
			if !errors.Is(err, client.ErrIntentDifferent) || !errors.Is(err, client.ErrIntentRefused) {
				t.Errorf("with another %s: %v", name, err)
			}
		}
		if got, err := store.Take(t.Context(), "k"); err != nil || !same(got, Intent("k")) {
			t.Errorf("the first is not what is kept: %v, %v", got, err)
		}
	})
	t.Run("the store keeps no reference", func(t *testing.T) {
		t.Parallel()
		store := open(t)
		intent := Intent("k")
		save(t, store, intent, false, nil)
		intent.Body[0], intent.Header["Content-Type"][0] = 'x', "changed"
		if got, err := store.Take(t.Context(), "k"); err != nil || !same(got, Intent("k")) {
			t.Errorf("what was saved has changed: %v, %v", got, err)
		}
	})
	t.Run("forgotten", func(t *testing.T) {
		t.Parallel()
		store := open(t)
		for _, key := range []string{"a", "b", "c"} {
			save(t, store, Intent(key), false, nil)
		}
		pending(t, store, "a", "b", "c")
		if err := store.Done(t.Context(), "b"); err != nil {
			t.Error(err)
		}
		pending(t, store, "a", "c")
		if err := store.Done(t.Context(), "b"); err != nil {
			t.Errorf("done twice: %v", err)
		}
		if err := store.Abandon(t.Context(), "c"); err != nil {
			t.Error(err)
		}
		pending(t, store, "a")
		if err := store.Abandon(t.Context(), "c"); !errors.Is(err, client.ErrIntentTaken) {
			t.Errorf("abandoned twice: %v", err)
		}
		save(t, store, Intent("b"), false, nil) // it is new again
		pending(t, store, "a", "b")
	})
	t.Run("at once", func(t *testing.T) {
		t.Parallel()
		store := open(t)
		var group sync.WaitGroup
		for n := range 16 {
			group.Go(func() {
				for i := range 10 {
					key := fmt.Sprintf("%02d-%02d", n, i)
					if _, err := store.Save(t.Context(), Intent(key)); err != nil {
						t.Error(err)
					}
					var err error
					switch i % 3 {
					case 0:
						err = store.Done(t.Context(), key)
					case 1:
						err = store.Abandon(t.Context(), key)
					}
					if err != nil {
						t.Error(err)
					}
				}
			})
		}
		group.Wait()
		keys, err := store.Pending(t.Context())
		if err != nil || len(keys) != 16*3 {
			t.Errorf("%d are pending (%v), want 48", len(keys), err)
		}
	})
}

func save(t *testing.T, store client.IntentStore, intent *client.Intent, before bool, want error) {
	t.Helper()
	if got, err := store.Save(t.Context(), intent); got != before || !errors.Is(err, want) {
		t.Errorf("save: kept before %t, %v", got, err)
	}
}

func pending(t *testing.T, store client.IntentStore, want ...string) {
	t.Helper()
	if got, err := store.Pending(t.Context()); err != nil || !slices.Equal(got, want) {
		t.Errorf("pending is %q, %v; want %q", got, err, want)
	}
}

func same(a, b *client.Intent) bool {
	if a == nil || a.Key != b.Key || a.Method != b.Method || a.URL != b.URL || a.Host != b.Host || string(a.Body) != string(b.Body) || len(a.Header) != len(b.Header) {
		return false
	}
	for name, values := range a.Header {
		if !slices.Equal(values, b.Header[name]) {
			return false
		}
	}
	return true
}
