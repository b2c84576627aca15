package probe

// Profile is a set of rules that an API claims to follow.
type Profile string

// The profiles.
const (
	ProfileIETF     Profile = "ietf"      // draft-ietf-httpapi-idempotency-key-header
	ProfileStripe   Profile = "stripe-v1" // Stripe's API v1, and the many that follow it
	ProfilePaidonce Profile = "paidonce"  // package middleware of this module
)

// Profiles are all profiles.
var Profiles = []Profile{ProfileIETF, ProfileStripe, ProfilePaidonce}

// Level is the weight of a rule in a profile. Only a binding rule affects the verdict on the API.
type Level string

// The levels. A rule with levelNone is not part of the profile.
const (
	LevelBinding  Level = "binding"
	LevelAdvisory Level = "advisory"
	levelNone     Level = ""
)

// The names of the rules. They are stable.
const (
	ruleFirst         = "first-one-effect"
	ruleMissing       = "key-missing"
	ruleEmpty         = "key-empty"
	ruleTooLong       = "key-too-long"
	ruleTwice         = "key-twice"
	ruleCase          = "key-case-sensitive"
	ruleWhole         = "key-whole"
	ruleScoped        = "key-scoped"
	ruleStatus        = "replay-status"
	ruleBody          = "replay-body"
	ruleLocation      = "replay-location"
	ruleReplayed      = "replay-one-effect"
	ruleAtOnce        = "replay-at-once"
	ruleLater         = "replay-later"
	ruleNo409         = "no-409-after-answer"
	ruleMismatch      = "mismatch-refused"
	ruleMismatchNone  = "mismatch-no-effect"
	ruleMismatchKeeps = "mismatch-keeps-answer"
	ruleCopies        = "copies-one-effect"
	ruleCopiesAnswer  = "copies-answer"
	ruleCut           = "cut-one-effect"
	ruleCutAnswered   = "cut-answered"

	ruleLongest     = "key-longest"
	ruleCharacters  = "key-characters"
	ruleQuoting     = "key-quoting"
	ruleMissing400  = "missing-is-400"
	ruleMismatch422 = "mismatch-is-422"
	ruleMismatch400 = "mismatch-is-400"
	ruleProblem     = "problem-json"
	ruleLink        = "refusal-link"
	ruleRetryAfter  = "retry-after"
	ruleMarker      = "replay-marker"
	ruleOutcome     = "outcome-header"
)

// rule is one rule, with its level in each profile and its source.
type rule struct {
	id                     string
	ietf, stripe, paidonce Level
	source                 string
	vendor                 string // the source in the profile stripe-v1, if it is another one
}

const (
	draft    = "draft-ietf-httpapi-idempotency-key-header, "
	stripe   = "Stripe API, Idempotent requests (docs.stripe.com/api/idempotent_requests)"
	stripeLL = "Stripe, Advanced error handling (docs.stripe.com/error-low-level)"
	ours     = "paidonce, docs/problems.md"
)

// rules are all rules, in the order in which they are reported.
var rules = func() []rule {
	const B, A, none = LevelBinding, LevelAdvisory, levelNone
	return []rule{
		{ruleFirst, B, B, B, draft + "section 2.6 (first time request)", stripe},
		{ruleStatus, B, B, B, draft + "section 2.6 (retry)", stripe},
		{ruleBody, B, B, B, draft + "section 2.6 (retry)", stripe},
		{ruleLocation, B, A, B, draft + "section 2.6 (retry); RFC 9110, section 10.2.2", ""},
		{ruleReplayed, B, B, B, draft + "sections 1 and 2.6 (retry)", stripe},
		{ruleAtOnce, B, B, B, draft + "section 2.6 (retry)", stripe},
		{ruleLater, B, B, B, draft + "sections 2.3 and 2.6 (retry)", stripe},
		{ruleNo409, B, B, B, draft + "sections 2.6 and 2.7: 409 is for a request that is still being processed", stripe},
		{ruleMismatch, B, B, B, draft + "sections 2.2 and 2.7", stripe},
		{ruleMismatchNone, B, B, B, draft + "section 2.2", stripe},
		{ruleMismatchKeeps, B, B, B, draft + "sections 2.2 and 2.6 (retry)", stripe},
		{ruleMissing, B, none, B, draft + "section 2.7", ""},
		{ruleEmpty, B, A, B, draft + "section 2.1; RFC 8941, section 4.2", ""},
		{ruleTooLong, B, B, B, draft + "section 5 (validate the key as published); the limit is that of most services, such as Stripe", stripe},
		{ruleTwice, B, A, B, draft + "section 2.1; RFC 8941, section 4.2", ""},
		{ruleCase, B, B, B, draft + "section 2.1; RFC 8941, section 3.3.3", ""},
		{ruleWhole, B, B, B, draft + "section 2.1; RFC 8941, section 3.3.3", ""},
		{ruleScoped, B, B, B, draft + "section 5 (composite key)", ""},
		{ruleCopies, B, B, B, draft + "sections 1 and 2.6 (concurrent request)", stripe},
		{ruleCopiesAnswer, B, B, B, draft + "sections 2.6 (concurrent request) and 2.7", stripe},
		{ruleCut, B, B, B, draft + "section 1 (fault tolerance)", stripe},
		{ruleCutAnswered, B, B, B, draft + "sections 1 and 2.6 (retry)", stripe},

		{ruleLongest, none, B, B, ours + "#key-invalid", stripe},
		{ruleCharacters, A, none, A, draft + "section 2.1; RFC 8941, section 3.3.3", ""},
		{ruleQuoting, A, none, B, draft + "section 2.1; RFC 8941, section 3.3.3", ""},
		{ruleMissing400, A, none, B, draft + "section 2.7", ""},
		{ruleMismatch422, A, none, B, draft + "section 2.7", ""},
		{ruleMismatch400, none, A, none, "", stripe},
		{ruleProblem, A, none, B, draft + "section 2.7; RFC 9457", ""},
		{ruleLink, A, none, A, draft + "section 2.7; RFC 8288", ""},
		{ruleRetryAfter, A, none, A, "RFC 9110, section 10.2.3", ""},
		{ruleMarker, A, A, B, "common practice, begun by Stripe (docs.stripe.com/error-low-level): Idempotent-Replayed: true", stripeLL},
		{ruleOutcome, none, none, B, ours, ""},
	}
}()

// in returns the rule's level and source in a profile.
func (r *rule) in(p Profile) (Level, string) {
	switch p {
	case ProfileStripe:
		if r.vendor != "" {
			return r.stripe, r.vendor
		}
		return r.stripe, r.source
	case ProfilePaidonce:
		return r.paidonce, r.source
	default:
		return r.ietf, r.source
	}
}
