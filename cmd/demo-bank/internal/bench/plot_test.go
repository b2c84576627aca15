package bench

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"testing"

	"github.com/paidonce/idempotency/cmd/internal/terminal"
)

// plottable is a report of two blocks, of which the plot shows the second.
func plottable() *Report {
	ratio := func(design string, lower, median, upper float64) Ratio {
		return Ratio{Design: design, Base: plotBase, Throughput: Spread{lower, median, upper}}
	}
	return &Report{
		Versions: terminal.Versions{PostgreSQL: "15.1 <&>", Go: "go1", CPUs: 2},
		Blocks: []*Block{
			{Part: PartDesigns, Clients: 256, Fsync: "off", Ratios: []Ratio{ratio("lease", 9, 9, 9)}},
			{Part: PartDesigns, Clients: 64, Fsync: "on", Ratios: []Ratio{
				ratio("bare-folded", 1.15, 1.2, 1.25), ratio("ours-batch", 0.92, 0.95, 1.01),
				ratio("insert-first", 0.6, 0.63, 0.7), ratio("lease", 0.5, 0.55, 0.58), {Design: "ours-naive", Base: "bare-naive", Throughput: Spread{7, 7, 7}},
			}},
			{Part: PartDesigns, Clients: 16, Fsync: "on", Ratios: []Ratio{ratio("lease", 9, 9, 9)}},
			{Part: PartDelay, Clients: 64, Fsync: "on", Ratios: []Ratio{ratio("lease", 9, 9, 9)}},
		},
	}
}

// TestPlotShowsTheFigures: the plot is well-formed, and each bar is as long as its median; the
// base's is 1.
func TestPlotShowsTheFigures(t *testing.T) {
	t.Parallel()
	var b bytes.Buffer
	if err := plottable().WritePlot(&b); err != nil {
		t.Fatal(err)
	}
	if path := os.Getenv("PAIDONCE_PLOT"); path != "" { // for a look at it
		if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var widths []float64
	var whiskers []string
	decoder := xml.NewDecoder(&b)
	for {
		token, err := decoder.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("it is not well-formed: %v", err)
		}
		element, ok := token.(xml.StartElement)
		if !ok {
			continue
		}
		attributes := map[string]string{}
		for _, a := range element.Attr {
			attributes[a.Name.Local] = a.Value
		}
		switch element.Name.Local {
		case "rect":
			width, err := strconv.ParseFloat(attributes["width"], 64)
			if err != nil {
				t.Fatal(err)
			}
			widths = append(widths, width)
		case "path":
			whiskers = append(whiskers, attributes["d"])
		}
	}
	want := []float64{1, 1.2, 0.95, 0.63, 0.55}
	if len(widths) != len(want) || len(whiskers) != len(want)-1 {
		t.Fatalf("there are %d bars and %d whiskers, want %d and one less", len(widths), len(whiskers), len(want))
	}
	for i, width := range widths {
		if got := width / widths[0]; math.Abs(got-want[i]) > 0.001 {
			t.Errorf("bar %d is %.3f of the first, want %.3f", i, got, want[i])
		}
	}
	var lower, top, bottom, upper float64
	if _, err := fmt.Sscanf(whiskers[1], "M%f %fV%fM", &lower, &top, &bottom); err != nil {
		t.Fatal(err)
	}
	upper, _ = strconv.ParseFloat(whiskers[1][bytes.LastIndexByte([]byte(whiskers[1]), 'M')+1:bytes.LastIndexByte([]byte(whiskers[1]), ' ')], 64)
	if l, u := (lower-plotLeft)/widths[0], (upper-plotLeft)/widths[0]; math.Abs(l-0.92) > 0.001 || math.Abs(u-1.01) > 0.001 {
		t.Errorf("the whisker of ours-batch is from %.3f to %.3f, want 0.92 to 1.01", l, u)
	}
}

func TestNothingToPlot(t *testing.T) {
	t.Parallel()
	for name, p := range map[string]*Report{
		"nothing":       {},
		"no base":       {Blocks: []*Block{{Part: PartDesigns, Ratios: []Ratio{{Design: "ours-naive", Base: "bare-naive"}}}}},
		"another block": {Blocks: []*Block{{Part: PartKeys, Ratios: []Ratio{{Design: "lease", Base: plotBase}}}}},
	} {
		if err := p.WritePlot(io.Discard); !errors.Is(err, ErrNoPlot) {
			t.Errorf("%s: %v, want ErrNoPlot", name, err)
		}
	}
}
