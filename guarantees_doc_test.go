package idempotency_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// docs/guarantees.md and docs/security.md name a test for each promise, fault and threat. If a
// named test does not exist, its promise is not tested.
func TestDocsNameTestsThatExist(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile("docs/guarantees.md")
	if err != nil {
		t.Fatal(err)
	}
	security, err := os.ReadFile("docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	tests := map[string]bool{}
	definition := regexp.MustCompile(`(?m)^func ((?:Test|Fuzz)\w+)\(`)
	err = filepath.WalkDir(".", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		source, err := os.ReadFile(path)
		for _, match := range definition.FindAllSubmatch(source, -1) {
			tests[string(match[1])] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, match := range regexp.MustCompile("`((?:Test|Fuzz)\\w+)`").FindAllSubmatch(append(doc, security...), -1) {
		if !tests[string(match[1])] {
			t.Errorf("%s is named, and does not exist", match[1])
		}
	}
	for fault := 1; fault <= 35; fault++ {
		row := regexp.MustCompile(`(?m)^\| F` + strconv.Itoa(fault) + " .*(`Test|chaos)")
		if !row.Match(doc) {
			t.Errorf("F%d has no row with a test", fault)
		}
	}
	for mode := 1; mode <= 30; mode++ {
		row := regexp.MustCompile(`(?m)^\| M` + strconv.Itoa(mode) + " .*`Test")
		ofOtherBrokers := slices.Contains([]int{9, 25, 28, 29}, mode) // which have no package here
		if !ofOtherBrokers && !row.Match(doc) {
			t.Errorf("M%d has no row with a test", mode)
		}
	}
	suite := ""
	for _, file := range []string{"publisher.go", "source.go"} {
		source, err := os.ReadFile(filepath.Join("broker/brokertest", file))
		if err != nil {
			t.Fatal(err)
		}
		suite += string(source)
	}
	for _, cases := range regexp.MustCompile("suite: (`[^`]+`(?:, `[^`]+`)*)").FindAllSubmatch(doc, -1) {
		for name := range strings.SplitSeq(strings.Trim(string(cases[1]), "`"), "`, `") {
			if !strings.Contains(suite, `"consume/`+name) && !strings.Contains(suite, `"publish/`+name) {
				t.Errorf("the suite of brokers has no case %q", name)
			}
		}
	}
}
