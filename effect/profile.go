package effect

import (
	"time"

	"github.com/paidonce/idempotency"
)

// Profile has the facts about the keys of a known service, for the fields of an [Effect] with the
// same names. Compare them with the service's documentation before you rely on them: an account can
// have other settings. Facts that a service does not publish are left at the safe default.
type Profile struct {
	Service       string
	KeyLifetime   time.Duration // zero: not said, so the default counts
	KeepsDeclines bool          // false: not said, or not so
	Note          string
	Source        string // where the service says so
	Read          string // the date on which it was read
}

// Profiles returns the known profiles.
func Profiles() []Profile {
	const day = 24 * time.Hour
	const read = "2026-11-28"
	return []Profile{
		{
			Service: "stripe-v1", KeyLifetime: day, KeepsDeclines: true,
			Note:   "keys may be forgotten after 24 hours; an answer is kept whatever it is, a 500 too; search lags, so look up in a list",
			Source: "https://docs.stripe.com/api/idempotent_requests", Read: read,
		},
		{
			Service: "stripe-v2", KeyLifetime: 30 * day,
			Note:   "failed work is driven on under its key, and the updated answer returned",
			Source: "https://docs.stripe.com/api-v2-overview", Read: read,
		},
		{
			Service: "adyen", KeyLifetime: 31 * day,
			Note:   "keys are kept for at least 31 days, in one region; transient errors are marked; results also come by webhook",
			Source: "https://docs.adyen.com/development-resources/api-idempotency", Read: read,
		},
		{
			Service: "checkout", KeyLifetime: day,
			Note:   "the lifetime can be changed for an account, and was 120 seconds in the sandbox; a request that failed is attempted again under its key; of two at once one gets 429",
			Source: "https://www.checkout.com/docs/developer-resources/api/idempotency", Read: read,
		},
		{
			Service: "square",
			Note:    "the lifetime is not published; CancelPaymentByIdempotencyKey ends a payment of unknown state, and succeeds if there is none",
			Source:  "https://developer.squareup.com/reference/square/payments-api/cancel-payment-by-idempotency-key", Read: read,
		},
		{
			Service: "paypal",
			Note:    "the lifetime differs between APIs, and not all have keys; a repetition gets the latest status; of two at once one may fail",
			Source:  "https://developer.paypal.com/api/rest/reference/idempotency", Read: read,
		},
	}
}

// ProfileOf returns the profile of a service. It panics if there is none.
func ProfileOf(service string) Profile {
	for _, profile := range Profiles() {
		if profile.Service == service {
			return profile
		}
	}
	panic(idempotency.UsageError("idempotency/effect: there is no profile of " + service + ": see Profiles"))
}
