// Package process starts, stops and kills the processes of demo-bank's own.
package process
