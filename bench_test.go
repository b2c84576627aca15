package idempotency_test

import (
	"bytes"
	"context"
	"strconv"
	"testing"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/memory"
)

func BenchmarkFingerprintV1(b *testing.B) {
	for _, size := range []int{200, 64 << 10} {
		b.Run(strconv.Itoa(size)+"B", func(b *testing.B) {
			body := bytes.Repeat([]byte("x"), size)
			b.ReportAllocs()
			b.SetBytes(int64(size))
			for b.Loop() {
				idempotency.NewFingerprintV1("POST", "/transfers", "", "application/json", body)
			}
		})
	}
}

func BenchmarkValidateKeyValue(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		if err := idempotency.ValidateKeyValue("0198f3c2-7f7a-7cc4-9d0e-5d7f4a1b2c3d"); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkEngine(b *testing.B) {
	said := &idempotency.Answer{Status: 201, Header: map[string][]string{"Content-Type": {"application/json"}}, Body: bytes.Repeat([]byte("x"), 200)}
	run := func(context.Context) (*idempotency.Answer, error) { return said, nil }
	fingerprint := idempotency.NewFingerprintV1("POST", "/transfers", "", "", nil)
	b.Run("fresh", func(b *testing.B) { // includes the memory store's part
		engine := idempotency.NewEngine(memory.New(nil), nil)
		b.ReportAllocs()
		for n := 0; b.Loop(); n++ {
			req := idempotency.Request{Key: idempotency.Key{Scope: "acme", Value: strconv.Itoa(n)}, Fingerprint: fingerprint}
			if result := engine.Do(b.Context(), req, run); result.Outcome != idempotency.OutcomeExecuted {
				b.Fatal(result.Err)
			}
		}
	})
	b.Run("replay", func(b *testing.B) {
		engine := idempotency.NewEngine(memory.New(nil), nil)
		req := idempotency.Request{Key: idempotency.Key{Scope: "acme", Value: "k"}, Fingerprint: fingerprint}
		engine.Do(b.Context(), req, run)
		b.ReportAllocs()
		for b.Loop() {
			if result := engine.Do(b.Context(), req, run); result.Outcome != idempotency.OutcomeReplayed {
				b.Fatal(result.Err)
			}
		}
	})
}
