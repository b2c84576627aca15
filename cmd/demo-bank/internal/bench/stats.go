package bench

import (
	"maps"
	"math"
	"slices"
)

// Spread is a median and its quartiles.
type Spread struct {
	Lower  float64 `json:"lower"`
	Median float64 `json:"median"`
	Upper  float64 `json:"upper"`
}

// spreadOf returns the spread of values, which may be in any order. It interpolates between two
// values. It panics if there are none.
func spreadOf(values []float64) Spread {
	sorted := slices.Sorted(slices.Values(values))
	at := func(share float64) float64 {
		place := share * float64(len(sorted)-1)
		below := int(math.Floor(place))
		above := min(below+1, len(sorted)-1)
		return sorted[below] + (place-float64(below))*(sorted[above]-sorted[below])
	}
	return Spread{Lower: at(0.25), Median: at(0.5), Upper: at(0.75)}
}

func (s Spread) overlaps(o Spread) bool { return s.Lower <= o.Upper && o.Lower <= s.Upper }

// ratiosOf divides value by value: both must be of the same rounds in the same order. A round in
// which either is 0 or less means nothing and is left out.
func ratiosOf(values, bases []float64) []float64 {
	var ratios []float64
	for i := range min(len(values), len(bases)) {
		if values[i] > 0 && bases[i] > 0 {
			ratios = append(ratios, values[i]/bases[i])
		}
	}
	return ratios
}

// sortedKeys returns a map's keys, sorted.
func sortedKeys[V any](m map[string]V) []string { return slices.Sorted(maps.Keys(m)) }
