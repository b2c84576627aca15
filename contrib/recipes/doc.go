// Package recipes has the wirings of docs/stacks.md that need no adapter, in its tests.
//
// Each file has the shortest right wiring of one library, which the page quotes, and runs the suite
// of middleware/mwtest on it. The libraries are required here, so that the root module requires none.
package recipes
