package admin

import "time"

// Limits and choices for tests outside of the package.
const (
	BodyShownBytesMax = bodyShownBytesMax
	BodyHexBytesMax   = bodyHexBytesMax
	FormBytesMax      = formBytesMax
)

// SetNow sets the clock by which the handler computes the age of its forms.
func (h *Handler) SetNow(now func() time.Time) { h.now = now }
