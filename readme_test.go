package idempotency

import (
	"cmp"
	"os"
	"strings"
	"testing"
)

// The README's first example is the quickstart, which has a test that runs it.
func TestReadmeShowsWhatRuns(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	example, rest := goExample(t, string(readme))
	quickstart, err := os.ReadFile("examples/quickstart/main.go")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(quickstart), example) {
		t.Error("the README's first Go example is not in examples/quickstart/main.go")
	}

	// The second example is one of package middleware, which has a test that runs it.
	example, rest = goExample(t, rest)
	source, err := os.ReadFile("middleware/example_call_test.go")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(source), example) {
		t.Error("the README's second Go example is not in middleware/example_call_test.go")
	}
	_, handler, _ := strings.Cut(example, "\nfunc ")
	if lines := strings.Count(handler, "\n"); handler == "" || lines > 25 {
		t.Errorf("the handler that calls another service has %d lines, and should have at most 25", lines)
	}
	for _, line := range []string{`mux.Handle("GET /v1/operations/{id}", status)`, `topUps := idem.With(func(o *middleware.Options) { o.Resumable, o.Accepted = "topup/1", status })`, `mux.Handle("POST /topups", topUps.Handler(`} {
		if !strings.Contains(rest, line) || !strings.Contains(string(source), line) {
			t.Errorf("the README or the example does not mount it with %s", line)
		}
	}

	// The third is a consumer of messages, in the example of package kafka, which runs. Two lines publish,
	// and the output is the example's.
	example, rest = goExample(t, rest)
	source, err = os.ReadFile("broker/kafka/example_test.go")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(source), example) {
		t.Error("the README's third Go example is not in broker/kafka/example_test.go")
	}
	if lines := strings.Count(example, "\n"); lines > 20 {
		t.Errorf("the consumer has %d lines, and should have at most 20", lines)
	}
	for readmeLine, sourceLine := range map[string]string{
		`err = message.Publish(ctx, "transfer-made", message.Message{Topic: "transfers", Key: []byte(t.From), Body: body})`: "",
		`relay.New(store.Outbox(), publisher, nil).Run(ctx)`:                                                                `relay.New(store.Outbox(), twice{publisher}, nil).Run(ctx)`,
	} {
		if !strings.Contains(string(readme), "\n    "+readmeLine) || !strings.Contains(string(source), cmp.Or(sourceLine, readmeLine)) {
			t.Errorf("the README or the example has no line %s", readmeLine)
		}
	}
	_, output, _ := strings.Cut(string(source), "// Output:\n")
	output = strings.ReplaceAll(strings.TrimSuffix(output, "}\n"), "\t// ", "    ")
	if output == "" || !strings.Contains(rest, "\n"+output) {
		t.Error("the README does not show the example's output")
	}

	if lines := strings.Count(string(readme), "\n"); lines >= 250 {
		t.Errorf("the README has %d lines, and should have less than 250", lines)
	}
}

// goExample returns the first Go example of a text, and what follows it.
func goExample(t *testing.T, text string) (example, rest string) {
	t.Helper()
	_, rest, _ = strings.Cut(text, "```go\n")
	example, rest, found := strings.Cut(rest, "```")
	if !found {
		t.Fatal("the README has too few Go examples")
	}
	return example, rest
}

// Users look for the license and for the address for reports of vulnerabilities.
func TestReadmeNamesLicenseAndSecurity(t *testing.T) {
	t.Parallel()
	readme, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	for name, first := range map[string]string{"LICENSE": "MIT License\n", "SECURITY.md": "# Security\n"} {
		if content, err := os.ReadFile(name); err != nil || !strings.HasPrefix(string(content), first) {
			t.Errorf("%s: %v, and it should begin with %q", name, err, first)
		}
		if !strings.Contains(string(readme), "]("+name+")") {
			t.Errorf("the README has no link to %s", name)
		}
	}
}
