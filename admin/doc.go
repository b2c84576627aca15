// Package admin serves pages on which the people who run a service read and change its idempotency
// records in PostgreSQL: look a key up, page through the records, see the history of a key, expire
// or delete a record, and find faults of the database. It is an [http.Handler] that a service
// mounts within itself, behind its own authentication:
//
//	records := admin.New(store, authorize, nil)
//	mux.Handle("/admin/keys/", authenticate(http.StripPrefix("/admin/keys", records)))
//
// No request shows or does anything before the [AuthorizeFunc] has allowed it; there is no page
// without one. It checks one [Permission] at a time, so that some people may only look and others
// may act. Each act adds its actor to the table idempotency_audit, in the same transaction.
//
// # What keeps it safe
//
// No URL contains a scope or a key: pages name them by sealed tokens (AES-256-GCM), so that access
// logs, browser histories and Referer headers contain none. A request that changes something must
// come from a page of the same origin ([http.CrossOriginProtection]). It must also carry a token
// that was made within the last half hour for this actor, this act and this attempt's record. The
// package sets no cookie. Pages load nothing from elsewhere, run no inline script, can't be framed,
// and are not kept by caches.
//
// The pages show the contents of the table. Bodies are shown only on demand, with a permission of
// their own. Recorded headers are shown to everybody with PermissionView.
//
// # What it costs
//
// There is no index beside the primary key, so a list reads the primary key from the end of the
// previous page on, and each page is bounded in rows and in time. Figures of the whole table are
// estimates. docs/admin.md has more.
package admin
