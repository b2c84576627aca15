// Package admin is a page, for people who run a service, to look at its idempotency records in PostgreSQL and to act on them:
// look a key up, page through the records, see what became of a key, end its time or delete it, and see what is wrong with the
// database. It is an [http.Handler] that a service mounts within itself, behind its own authentication:
//
//	records := admin.New(store, authorize, nil)
//	mux.Handle("/admin/keys/", authenticate(http.StripPrefix("/admin/keys", records)))
//
// Nothing is shown or done before the [AuthorizeFunc] has allowed it, for each request anew; there is no page without one. It
// is asked for one [Permission] at a time, so that some may look and others act. Who acted is written to the table
// idempotency_audit, in the transaction of the act.
//
// # What keeps it safe
//
// Scopes and keys are in no URL: pages name them by sealed tokens (AES-256-GCM), so that access logs, browser histories and
// Referer headers hold none. A request that changes something must come from a page of the same origin
// ([http.CrossOriginProtection]) and carry a token that was made for this actor, this act and this attempt's record within
// the last half hour; the package sets no cookie. Pages load nothing from elsewhere, run no inline script, can't be
// framed, and are not kept by caches.
//
// What it shows is what the table holds. Bodies are shown on demand alone, with a permission of their own; recorded
// headers are shown to whoever may view.
//
// # What it costs
//
// There is no index beside the primary key, so a list goes along that, from where the page before ended, and each page is
// bounded in rows and in time. Figures of the whole table are estimates. docs/admin.md has more.
package admin
