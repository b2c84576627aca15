package encrypted_test

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/internal/testservice"
	"github.com/paidonce/idempotency/middleware"
	"github.com/paidonce/idempotency/storage/encrypted"
	"github.com/paidonce/idempotency/storage/memory"
)

// No byte of a body reaches the table: not in a row, and not in the pages of the table's files.
func TestBodyIsNotInTheTable(t *testing.T) {
	t.Parallel()
	d := testservice.New(t, nil)
	const hidden, plain = "canary-of-an-encrypted-body", "canary-of-a-plain-body"
	s := serve(t, encrypted.New(d.Store, oneKey), nil)
	large := strings.Repeat(hidden, 10_000) // it is stored outside of the row
	want(t, "first", s.post(t, "acme", "small", "/", hidden), 201, idempotency.OutcomeExecuted, hidden)
	want(t, "declined", s.post(t, "acme", "declined", "/declined", hidden), 404, idempotency.OutcomeExecuted, hidden)
	want(t, "large", s.post(t, "acme", "large", "/", large), 201, idempotency.OutcomeExecuted, large)
	want(t, "empty", s.post(t, "acme", "empty", "/", ""), 201, idempotency.OutcomeExecuted, "")
	want(t, "plain", serve(t, d.Store, nil).post(t, "acme", "plain", "/", plain), 201, idempotency.OutcomeExecuted, plain)

	found := heap(t, d)
	if !bytes.Contains(found, []byte(plain)) || !bytes.Contains(found, []byte("declined")) {
		t.Fatal("the scan sees nothing: not even a body that is not encrypted, and a key")
	}
	if bytes.Contains(found, []byte("canary-of-an-enc")) {
		t.Error("a body's text is in the files of the table")
	}
	for key, body := range map[string]string{"small": hidden, "declined": hidden, "large": large, "empty": ""} {
		var row string
		var length int
		if err := d.Pool.QueryRow(t.Context(), "SELECT r::text, length(body) FROM idempotency_keys r WHERE key = $1", key).Scan(&row, &length); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(row, hidden) || strings.Contains(row, hex.EncodeToString([]byte(hidden))) {
			t.Errorf("%s: the row shows its body", key)
		}
		if length != len(body)+encrypted.EnvelopeBytes {
			t.Errorf("%s: %d bytes are recorded of a body of %d", key, length, len(body))
		}
		path, status := "/", 201
		if key == "declined" {
			path, status = "/declined", 404
		}
		replay := s.post(t, "acme", key, path, body)
		want(t, key, replay, status, idempotency.OutcomeReplayed, "")
		if replay.body != body || replay.header.Get("Location") != "/transfers/1" {
			t.Errorf("%s: replayed %d bytes, Location %q", key, len(replay.body), replay.header.Get("Location"))
		}
	}
}

// heap returns the files of the table of the records, and of the values that are stored outside of
// its rows.
func heap(t *testing.T, d *testservice.Service) (all []byte) {
	t.Helper()
	d.Exec(t, "CHECKPOINT")
	rows, err := d.Pool.Query(t.Context(), `SELECT pg_read_binary_file(pg_relation_filepath(r.oid)) FROM pg_class r
		WHERE r.oid = 'idempotency_keys'::regclass OR r.oid = (SELECT reltoastrelid FROM pg_class WHERE oid = 'idempotency_keys'::regclass)`)
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	for rows.Next() {
		var file []byte
		if err := rows.Scan(&file); err != nil {
			t.Fatal(err)
		}
		all = append(all, file...)
	}
	if err := rows.Err(); err != nil {
		t.Fatal(err)
	}
	return all
}

// If any part of a row that its body is bound to is changed, the client gets 500 unknown, and never
// an answer.
func TestChangedRowIsNeverAnswered(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]string{
		"two bodies swapped":       `UPDATE idempotency_keys a SET body = b.body FROM idempotency_keys b WHERE (a.key, b.key) IN (('mine', 'other'), ('other', 'mine'))`,
		"another account's body":   `UPDATE idempotency_keys a SET body = b.body FROM idempotency_keys b WHERE a.scope = 'acme' AND a.key = 'mine' AND b.scope = 'globex'`,
		"another account's row":    `DELETE FROM idempotency_keys WHERE scope = 'acme' AND key = 'mine'; UPDATE idempotency_keys SET scope = 'acme' WHERE scope = 'globex'`,
		"another key's row":        `DELETE FROM idempotency_keys WHERE scope = 'acme' AND key = 'mine'; UPDATE idempotency_keys SET key = 'mine' WHERE scope = 'acme' AND key = 'other'`,
		"attempt":                  `UPDATE idempotency_keys SET attempt_id = gen_random_uuid()`,
		"status":                   `UPDATE idempotency_keys SET status = 200`,
		"headers":                  `UPDATE idempotency_keys SET headers = '\x0100'`,
		"a byte of the tag":        `UPDATE idempotency_keys SET body = set_byte(body, length(body) - 1, get_byte(body, length(body) - 1) # 1)`,
		"a byte of the ciphertext": `UPDATE idempotency_keys SET body = set_byte(body, 20, get_byte(body, 20) # 128)`,
		"cut short":                `UPDATE idempotency_keys SET body = substr(body, 1, length(body) - 1)`,
		"cut within the nonce":     `UPDATE idempotency_keys SET body = substr(body, 1, 10)`,
		"empty":                    `UPDATE idempotency_keys SET body = ''`,
		"a body in the clear":      `UPDATE idempotency_keys SET body = '{"paid":true}'`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			d := testservice.New(t, nil)
			s := serve(t, encrypted.New(d.Store, oneKey), nil)
			for _, key := range [][2]string{{"acme", "mine"}, {"acme", "other"}, {"globex", "mine"}} {
				want(t, "first", s.post(t, key[0], key[1], "/", "canary"), 201, idempotency.OutcomeExecuted, "canary")
			}
			want(t, "unchanged", s.post(t, "acme", "mine", "/", "canary"), 201, idempotency.OutcomeReplayed, "canary")
			for statement := range strings.SplitSeq(change, ";") {
				d.Exec(t, statement)
			}
			refused := s.post(t, "acme", "mine", "/", "canary")
			want(t, "changed", refused, 500, idempotency.OutcomeUnknown, "#record-corrupt")
			if strings.Contains(refused.body, "canary") || refused.header.Get("Location") != "" || s.runs.Load() != 3 {
				t.Errorf("%d runs, header %v, body %s", s.runs.Load(), refused.header, refused.body)
			}
			if logged := s.logged(); !strings.Contains(logged, "reason=record-corrupt") || strings.Contains(logged, "canary") {
				t.Errorf("logged: %s", logged)
			}
		})
	}
}

// The fingerprint's own bytes are compared before. A body is bound to them all the same, so that
// the record of one request can't pass for that of another.
func TestBodyIsBoundToTheFingerprint(t *testing.T) {
	t.Parallel()
	d := testservice.New(t, nil)
	s := serve(t, encrypted.New(d.Store, oneKey), nil)
	want(t, "10", s.post(t, "acme", "ten", "/", "10"), 201, idempotency.OutcomeExecuted, "10")
	want(t, "99", s.post(t, "acme", "other", "/", "99"), 201, idempotency.OutcomeExecuted, "99")
	d.Exec(t, "UPDATE idempotency_keys a SET fingerprint = b.fingerprint FROM idempotency_keys b WHERE a.key = 'ten' AND b.key = 'other'")
	want(t, "the record of 10 for a request of 99", s.post(t, "acme", "ten", "/", "99"), 500, idempotency.OutcomeUnknown, "#record-corrupt")
}

// The look-up of a lost COMMIT decrypts records too, and rejects changed ones.
func TestResolveDecrypts(t *testing.T) {
	t.Parallel()
	d := testservice.New(t, nil)
	store := encrypted.New(d.Store, oneKey)
	s := serve(t, store, nil)
	want(t, "first", s.post(t, "acme", "k", "/", "canary"), 201, idempotency.OutcomeExecuted, "canary")
	claim := &idempotency.Claim{Key: idempotency.Key{Scope: "acme", Value: "k"}}
	record, err := store.Resolve(t.Context(), claim)
	if err != nil || record == nil || string(record.Answer.Body) != "canary" {
		t.Fatalf("resolved %+v, %v", record, err)
	}
	d.Exec(t, "UPDATE idempotency_keys SET status = 200")
	if record, err := store.Resolve(t.Context(), claim); record != nil || !isCorrupt(err) {
		t.Errorf("a changed record is resolved as %+v, %v", record, err)
	}
	if record, err := encrypted.New(d.Store, encrypted.Keys{Current: secretOf(2, 2)}).Resolve(t.Context(), claim); record != nil || !isUnknown(err) {
		t.Errorf("a record of a key that is not held is resolved as %+v, %v", record, err)
	}
}

// Keys rotate without a pause: records under the old key are replayed while the new one encrypts.
func TestRotation(t *testing.T) {
	t.Parallel()
	d := testservice.New(t, nil)
	first, second := secretOf(1, 0xa1), secretOf(2, 0xb2)
	before := serve(t, encrypted.New(d.Store, encrypted.Keys{Current: first}), nil)
	ready := serve(t, encrypted.New(d.Store, encrypted.Keys{Current: first, Older: []encrypted.Key{second}}), nil)
	rotated := serve(t, encrypted.New(d.Store, encrypted.Keys{Current: second, Older: []encrypted.Key{first}}), nil)
	after := serve(t, encrypted.New(d.Store, encrypted.Keys{Current: second}), nil)

	want(t, "under the first", before.post(t, "acme", "one", "/", "canary"), 201, idempotency.OutcomeExecuted, "canary")
	want(t, "under the second", rotated.post(t, "acme", "two", "/", "canary"), 201, idempotency.OutcomeExecuted, "canary")
	for name, s := range map[string]*service{"ready": ready, "rotated": rotated} {
		want(t, name+", the first's", s.post(t, "acme", "one", "/", "canary"), 201, idempotency.OutcomeReplayed, "canary")
		want(t, name+", the second's", s.post(t, "acme", "two", "/", "canary"), 201, idempotency.OutcomeReplayed, "canary")
	}
	// Without the key nothing shows that the record was changed, and another process may answer.
	want(t, "too early", before.post(t, "acme", "two", "/", "canary"), 503, idempotency.OutcomeUnknown, "#outcome-unknown")
	want(t, "too late", after.post(t, "acme", "one", "/", "canary"), 503, idempotency.OutcomeUnknown, "#outcome-unknown")
	if logged := after.logged(); !strings.Contains(logged, "key 1: name that in Keys.Older") {
		t.Errorf("the operator is not told the remedy: %s", logged)
	}
	var ids string
	if err := d.Pool.QueryRow(t.Context(), "SELECT string_agg(key || get_byte(body, 5), ' ' ORDER BY key) FROM idempotency_keys").Scan(&ids); err != nil || ids != "one1 two2" {
		t.Errorf("key ids in the table: %q, %v", ids, err)
	}
}

func TestAnotherSecretUnderTheSameNumberAnswersNothing(t *testing.T) {
	t.Parallel()
	inner := memory.New(nil)
	first := serve(t, encrypted.New(inner, oneKey), nil)
	second := serve(t, encrypted.New(inner, encrypted.Keys{Current: secretOf(1, 0xff)}), nil)
	want(t, "first", first.post(t, "acme", "k", "/", "canary"), 201, idempotency.OutcomeExecuted, "canary")
	want(t, "second", second.post(t, "acme", "k", "/", "canary"), 500, idempotency.OutcomeUnknown, "#record-corrupt")
	want(t, "first again", first.post(t, "acme", "k", "/", "canary"), 201, idempotency.OutcomeReplayed, "canary")
}

// Records from before encryption are refused, unless the dangerous option is set.
func TestRecordOfBeforeEncryption(t *testing.T) {
	t.Parallel()
	inner := memory.New(nil)
	want(t, "before", serve(t, inner, nil).post(t, "acme", "k", "/", "canary"), 201, idempotency.OutcomeExecuted, "canary")
	strict := serve(t, encrypted.New(inner, oneKey), nil)
	want(t, "refused", strict.post(t, "acme", "k", "/", "canary"), 500, idempotency.OutcomeUnknown, "#record-corrupt")
	if logged := strict.logged(); !strings.Contains(logged, "DangerAcceptUnencrypted") {
		t.Errorf("the operator is not told the remedy: %s", logged)
	}
	accepting := oneKey
	accepting.DangerAcceptUnencrypted = true
	lenient := serve(t, encrypted.New(inner, accepting), nil)
	want(t, "accepted", lenient.post(t, "acme", "k", "/", "canary"), 201, idempotency.OutcomeReplayed, "canary")
	want(t, "encrypted all the same", lenient.post(t, "acme", "new", "/", "canary"), 201, idempotency.OutcomeExecuted, "canary")
	if body := inner.Records()[idempotency.Key{Scope: "acme", Value: "new"}].Answer.Body; bytes.Contains(body, []byte("canary")) {
		t.Errorf("recorded %q", body)
	}
	want(t, "strict", strict.post(t, "acme", "new", "/", "canary"), 201, idempotency.OutcomeReplayed, "canary")
}

// The first client gets the answer unencrypted and unchanged.
func TestAnswerToTheClientIsNotChanged(t *testing.T) {
	t.Parallel()
	answer := &idempotency.Answer{Status: 201, Header: map[string][]string{"Etag": {"x"}}, Body: []byte("done")}
	sealed := encrypted.New(memory.New(nil), oneKey).Seal(&idempotency.Claim{}, answer)
	if string(answer.Body) != "done" || answer.Status != 201 || string(sealed.Body) == "done" {
		t.Errorf("the answer became %+v", answer)
	}
	again := encrypted.New(memory.New(nil), oneKey).Seal(&idempotency.Claim{}, answer)
	if bytes.Equal(sealed.Body, again.Body) {
		t.Error("two runs have one ciphertext: the nonce is not random")
	}
}

// With encryption and StatusAndLocation together no body is stored, and the recorded answer can't
// be changed.
func TestEncryptedAndReduced(t *testing.T) {
	t.Parallel()
	d := testservice.New(t, nil)
	s := serve(t, encrypted.New(d.Store, oneKey), func(o *middleware.Options) { o.Reduce = middleware.StatusAndLocation })
	want(t, "first", s.post(t, "acme", "k", "/", "canary"), 201, idempotency.OutcomeExecuted, "canary")
	replay := s.post(t, "acme", "k", "/", "canary")
	want(t, "replay", replay, 201, idempotency.OutcomeReplayed, "")
	if replay.body != "" || replay.header.Get("Location") != "/transfers/1" {
		t.Errorf("replayed %q, Location %q", replay.body, replay.header.Get("Location"))
	}
	// Location: /other
	d.Exec(t, `UPDATE idempotency_keys SET headers = '\x0101084c6f636174696f6e062f6f74686572'`)
	want(t, "changed Location", s.post(t, "acme", "k", "/", "canary"), 500, idempotency.OutcomeUnknown, "#record-corrupt")
}

func TestSecretsAreNotPrinted(t *testing.T) {
	t.Parallel()
	var logs bytes.Buffer
	keys := encrypted.Keys{Current: secretOf(1, 'A'), Older: []encrypted.Key{secretOf(2, 'B')}}
	slog.New(slog.NewJSONHandler(&logs, nil)).Info("keys", "current", keys.Current, "all", keys)
	encoded, err := json.Marshal(keys)
	if err != nil {
		t.Fatal(err)
	}
	store := encrypted.New(memory.New(nil), keys)
	all := logs.String() + string(encoded)
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%d", "%x", "%q"} {
		all += fmt.Sprintf(verb, keys) + fmt.Sprintf(verb, &keys) + fmt.Sprintf(verb, store) + "\n"
	}
	for _, secret := range []string{"AAA", "BBB", "65 65", "65,65", "66,66", "0x41", "4141", "66 66", "QUFB", "1094795585"} {
		if strings.Contains(all, secret) {
			t.Errorf("%q is printed: %.2000s", secret, all)
		}
	}
	if !strings.Contains(logs.String(), "key 1") {
		t.Errorf("logged %s", logs.String())
	}
}

func TestKeysThatCannotWorkPanic(t *testing.T) {
	t.Parallel()
	inner := memory.New(nil)
	for name, make := range map[string]func(){
		"no store":             func() { encrypted.New(nil, oneKey) },
		"no secret":            func() { encrypted.New(inner, encrypted.Keys{}) },
		"an older one without": func() { encrypted.New(inner, encrypted.Keys{Current: secretOf(1, 1), Older: []encrypted.Key{{ID: 2}}}) },
		"two under one number": func() {
			encrypted.New(inner, encrypted.Keys{Current: secretOf(1, 1), Older: []encrypted.Key{secretOf(1, 2)}})
		},
		"two older ones, too": func() {
			encrypted.New(inner, encrypted.Keys{Current: secretOf(1, 1), Older: []encrypted.Key{secretOf(2, 2), secretOf(2, 3)}})
		},
	} {
		text := func() (text string) {
			defer func() { text, _ = recover().(string) }()
			make()
			return ""
		}()
		if !strings.HasPrefix(text, "idempotency/encrypted: ") {
			t.Errorf("%s: %q", name, text)
		}
	}
	encrypted.New(inner, encrypted.Keys{Current: secretOf(0, 1), Older: []encrypted.Key{secretOf(255, 2)}})
}
