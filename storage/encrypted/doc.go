// Package encrypted encrypts the recorded bodies of a store, for answers that must not be readable
// in a table, its backups and its replicas.
//
//	database, err := postgres.Open(ctx, databaseURL, nil)
//	store := encrypted.New(database, encrypted.Keys{Current: encrypted.Key{ID: 1, Secret: secret}})
//	idem := middleware.New(store, accountID, nil)
//
// A body is sealed with AES-256-GCM and bound to its scope, key, fingerprint, attempt, status and
// headers: a body that was changed, or moved to another row, is never replayed. Everything but the
// body stays readable, for look-ups and for the operator: scope, key, the hash of the request,
// status, headers (Location, for example), dates, trace id, and the body's length.
//
// # Rotation
//
// Records are a few days old at most, so none is ever encrypted again. With several processes take
// three steps, each completed everywhere before the next:
//
//   - add the new key to [Keys].Older: every process can read it
//   - make it [Keys].Current, and move the previous key to [Keys].Older
//   - after the longest TTL, and a walk of the reaper, remove the old key
//
// A key is good for 2^32 records, because nonces are random: rotate before that. At 1,000 answers a
// second that takes seven weeks.
//
// # Refused records
//
// A body that does not belong to its row is [idempotency.ErrRecordCorrupt], 500 unknown for the
// client: somebody changed the table, or a key's Secret is not the one of that ID. A record under a
// key that [Keys] does not hold is [idempotency.ErrUnknown], 503 unknown: nothing proves that it
// was changed, and another process, or this one once it has the key, can answer it.
package encrypted
