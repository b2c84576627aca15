// Package boltintent keeps a client's intents in a bbolt file, so that a process that is killed
// continues with the same keys when it starts again. It is a module of its own: a program that does
// not use it does not depend on bbolt.
//
//	intents, err := boltintent.Open("/var/lib/payer/intents", nil)
//	defer intents.Close()
//	transport := client.New(nil, &client.Options{Honours: client.Everywhere, Intents: intents})
//	report, err := transport.Resume(ctx, handle)
//
// [Store.Save] returns when the intent is on the disk. Concurrent calls share a commit. NoSync is
// never set.
//
// One process at a time has the file. It holds a lock on the file itself, which the system releases
// when the process ends, however it ends. [Open] waits for [Options.LockTimeout], and then returns
// an error that names the process that holds it. If the file is replaced or removed while it is
// open nothing more is kept: each call returns [ErrReplaced].
//
// Each intent has a checksum, and the file has one over all of them. [Open] reads the whole file
// and compares. A difference is [ErrDamaged], because an intent may be lost; nothing is repaired or
// dropped. Move the file away, look its requests up at the server, and start with a new one. The
// same holds for a file that is changed while it is open.
//
// The file holds the bodies and URLs of requests as they are. Only its owner may read it (mode
// 0600). Put it on a local disk, encrypted if the data needs it, and not into a backup that
// outlives the age at which intents are sent again. It grows with the number of intents that are
// kept at one time, reuses its space, and never shrinks.
package boltintent
