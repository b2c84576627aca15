package bench

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/paidonce/idempotency/cmd/internal/terminal"
)

// Report holds the results of a run. Its JSON is one object.
type Report struct {
	Seed     uint64            `json:"seed"`
	Command  []string          `json:"command"`
	Seconds  float64           `json:"seconds"`
	LeftOut  []string          `json:"left_out"` // parts for which there was no time left
	CPUKnown bool              `json:"cpu_known"`
	Versions terminal.Versions `json:"versions"`

	Blocks []*Block `json:"blocks"`
	Wait   *Wait    `json:"wait,omitempty"`
	Expiry *Expiry  `json:"expiry,omitempty"`
}

// Block is one setting, and its results.
type Block struct {
	Part     string  `json:"part"`
	Clients  int     `json:"clients"`
	PoolSize int     `json:"pool_size"`
	Fsync    string  `json:"fsync"`
	Keys     int64   `json:"keys"`     // in the full table; 0 means no full table
	DelayMS  float64 `json:"delay_ms"` // each way
	Rounds   int     `json:"rounds"`

	Rows    []Row    `json:"rows"`
	Ratios  []Ratio  `json:"ratios"`
	Samples []Sample `json:"samples"`

	acknowledged int64
}

// Row holds one design's medians. Latencies are over all of its requests.
type Row struct {
	Design      string  `json:"design"`
	Keys        int64   `json:"keys"`
	PerSecond   Spread  `json:"requests_per_second"`
	P50MS       float64 `json:"p50_ms"`
	P99MS       float64 `json:"p99_ms"`
	CPUUS       Spread  `json:"cpu_us"`
	GoUS        float64 `json:"go_us"`
	PostgresUS  float64 `json:"postgres_us"`
	Allocations float64 `json:"allocations"`
	WALBytes    float64 `json:"wal_bytes"`
	RoundTrips  float64 `json:"round_trips"`
	Connections int64   `json:"connections"`
}

// Ratio compares one design with another, round by round.
type Ratio struct {
	Design     string `json:"design"`
	Keys       int64  `json:"keys"`
	Base       string `json:"base"`
	BaseKeys   int64  `json:"base_keys"`
	Throughput Spread `json:"throughput"`
	CPU        Spread `json:"cpu"` // of the service and PostgreSQL together; 0 if unknown

	// Overlap is true if the quartiles of the two throughputs overlap.
	Overlap bool `json:"overlap"`
}

func (b *Block) title() string {
	who := "client"
	if b.Part == PartMessages {
		who = "partition"
	}
	if b.Clients != 1 {
		who += "s"
	}
	t := fmt.Sprintf("%d %s, fsync %s", b.Clients, who, b.Fsync)
	if b.Part == PartKeys {
		t += fmt.Sprintf(", a table of %d keys against an empty one", b.Keys)
	}
	if b.DelayMS > 0 {
		t += fmt.Sprintf(", %g ms to PostgreSQL and %[1]g ms back", b.DelayMS)
	}
	return t
}

// sum computes a block's rows and ratios from its samples.
func (b *Block) sum(entries []*entry, cpuKnown bool) {
	for _, e := range entries {
		of := func(value func(Sample) float64) Spread { return spreadOf(valuesOf(e.samples, value)) }
		merged := emptyLatency()
		row := Row{
			Design: e.design.name, Keys: e.keys, PerSecond: of(perSecond), CPUUS: of(cpuUS),
			GoUS: of(func(s Sample) float64 { return s.GoUS }).Median, PostgresUS: of(func(s Sample) float64 { return s.PostgresUS }).Median,
			Allocations: of(func(s Sample) float64 { return s.Allocations }).Median,
			WALBytes:    of(func(s Sample) float64 { return s.WALBytes }).Median,
			RoundTrips:  of(func(s Sample) float64 { return s.RoundTrips }).Median,
		}
		for _, s := range e.samples {
			merged.Merge(s.histogram)
			row.Connections = max(row.Connections, s.Connections)
		}
		row.P50MS, row.P99MS = milliseconds(merged, 50), milliseconds(merged, 99)
		b.Rows = append(b.Rows, row)
		b.Samples = append(b.Samples, e.samples...)
		b.Rounds = len(e.samples)
	}
	for _, e := range entries {
		for _, base := range e.bases(entries) {
			b.Ratios = append(b.Ratios, ratio(e, base, cpuKnown))
		}
	}
}

// bases returns the entries for comparison: those that the design names, or the same design on an
// empty table.
func (e *entry) bases(entries []*entry) []*entry {
	var found []*entry
	for _, other := range entries {
		switch {
		case e.keys > 0 && other.keys == 0 && (other.design.name == e.design.name || e.design.name == replayOld && other.design.kind == replay):
			found = append(found, other)
		case e.keys == 0 && other.keys == 0 && other != e && slices.Contains(e.design.bases, other.design.name):
			found = append(found, other)
		}
	}
	return found
}

func perSecond(s Sample) float64 { return s.PerSecond }

func cpuUS(s Sample) float64 { return s.cpuUS }

func valuesOf(samples []Sample, value func(Sample) float64) []float64 {
	values := make([]float64, 0, len(samples))
	for _, s := range samples {
		values = append(values, value(s))
	}
	return values
}

func ratio(e, base *entry, cpuKnown bool) Ratio {
	r := Ratio{Design: e.design.name, Keys: e.keys, Base: base.design.name, BaseKeys: base.keys}
	own, others := valuesOf(e.samples, perSecond), valuesOf(base.samples, perSecond)
	r.Throughput = spreadOf(ratiosOf(own, others))
	r.Overlap = spreadOf(own).overlaps(spreadOf(others))
	if cpu := ratiosOf(valuesOf(e.samples, cpuUS), valuesOf(base.samples, cpuUS)); cpuKnown && len(cpu) > 0 {
		r.CPU = spreadOf(cpu)
	}
	return r
}

// report sums the run up.
func (r *run) report() *Report {
	p := &Report{
		Seed: r.config.Seed, Seconds: time.Since(r.started).Seconds(), LeftOut: append([]string{}, r.leftOut...), CPUKnown: r.cpuKnown,
		Versions: terminal.NewVersions(r.postgres),
		Blocks:   append([]*Block{}, r.blocks...), Wait: r.wait, Expiry: r.expiry,
	}
	return p
}

// WriteJSON writes the report as one JSON object.
func (p *Report) WriteJSON(w io.Writer) error {
	encoder := json.NewEncoder(w)
	encoder.SetEscapeHTML(false)
	return encoder.Encode(p)
}

// WriteText writes the report for people.
func (p *Report) WriteText(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "bench: seed %d, %.0f s: %s\n", p.Seed, p.Seconds, strings.Join(p.Command, " "))
	fmt.Fprint(&b, p.Versions)
	fmt.Fprintf(&b, "\nratios: median of the rounds, and its quartiles; CPU is the service's and PostgreSQL's together")
	if !p.CPUKnown {
		fmt.Fprintf(&b, ", and is not known on this system")
	}
	fmt.Fprintf(&b, "\nper request or message: microseconds of CPU (Go, PG), allocations of the service, bytes of WAL, round trips (RT); conns is the most at once\n")
	for _, block := range p.Blocks {
		if err := block.write(&b, p.CPUKnown); err != nil {
			return err
		}
	}
	p.Wait.write(&b)
	p.Expiry.write(&b)
	for _, left := range p.LeftOut {
		fmt.Fprintf(&b, "\nleft out, the time was over: %s", left)
	}
	if len(p.LeftOut) > 0 {
		fmt.Fprintln(&b)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (b *Block) write(w io.Writer, cpuKnown bool) error {
	fmt.Fprintf(w, "\n%s; %d connections, %d rounds\n", b.title(), b.PoolSize, b.Rounds)
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	cpu := func(format string, values ...any) string {
		if !cpuKnown {
			return ""
		}
		return fmt.Sprintf(format, values...)
	}
	// Messages have no latencies.
	unit, latencies := "req/s", func(p50, p99 string) string { return p50 + "\t" + p99 + "\t" }
	if b.Part == PartMessages {
		unit, latencies = "msg/s", func(string, string) string { return "" }
	}
	group := ""
	for i, row := range b.Rows {
		base, own := b.baseOf(i)
		if base != group {
			group = base
			fmt.Fprintf(table, "x %s\t\t\t%s%s\t%s%sallocs\tWAL B\tRT\tconns\t\n", base, cpu("CPU x\t\t"), unit, latencies("p50 ms", "p99 ms"), cpu("Go us\tPG us\t"))
		}
		throughput, used := "1\t", cpu("1\t\t")
		if own != nil {
			throughput, used = own.Throughput.text(), cpu("%s\t", own.CPU.text())
		}
		fmt.Fprintf(table, "%s\t%s\t%s%.0f\t%s%s%.1f\t%.0f\t%.2f\t%d\t\n", rowName(row.Design, row.Keys, b), throughput, used,
			row.PerSecond.Median, latencies(fmt.Sprintf("%.2f", row.P50MS), fmt.Sprintf("%.2f", row.P99MS)), cpu("%.0f\t%.0f\t", row.GoUS, row.PostgresUS), row.Allocations,
			math.Max(0, row.WALBytes), row.RoundTrips, row.Connections)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	for _, r := range b.Ratios {
		switch {
		case r.Keys != r.BaseKeys:
			verb := "don't overlap"
			if r.Overlap {
				verb = "overlap"
			}
			fmt.Fprintf(w, "%s: the quartiles of full and empty %s\n", r.Design, verb)
		case slices.Index(designOf(r.Design).bases, r.Base) > 0:
			fmt.Fprintf(w, "%s / %s: throughput %s%s\n", r.Design, r.Base, spaced(r.Throughput.text()), cpu(", CPU %s", spaced(r.CPU.text())))
		}
	}
	return nil
}

func rowName(design string, keys int64, b *Block) string {
	switch {
	case b.Part != PartKeys:
		return design
	case keys == 0:
		return design + ", empty"
	}
	return design + ", full"
}

// baseOf returns the name of a row's base in the table, and the row's ratio to it; nil for the base
// itself.
func (b *Block) baseOf(i int) (string, *Ratio) {
	row := b.Rows[i]
	for _, r := range b.Ratios {
		if r.Design == row.Design && r.Keys == row.Keys && (r.Keys != r.BaseKeys || designOf(r.Design).bases[0] == r.Base) {
			if r.Keys != r.BaseKeys {
				return "empty", &r
			}
			return r.Base, &r
		}
	}
	if b.Part == PartKeys {
		return "empty", nil
	}
	return designOf(row.Design).bases[0], nil
}

// text formats a spread in two columns: the median, and its quartiles.
func (s Spread) text() string { return fmt.Sprintf("%.2f\t%.2f-%.2f", s.Median, s.Lower, s.Upper) }

func spaced(columns string) string {
	median, quartiles, _ := strings.Cut(columns, "\t")
	return median + " (" + quartiles + ")"
}
