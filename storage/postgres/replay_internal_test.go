package postgres

import (
	"testing"
)

func TestRecentKeysAreAboutOneNumber(t *testing.T) {
	t.Parallel()
	h := new(recentKeys)
	one, samePlace := int64(5), int64(5+recentKeysMax)
	h.set(one)
	if !h.has(one) || h.has(samePlace) || h.has(6) {
		t.Error("a recent key is about other numbers")
	}
	h.clear(samePlace)
	if !h.has(one) {
		t.Error("a recent key was cleared for another number")
	}
	h.set(samePlace)
	if h.has(one) || !h.has(samePlace) {
		t.Error("a recent key does not take the place of another")
	}
	if h.clear(samePlace); h.has(samePlace) {
		t.Error("a recent key is there after it was cleared")
	}
	if negative := int64(-7); h.has(negative) {
		t.Error("a recent key with a negative number")
	} else if h.set(negative); !h.has(negative) {
		t.Error("no recent key with a negative number")
	}
}
