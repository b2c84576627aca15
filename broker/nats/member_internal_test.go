package nats

import (
	"fmt"
	"slices"
	"testing"
)

// Members share the partitions evenly, agree whatever they heard of first, and no member has the
// first partition of each topic.
func TestMembersShareThePartitions(t *testing.T) {
	t.Parallel()
	ids := []string{"a", "b", "c"}
	first := map[string]bool{}
	for i := range 20 {
		topic := fmt.Sprint("topic", i)
		owners := ownersOf(topic, 8, ids)
		if other := ownersOf(topic, 8, []string{"c", "b", "a"}); !slices.Equal(owners, other) {
			t.Errorf("%v, and %v", owners, other)
		}
		has := map[string]int{}
		for _, id := range owners {
			has[id]++
		}
		if len(has) != 3 || slices.ContainsFunc(ids, func(id string) bool { return has[id] < 2 || has[id] > 3 }) {
			t.Errorf("%v", has)
		}
		first[owners[0]] = true
	}
	if len(first) != 3 {
		t.Errorf("only %v have a first partition", first)
	}
}

// Two groups, or two topics, never meet on one subject.
func TestSubjectsOfGroupsDiffer(t *testing.T) {
	t.Parallel()
	seen := map[string]string{}
	for _, c := range [][2]string{{"a.b", "c"}, {"a", "b.c"}, {"a%2Eb", "c"}, {"a", "b"}} {
		subject := subjectOfGroup(c[0], c[1])
		if seen[subject] != "" {
			t.Errorf("%v and %s have the subject %s", c, seen[subject], subject)
		}
		seen[subject] = fmt.Sprint(c)
	}
}
