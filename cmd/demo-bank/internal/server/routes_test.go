package server

import (
	"bytes"
	"net/http"
	"reflect"
	"strings"
	"testing"

	"github.com/google/uuid"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/bank"
)

const (
	accountFields  = "id:text currency:text balance:int opening_balance:int"
	transferFields = "id:id from:text to:text amount:int currency:text reference:string created_at:time"
	orderFields    = "id:id account:text sku:text quantity:int amount:int currency:text created_at:time"
	productFields  = "sku:text name:text price:int currency:text stock:int"
	auditFields    = "ok:bool accounts:int transfers:int orders:int balance_total:int opening_total:int entries_total:int " +
		"unbalanced_transfers:int balance_mismatches:int negative_balances:int keys_with_transfers:int " +
		"keys_with_many_transfers:int transfers_without_record:int records_without_transfer:int unprotected_transfers:int " +
		"open_operations:int parked_operations:int held_total:int psp:text charges:int? charges_without_posting:int? " +
		"postings_without_charge:int? payouts_without_posting:int? postings_without_payout:int? " +
		"outbox_pending:int messages_consumed:int messages_duplicate:int messages_dead:int projection_lag:int? projection_missing:int projection_doubled:int projection_mismatches:int"
)

// TestContract checks the table of requests: status, exact fields and their kinds, headers, problem
// types.
func TestContract(t *testing.T) {
	t.Parallel()
	b := setup(t)
	created := func(t *testing.T, r reply, fields, location string) map[string]any {
		t.Helper()
		if r.status != http.StatusCreated || r.header.Get("Content-Type") != "application/json" || r.outcome() != "executed" {
			t.Fatalf("answer is %d %v %s: want 201 executed", r.status, r.header, r.body)
		}
		object := expectFields(t, r.body, fields)
		if want := location + object["id"].(string); r.header.Get("Location") != want {
			t.Errorf("Location is %q, want %q", r.header.Get("Location"), want)
		}
		return object
	}
	// same requires that GET returns the same body as the POST that created it.
	same := func(t *testing.T, posted reply) {
		t.Helper()
		got := b.get(posted.header.Get("Location"))
		if got.status != http.StatusOK || !bytes.Equal(got.body, posted.body) {
			t.Errorf("GET says %d %s, POST said %s", got.status, got.body, posted.body)
		}
	}

	t.Run("accounts", func(t *testing.T) {
		posted := b.keyed("/v1/accounts", `{"id":"carol","currency":"CHF","opening_balance":700}`)
		account := created(t, posted, accountFields, "/v1/accounts/")
		if account["currency"] != "CHF" {
			t.Errorf("currency is %v", account["currency"])
		}
		same(t, posted)
		expectProblem(t, b.keyed("/v1/accounts", `{"id":"carol","currency":"CHF","opening_balance":700}`), 409, "account-exists")
		expectProblem(t, b.get("/v1/accounts/nobody"), 404, "account-not-found")
		expectProblem(t, b.get("/v1/accounts/%00"), 404, "account-not-found")
		if b.balance("alice") != 10_000_000 || b.balance("bob") != 10_000_000 || b.balance("acct-0000") != 100_000 || b.balance("acct-0999") != 100_000 {
			t.Error("the bank did not open with the balances of its seed")
		}
		expectProblem(t, b.get("/v1/accounts/acct-1000"), 404, "account-not-found")
	})

	t.Run("transfers", func(t *testing.T) {
		posted := b.keyed("/v1/transfers", `{"from":"alice","to":"bob","amount":1250,"currency":"EUR","reference":"Rent"}`)
		transfer := created(t, posted, transferFields, "/v1/transfers/")
		if transfer["reference"] != "Rent" || transfer["currency"] != "EUR" || transfer["from"] != "alice" || transfer["to"] != "bob" {
			t.Errorf("transfer is %v", transfer)
		}
		same(t, posted)
		if b.balance("alice") != 10_000_000-1250 || b.balance("bob") != 10_000_000+1250 {
			t.Error("the money did not move")
		}
		short := created(t, b.keyed("/v1/transfers", `{"from":"alice","to":"bob","amount":1}`), transferFields, "/v1/transfers/")
		if short["currency"] != "EUR" || short["reference"] != "" {
			t.Errorf("defaults are %v", short)
		}
		expectProblem(t, b.keyed("/v1/transfers", `{"from":"acct-0500","to":"bob","amount":100001}`), 402, "insufficient-funds")
		expectProblem(t, b.keyed("/v1/transfers", `{"from":"acct-0500","to":"bob","amount":9223372036854775807}`), 402, "insufficient-funds")
		expectProblem(t, b.keyed("/v1/transfers", `{"from":"alice","to":"nobody","amount":1}`), 404, "account-not-found")
		expectProblem(t, b.keyed("/v1/transfers", `{"from":"nobody","to":"alice","amount":1}`), 404, "account-not-found")
		expectProblem(t, b.get("/v1/transfers/1"), 404, "transfer-not-found")
		expectProblem(t, b.get("/v1/transfers/one"), 404, "transfer-not-found")
		expectProblem(t, b.send("POST", "/v1/transfers", `{"from":"alice","to":"bob","amount":1}`), 400, "key-missing")
		// The whole balance can be spent, but no more.
		created(t, b.keyed("/v1/transfers", `{"from":"acct-0500","to":"bob","amount":100000}`), transferFields, "/v1/transfers/")
		expectProblem(t, b.keyed("/v1/transfers", `{"from":"acct-0500","to":"bob","amount":1}`), 402, "insufficient-funds")
	})

	t.Run("orders", func(t *testing.T) {
		before := b.balance("acct-0600")
		posted := b.keyed("/v1/orders", `{"account":"acct-0600","sku":"mug","quantity":3}`)
		order := created(t, posted, orderFields, "/v1/orders/")
		same(t, posted)
		if got := b.balance("acct-0600"); got != before-3*1250 || b.balance("merchant") != 3*1250 || order["currency"] != "EUR" {
			t.Errorf("the account went from %d to %d, the merchant has %d", before, got, b.balance("merchant"))
		}
		created(t, b.keyed("/v1/orders", `{"account":"alice","sku":"teapot","quantity":1}`), orderFields, "/v1/orders/")
		expectProblem(t, b.keyed("/v1/orders", `{"account":"alice","sku":"teapot","quantity":1}`), 409, "out-of-stock")
		expectProblem(t, b.keyed("/v1/orders", `{"account":"acct-0600","sku":"grinder","quantity":12}`), 402, "insufficient-funds")
		expectProblem(t, b.keyed("/v1/orders", `{"account":"nobody","sku":"mug","quantity":1}`), 404, "account-not-found")
		expectProblem(t, b.keyed("/v1/orders", `{"account":"alice","sku":"boat","quantity":1}`), 404, "product-not-found")
		expectProblem(t, b.keyed("/v1/orders", `{"account":"alice","sku":"mug","quantity":0}`), 400, "invalid-order")
		expectProblem(t, b.keyed("/v1/orders", `{"account":"carol","sku":"mug","quantity":1}`), 400, "invalid-order")
		expectProblem(t, b.keyed("/v1/accounts", `{"id":"merchant","currency":"USD","opening_balance":0}`), 400, "invalid-account")
		expectProblem(t, b.keyed("/v1/orders", `{"account":"merchant","sku":"mug","quantity":1}`), 400, "invalid-order")
		expectProblem(t, b.get("/v1/orders/1"), 404, "order-not-found")
	})

	t.Run("products", func(t *testing.T) {
		object := expectFields(t, b.get("/v1/products").body, "products:list")
		list := object["products"].([]any)
		if len(list) == 0 {
			t.Fatal("there are no products")
		}
		for _, one := range list {
			expectObject(t, one.(map[string]any), productFields)
		}
		if !bytes.Contains(b.get("/v1/products").body, []byte(`"stock":999997`)) {
			t.Error("three mugs were ordered and are still in stock")
		}
	})

	t.Run("unprotected transfers", func(t *testing.T) {
		before := b.balance("acct-0700")
		for range 2 {
			r := b.send("POST", "/v1/unprotected/transfers", `{"from":"acct-0700","to":"bob","amount":5}`, "Idempotency-Key", "the-same")
			if r.status != 201 || r.outcome() != "" {
				t.Fatalf("answer is %d %s", r.status, r.body)
			}
			expectFields(t, r.body, transferFields)
		}
		if got := b.balance("acct-0700"); got != before-10 {
			t.Errorf("balance went from %d to %d: without the middleware both copies count", before, got)
		}
		expectProblem(t, b.send("POST", "/v1/unprotected/transfers", `{"from":"acct-0700","to":"bob","amount":0}`), 400, "invalid-transfer")
		expectProblem(t, b.send("POST", "/v1/unprotected/transfers", strings.Repeat(" ", 1<<20)+"{}"), 413, "body-too-large")
	})

	t.Run("audit", func(t *testing.T) {
		expectFields(t, b.get("/v1/audit").body, auditFields)
		b.auditUntil("two consumers have handled the messages of five moves", func(a bank.Audit) bool { return a.MessagesConsumed == 10 })
		audit := b.fed()
		want := bank.Audit{
			OK: true, Accounts: 1004, Transfers: 5, Orders: 2, BalanceTotal: "120000700", OpeningTotal: "120000700", EntriesTotal: "0",
			KeysWithTransfers: 3, UnprotectedTransfers: 2, HeldTotal: "0", PSP: audit.PSP, Charges: new(int64),
			ChargesWithoutPosting: new(int64), PostingsWithoutCharge: new(int64), PayoutsWithoutPosting: new(int64), PostingsWithoutPayout: new(int64),
			MessagesConsumed: 10, ProjectionLag: new(int64),
		}
		if !reflect.DeepEqual(audit, want) {
			t.Errorf("audit is  %+v\nit should be %+v", audit, want)
		}
	})

	t.Run("probes", func(t *testing.T) {
		for _, path := range []string{"/healthz", "/readyz"} {
			if r := b.get(path); r.status != 200 {
				t.Errorf("%s is %d", path, r.status)
			}
		}
		b.exec(`UPDATE demo_bank_migrations SET dirty = true`)
		expectProblem(t, b.get("/readyz"), 503, "not-ready")
		b.exec(`UPDATE demo_bank_migrations SET dirty = false, version = version - 1`)
		expectProblem(t, b.get("/readyz"), 503, "not-ready")
		b.exec(`UPDATE demo_bank_migrations SET version = version + 1`)
		b.exec(`UPDATE idempotency_migrations SET dirty = true`)
		expectProblem(t, b.get("/readyz"), 503, "not-ready")
		b.exec(`UPDATE idempotency_migrations SET dirty = false`)
		if r := b.get("/readyz"); r.status != 200 {
			t.Errorf("/readyz is %d when all is well again", r.status)
		}
	})

	t.Run("elsewhere", func(t *testing.T) {
		expectProblem(t, b.get("/v1/nothing"), 404, "not-found")
		r := b.send(http.MethodDelete, "/v1/transfers", "")
		expectProblem(t, r, 405, "method-not-allowed")
		if got := r.header.Values("Allow"); strings.Join(got, " ") != "GET POST" {
			t.Errorf("Allow is %q", got)
		}
		if r := b.get("/"); r.status != 200 || !bytes.Contains(r.body, []byte("Idempotency-Key")) || !bytes.Contains(r.body, []byte(b.url)) {
			t.Errorf("the page is %d %.200s", r.status, r.body)
		}
		for _, path := range []string{"/assets/page.css", "/assets/page.js"} {
			if r := b.get(path); r.status != 200 || len(r.body) == 0 || r.header.Get("Content-Security-Policy") == "" {
				t.Errorf("%s is %d with %v", path, r.status, r.header)
			}
		}
	})
}

// TestBadBodiesAreRefused: only strict JSON, and only a positive integer as money.
func TestBadBodiesAreRefused(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, one := range []struct{ path, body, slug string }{
		{"/v1/transfers", ``, "invalid-json"},
		{"/v1/transfers", `{`, "invalid-json"},
		{"/v1/transfers", `[]`, "invalid-json"},
		{"/v1/transfers", `null`, "invalid-json"},
		{"/v1/transfers", `{"from":"alice","to":"bob","amount":1} x`, "invalid-json"},
		{"/v1/transfers", `{"from":"alice","to":"bob","amount":1}{}`, "invalid-json"},
		{"/v1/transfers", `{"from":"alice","to":"bob","amount":1,"note":"x"}`, "invalid-transfer"},
		{"/v1/transfers", `{"From":"alice","to":"bob","amount":1}`, "invalid-transfer"},
		{"/v1/transfers", `{"from":"alice","to":"bob","amount":1,"amount":2}`, "invalid-transfer"},
		{"/v1/transfers", `{"from":"alice","to":"bob"}`, "invalid-transfer"},
		{"/v1/transfers", `{"to":"bob","amount":1}`, "invalid-transfer"},
		{"/v1/transfers", `{"from":"alice","to":"bob","amount":0}`, "invalid-transfer"},
		{"/v1/transfers", `{"from":"alice","to":"bob","amount":-1}`, "invalid-transfer"},
		{"/v1/transfers", `{"from":"alice","to":"bob","amount":1.0}`, "invalid-transfer"},
		{"/v1/transfers", `{"from":"alice","to":"bob","amount":1e2}`, "invalid-transfer"},
		{"/v1/transfers", `{"from":"alice","to":"bob","amount":"1"}`, "invalid-transfer"},
		{"/v1/transfers", `{"from":"alice","to":"bob","amount":null}`, "invalid-transfer"},
		{"/v1/transfers", `{"from":"alice","to":"bob","amount":9223372036854775808}`, "invalid-transfer"},
		{"/v1/transfers", `{"from":"alice","to":"alice","amount":1}`, "invalid-transfer"},
		{"/v1/transfers", `{"from":7,"to":"alice","amount":1}`, "invalid-transfer"},
		{"/v1/transfers", `{"from":"alice","to":"bob","amount":1,"currency":"USD"}`, "invalid-transfer"},
		{"/v1/transfers", `{"from":"alice","to":"bob","amount":1,"currency":"euro"}`, "invalid-transfer"},
		{"/v1/transfers", `{"from":"alice","to":"bob","amount":1,"reference":"\u0000"}`, "invalid-transfer"},
		{"/v1/transfers", `{"from":"alice","to":"bob","amount":1,"reference":"` + strings.Repeat("ü", bank.ReferenceRunesMax+1) + `"}`, "invalid-transfer"},
		{"/v1/accounts", `{"id":"x y","currency":"EUR","opening_balance":1}`, "invalid-account"},
		{"/v1/accounts", `{"id":"` + strings.Repeat("x", bank.AccountIDBytesMax+1) + `","currency":"EUR","opening_balance":1}`, "invalid-account"},
		{"/v1/accounts", `{"id":"","currency":"EUR","opening_balance":1}`, "invalid-account"},
		{"/v1/accounts", `{"id":"x","currency":"eur","opening_balance":1}`, "invalid-account"},
		{"/v1/accounts", `{"id":"x","currency":"EUR"}`, "invalid-account"},
		{"/v1/accounts", `{"id":"x","currency":"EUR","opening_balance":-1}`, "invalid-account"},
		{"/v1/accounts", `{"id":"x","currency":"EUR","opening_balance":1000000000001}`, "invalid-account"},
		{"/v1/orders", `{"account":"alice","sku":"mug"}`, "invalid-order"},
		{"/v1/orders", `{"account":"alice","sku":"mug","quantity":-1}`, "invalid-order"},
		{"/v1/orders", `{"account":"alice","sku":"mug","quantity":1,"price":1}`, "invalid-order"},
	} {
		r := b.keyed(one.path, one.body)
		if r.status != 400 {
			t.Errorf("%s %.100s is %d, want 400", one.path, one.body, r.status)
			continue
		}
		expectProblem(t, r, 400, one.slug)
	}
	// The other side of each limit.
	for _, one := range []struct{ path, body string }{
		{"/v1/transfers", `{"from":"alice","to":"bob","amount":1,"reference":"` + strings.Repeat("ü", bank.ReferenceRunesMax) + `"}`},
		{"/v1/transfers", " {\"from\":\"alice\",\n\"to\":\"bob\",\"amount\":1}\n "},
		{"/v1/accounts", `{"id":"` + strings.Repeat("x", bank.AccountIDBytesMax) + `","currency":"EUR","opening_balance":0}`},
		{"/v1/accounts", `{"id":"rich","currency":"EUR","opening_balance":1000000000000}`},
		{"/v1/orders", `{"account":"rich","sku":"mug","quantity":1000000}`},
	} {
		if r := b.keyed(one.path, one.body); r.status != 201 {
			t.Errorf("%s %.100s is %d %s, want 201", one.path, one.body, r.status, r.body)
		}
	}
	// A price that exceeds 64 bits exceeds every balance.
	expectProblem(t, b.keyed("/v1/orders", `{"account":"rich","sku":"grinder","quantity":9223372036854775807}`), 409, "out-of-stock")
	b.exec(`UPDATE products SET stock = 9223372036854775807 WHERE sku = 'grinder'`)
	expectProblem(t, b.keyed("/v1/orders", `{"account":"rich","sku":"grinder","quantity":9223372036854775807}`), 402, "insufficient-funds")
	// No balance overflows.
	b.exec(`UPDATE accounts SET balance = 9223372036854775807 WHERE id = 'acct-0001'`)
	expectProblem(t, b.keyed("/v1/transfers", `{"from":"alice","to":"acct-0001","amount":1}`), 409, "balance-limit")
}

// TestPages: a list is cut at its limit, and the next page continues there.
func TestPages(t *testing.T) {
	t.Parallel()
	b := setup(t)
	type page struct {
		Accounts  []bank.Account
		Transfers []bank.Transfer
		Next      *string
	}
	read := func(path string) page {
		t.Helper()
		r := b.get(path)
		if r.status != 200 {
			t.Fatalf("%s is %d %s", path, r.status, r.body)
		}
		var p page
		b.into(r, &p)
		return p
	}
	seen := 0
	for path := "/v1/accounts?limit=400"; ; {
		expectFields(t, b.get(path).body, "accounts:list next:null-or-string")
		p := read(path)
		seen += len(p.Accounts)
		if p.Next == nil {
			break
		}
		path = "/v1/accounts?limit=400&after=" + *p.Next
	}
	if seen != 1002 {
		t.Errorf("three pages hold %d accounts, want 1002", seen)
	}
	if p := read("/v1/accounts"); len(p.Accounts) != bank.PageLimitDefault || p.Next == nil {
		t.Errorf("a page without a limit has %d accounts", len(p.Accounts))
	}
	if p := read("/v1/accounts?limit=1&after=bob"); len(p.Accounts) != 0 || p.Next != nil {
		t.Errorf("after the last there are %v", p)
	}

	var ids []string
	for _, body := range []string{
		`{"from":"acct-0001","to":"acct-0002","amount":1}`, `{"from":"acct-0002","to":"acct-0003","amount":1}`,
		`{"from":"acct-0003","to":"acct-0001","amount":1}`, `{"from":"acct-0001","to":"acct-0002","amount":1}`,
	} {
		var made bank.Transfer
		b.into(b.keyed("/v1/transfers", body), &made)
		ids = append(ids, made.ID)
	}
	idsOf := func(p page) (list []string) {
		for _, one := range p.Transfers {
			list = append(list, one.ID)
		}
		return list
	}
	for path, want := range map[string][]string{
		"/v1/transfers":                                              ids,
		"/v1/transfers?limit=2":                                      ids[:2],
		"/v1/transfers?limit=2&after=" + ids[1]:                      ids[2:],
		"/v1/transfers?account=acct-0001":                            {ids[0], ids[2], ids[3]},
		"/v1/transfers?account=acct-0001&limit=2":                    {ids[0], ids[2]},
		"/v1/transfers?account=acct-0001&limit=2&after=" + ids[2]:    {ids[3]},
		"/v1/transfers?account=nobody":                               nil,
		"/v1/transfers?account=acct-0003&limit=1000&after=" + ids[0]: {ids[1], ids[2]},
	} {
		expectFields(t, b.get(path).body, "transfers:list next:null-or-string")
		if got := idsOf(read(path)); strings.Join(got, " ") != strings.Join(want, " ") {
			t.Errorf("%s lists %v, want %v", path, got, want)
		}
	}
	if p := read("/v1/transfers?limit=4"); p.Next != nil {
		t.Errorf("the last page names a next one, %s", *p.Next)
	}
	for _, query := range []string{"limit=0", "limit=-1", "limit=1001", "limit=x", "after=x", "after=-1", "account=%00"} {
		expectProblem(t, b.get("/v1/transfers?"+query), 400, "invalid-page")
	}
	expectProblem(t, b.get("/v1/accounts?after=%20"), 400, "invalid-page")
}

// TestTenants: the token names the tenant, the tenant owns the key, and all tenants share the
// accounts.
func TestTenants(t *testing.T) {
	t.Parallel()
	b := setup(t)
	key := uuid.NewString()
	const body = `{"from":"alice","to":"bob","amount":100}`
	transfers := map[string]bool{}
	for _, token := range []string{"", "Bearer demo-acme", "Bearer demo-globex"} {
		headers := []string{"Idempotency-Key", key}
		if token != "" {
			headers = append(headers, "Authorization", token)
		}
		first, second := b.send("POST", "/v1/transfers", body, headers...), b.send("POST", "/v1/transfers", body, headers...)
		if first.status != 201 || first.outcome() != "executed" {
			t.Fatalf("%q: first answer is %d %s %s", token, first.status, first.outcome(), first.body)
		}
		if second.outcome() != "replayed" || !bytes.Equal(first.body, second.body) || second.header.Get("Location") != first.header.Get("Location") {
			t.Errorf("%q: second answer is %s %s", token, second.outcome(), second.body)
		}
		transfers[first.header.Get("Location")] = true
	}
	if len(transfers) != 3 || b.balance("bob") != 10_000_000+300 {
		t.Errorf("three tenants with one key made %d transfers, and bob has %d", len(transfers), b.balance("bob"))
	}
	if audit := b.audit(); !audit.OK || audit.KeysWithTransfers != 3 {
		t.Errorf("audit is %+v", audit)
	}
	for _, token := range []string{"Bearer demo-nobody", "demo-acme", "bearer demo-acme", "Bearer demo-acme ", "Basic x", ""} {
		r := b.send("POST", "/v1/transfers", body, "Idempotency-Key", uuid.NewString(), "Authorization", token)
		if token == "Bearer demo-acme " { // net/http trims it
			if r.status != 201 {
				t.Errorf("%q: answer is %d", token, r.status)
			}
			continue
		}
		expectProblem(t, r, 401, "scope")
		if challenge := r.header.Get("WWW-Authenticate"); !strings.HasPrefix(challenge, "Bearer ") {
			t.Errorf("%q: WWW-Authenticate %q", token, challenge)
		}
		if r.outcome() != "not-executed" {
			t.Errorf("%q: Idempotency-Status is %q", token, r.outcome())
		}
		expectProblem(t, b.send("GET", "/v1/audit", "", "Authorization", token), 401, "unauthorized")
		expectProblem(t, b.send("POST", "/v1/unprotected/transfers", body, "Authorization", token), 401, "unauthorized")
	}
}
