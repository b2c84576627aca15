// Package fileintent keeps a client's intents in a file, so that a process that is killed goes on with the same keys
// when it starts again.
//
//	intents, err := fileintent.Open("/var/lib/payer/intents", nil)
//	defer intents.Close()
//	transport := client.New(nil, &client.Options{Honours: client.Everywhere, Intents: intents})
//	report, err := transport.Resume(ctx, handle)
//
// The file is a log of saved and forgotten intents, each with a checksum. What was saved is on the disk (fsync) before
// [Store.Save] returns; those that save at once share one. A record that a crash has cut off at the end of the file was never
// acknowledged, and is dropped. Damage anywhere else is an error, because an intent may be lost in it.
//
// One process at a time has a file: it holds a lock on the file's name with .lock after it, which the system releases when
// the process ends, however it ends.
//
// The file holds the bodies and URLs of requests as they are. Only its owner may read it (mode 0600); it belongs on a disk that is
// encrypted where they are worth it, and not into a backup that outlives the age at which intents are sent again.
package fileintent
