package admin

import "time"

// Limits and choices that tests look at from outside.
const (
	BodyShownBytesMax = bodyShownBytesMax
	BodyHexBytesMax   = bodyHexBytesMax
	FormBytesMax      = formBytesMax
)

// SetNow has the handler tell the age of its forms by another clock.
func (h *Handler) SetNow(now func() time.Time) { h.now = now }
