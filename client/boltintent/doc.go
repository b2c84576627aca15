// Package boltintent keeps a client's intents in a file of bbolt's, so that a process that is killed goes on with the
// same keys when it starts again. It is a module of its own: who does not use it does not get bbolt.
//
//	intents, err := boltintent.Open("/var/lib/payer/intents", nil)
//	defer intents.Close()
//	transport := client.New(nil, &client.Options{Honours: client.Everywhere, Intents: intents})
//	report, err := transport.Resume(ctx, handle)
//
// [Store.Save] returns when the intent is on the disk. Those that save at once share a commit. NoSync is never set.
//
// One process at a time has the file. It holds a lock on the file itself, which the system releases when the process
// ends, however it ends. [Open] waits for [Options.LockTimeout], and then names the process that holds it. A file that
// is replaced or removed while it is open keeps nothing more: each call is [ErrReplaced].
//
// Each intent has a checksum, and the file has one over all of them. [Open] reads the whole file and compares. What does not
// fit is [ErrDamaged], because an intent may be lost; nothing is repaired or dropped. Move the file away, look at the
// server for what it held, and start with a new one. So it is with a file that is changed while it is open.
//
// The file holds the bodies and URLs of requests as they are. Only its owner may read it (mode 0600). It belongs on a local
// disk that is encrypted if they are worth it, and not into a backup that outlives the age at which intents are sent
// again. It grows with what is kept at one time, is used again for what comes later, and never shrinks.
package boltintent
