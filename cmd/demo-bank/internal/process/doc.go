// Package process isolates, stops and kills the processes that demo-bank starts.
package process
