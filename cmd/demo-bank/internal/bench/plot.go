package bench

import (
	"bytes"
	"errors"
	"fmt"
	"html/template"
	"io"
	"math"
	"slices"
)

// ErrNoPlot means that a run measured nothing that the plot shows.
var ErrNoPlot = errors.New("nothing to plot: bare-batch and another design were not measured together")

// plotBase is the base of the plot's ratios.
const plotBase = "bare-batch"

// The plot's layout, in pixels.
const (
	plotWidth = 720
	plotLeft  = 150 // of the bars: room for names
	plotRight = 70  // room for figures
	plotTop   = 56
	plotRow   = 30
	plotBar   = 18
	plotFoot  = 44
	plotStep  = 0.25 // between two lines of the grid
)

// plotColors are the colors of our designs, of the handler without idempotency, and of the rivals.
// Each is visible on white and on black. Bars are half transparent, so that their whiskers are
// visible too.
var plotColors = map[string]string{"ours": "#1a8aa8", "bare": "#7d8590", "rival": "#c8702a"}

// plot holds the template's data.
type plot struct {
	Width, Height int
	BarHeight     int
	Title, Foot   string
	Bars          []plotBarOf
	Grid          []plotLine
	Left          float64
	GridTop       int
	GridBottom    int
}

type plotBarOf struct {
	Name, Color, Text   string
	Ours                bool
	Y, TextY, MiddleY   float64
	Width               float64
	Lower, Upper, Value float64 // the whisker's ends, and the place of the figure
	CapTop, CapBottom   float64
}

type plotLine struct {
	X    float64
	Text string
	One  bool
}

// WritePlot draws the throughput of the designs at the most clients, with fsync if that was
// measured, as bars relative to bare-batch. It returns [ErrNoPlot] if bare-batch or all other
// designs were not measured.
func (p *Report) WritePlot(w io.Writer) error {
	block, ratios := p.plotted()
	if block == nil {
		return ErrNoPlot
	}
	most := 1.0
	for _, r := range ratios {
		most = max(most, r.Throughput.Upper)
	}
	most = math.Ceil(most/plotStep) * plotStep
	scale := (plotWidth - plotLeft - plotRight) / most
	bottom := plotTop + plotRow*len(ratios)
	d := plot{
		Width: plotWidth, Height: bottom + plotFoot, BarHeight: plotBar, Left: plotLeft, GridTop: plotTop - 6, GridBottom: bottom,
		Title: fmt.Sprintf("Throughput of the same transfer, x %s: %s", plotBase, block.title()),
		Foot: fmt.Sprintf("Medians of %d paired rounds, with quartiles. PostgreSQL %s, %s, %d CPUs shared by load, service and database.",
			block.Rounds, p.Versions.PostgreSQL, p.Versions.Go, p.Versions.CPUs),
	}
	for value := 0.0; value <= most+plotStep/2; value += plotStep {
		d.Grid = append(d.Grid, plotLine{X: round(plotLeft + value*scale), Text: fmt.Sprintf("%g", value), One: value == 1})
	}
	for i, r := range ratios {
		y := float64(plotTop + plotRow*i + (plotRow-plotBar)/2)
		d.Bars = append(d.Bars, plotBarOf{
			Name: r.Design, Color: plotColors[classOf(r.Design)], Ours: classOf(r.Design) == "ours", Text: fmt.Sprintf("%.2f", r.Throughput.Median),
			Y: y, TextY: y + plotBar - 4, MiddleY: y + plotBar/2, CapTop: y + 4, CapBottom: y + plotBar - 4,
			Width: round(r.Throughput.Median * scale), Lower: round(plotLeft + r.Throughput.Lower*scale), Upper: round(plotLeft + r.Throughput.Upper*scale),
			Value: round(plotLeft + max(r.Throughput.Upper, r.Throughput.Median)*scale + 8),
		})
	}
	var b bytes.Buffer
	if err := plotTemplate.Execute(&b, d); err != nil {
		return fmt.Errorf("draw the plot: %w", err)
	}
	_, err := w.Write(b.Bytes())
	return err
}

// plotted returns the block that the plot shows, and its bars: the base first.
func (p *Report) plotted() (*Block, []Ratio) {
	var best *Block
	for _, b := range p.Blocks {
		if b.Part == PartDesigns && (best == nil || b.Fsync == "on" && best.Fsync != "on" || b.Fsync == best.Fsync && b.Clients > best.Clients) {
			best = b
		}
	}
	if best == nil {
		return nil, nil
	}
	bars := []Ratio{{Design: plotBase, Base: plotBase, Throughput: Spread{1, 1, 1}}}
	for _, r := range best.Ratios {
		if r.Base == plotBase {
			bars = append(bars, r)
		}
	}
	if len(bars) < 2 {
		return nil, nil
	}
	return best, bars
}

// classOf returns a design's class: ours, bare or rival.
func classOf(name string) string {
	switch {
	case slices.Contains([]string{"ours-naive", "ours-batch", "ours-deferred"}, name):
		return "ours"
	case slices.Contains([]string{"insert-first", "lease"}, name):
		return "rival"
	}
	return "bare"
}

func round(x float64) float64 { return math.Round(x*10) / 10 }

// plotTemplate is an SVG with text that is readable on a light and on a dark page, even if
// prefers-color-scheme is ignored.
var plotTemplate = template.Must(template.New("plot").Parse(`<svg xmlns="http://www.w3.org/2000/svg" width="{{.Width}}" height="{{.Height}}" viewBox="0 0 {{.Width}} {{.Height}}" role="img" font-family="system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif" font-size="13">
<title>{{.Title}}</title>
<text x="12" y="24" font-size="15" font-weight="600" fill="#768390">{{.Title}}</text>
{{range .Grid}}<line x1="{{.X}}" x2="{{.X}}" y1="{{$.GridTop}}" y2="{{$.GridBottom}}" stroke="#768390" stroke-opacity="{{if .One}}0.9{{else}}0.25{{end}}" stroke-width="1"/>
<text x="{{.X}}" y="{{$.GridBottom}}" dy="16" text-anchor="middle" font-size="11" fill="#768390">{{.Text}}</text>
{{end}}{{range .Bars}}<text x="{{$.Left}}" y="{{.TextY}}" dx="-10" text-anchor="end" fill="#768390"{{if .Ours}} font-weight="600"{{end}}>{{.Name}}</text>
<rect class="bar" x="{{$.Left}}" y="{{.Y}}" width="{{.Width}}" height="{{$.BarHeight}}" rx="2" fill="{{.Color}}" fill-opacity="0.55"><title>{{.Name}}: {{.Text}}</title></rect>
{{if ne .Lower .Upper}}<path d="M{{.Lower}} {{.CapTop}}V{{.CapBottom}}M{{.Lower}} {{.MiddleY}}H{{.Upper}}M{{.Upper}} {{.CapTop}}V{{.CapBottom}}" fill="none" stroke="{{.Color}}" stroke-width="2"/>
{{end}}<text x="{{.Value}}" y="{{.TextY}}" fill="#768390">{{.Text}}</text>
{{end}}<text x="12" y="{{.Height}}" dy="-8" font-size="11" fill="#768390">{{.Foot}}</text>
</svg>
`))
