package postgres

import "testing"

var recordedHeader = map[string][]string{
	"Content-Type": {"application/json"}, "Location": {"/transfers/1860012345678901234"}, "Vary": {"Accept", "Origin"},
}

func BenchmarkEncodeHeaders(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		encodeHeaders(nil, recordedHeader)
	}
}

func BenchmarkDecodeHeaders(b *testing.B) {
	stored := encodeHeaders(nil, recordedHeader)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := decodeHeaders(stored); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkAdmitSQL(b *testing.B) {
	for name, sql := range map[string]string{
		"short": "INSERT INTO entries (transfer_id, account_id, amount) VALUES ($1, $2, $3)",
		"long": `WITH locked AS (SELECT id, balance FROM accounts WHERE id = ANY ($1) ORDER BY id FOR UPDATE) -- both, in one order
			UPDATE accounts SET balance = balance + CASE accounts.id WHEN $2 THEN -$4 ELSE $4 END, note = 'it''s moved'
			FROM locked WHERE accounts.id = locked.id AND (accounts.id <> $2 OR locked.balance >= $4) RETURNING accounts.id, accounts.balance`,
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := admitSQL(sql, true); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
