// Package envelope has what package encrypted and the stores both know of an encrypted part.
package envelope

// Mark begins each encrypted part. It has a NUL, so no text begins with it.
const Mark = "\x00enc"
