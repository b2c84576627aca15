package operator_test

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// walk goes through all pages of a list, and returns the keys, as scope/key, and the number of
// pages.
func (b *testBundle) walk(t testing.TB, filter operator.Filter, page operator.Page) (keys []string, pages int) {
	t.Helper()
	for {
		list, err := b.operator.List(t.Context(), filter, page)
		if err != nil {
			t.Fatal(err)
		}
		pages++
		for _, r := range list.Records {
			keys = append(keys, r.Key.Scope+"/"+r.Key.Value)
		}
		if list.Next == "" {
			return keys, pages
		}
		page.After = list.Next
	}
}

func TestListWalksEveryRecordOnce(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.plant(t, "acme", 250)
	b.plant(t, "Zeta", 3) // before acme, by bytes
	b.plant(t, "zürich", 3)
	want := strings.Split(b.Text(t, "SELECT string_agg(scope || '/' || key, ' ' ORDER BY scope, key) FROM idempotency_keys"), " ")
	for _, rows := range []int{1, 50, 128, 256, 1000} {
		for _, descending := range []bool{false, true} {
			keys, pages := b.walk(t, operator.Filter{}, operator.Page{Rows: rows, Descending: descending})
			if descending {
				slices.Reverse(keys)
			}
			if !slices.Equal(keys, want) || pages != (len(want)+rows-1)/rows {
				t.Errorf("pages of %d, descending %t: %d keys on %d pages, want %d", rows, descending, len(keys), pages, len(want))
			}
		}
	}
	if list, err := b.operator.List(t.Context(), operator.Filter{}, operator.Page{}); err != nil || len(list.Records) != 50 || list.RowsExamined != 50 {
		t.Errorf("a page without a size has %d records, %d examined, %v", len(list.Records), list.RowsExamined, err)
	}
}

// Each filter finds the same rows as a plain statement.
func TestListFilters(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.plant(t, "acme", 300)
	b.plant(t, "beta", 300)
	b.Exec(t, "UPDATE idempotency_keys SET expires_at = now() - interval '1 second', trace_id = 'trace-1' WHERE key LIKE '%3'")
	created := time.Now().Add(-100 * time.Second).UTC().Truncate(time.Microsecond)
	attempt := b.Text(t, "SELECT attempt_id::text FROM idempotency_keys WHERE scope = 'beta' AND key = 'k00000123'")
	id, err := operator.ParseAttemptID(attempt)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		filter operator.Filter
		where  string
	}{
		"scope":               {operator.Filter{Scope: "beta"}, "scope = 'beta'"},
		"scope that is not":   {operator.Filter{Scope: "bet"}, "false"},
		"prefix":              {operator.Filter{KeyPrefix: "k0000012"}, "key LIKE 'k0000012%'"},
		"prefix in a scope":   {operator.Filter{Scope: "beta", KeyPrefix: "k0000012"}, "scope = 'beta' AND key LIKE 'k0000012%'"},
		"whole key":           {operator.Filter{KeyPrefix: "k00000123"}, "key = 'k00000123'"},
		"a prefix is no LIKE": {operator.Filter{KeyPrefix: "k%"}, "false"},
		"4xx":                 {operator.Filter{StatusClass: 4}, "status BETWEEN 400 AND 499"},
		"2xx":                 {operator.Filter{StatusClass: 2}, "status BETWEEN 200 AND 299"},
		"3xx":                 {operator.Filter{StatusClass: 3}, "false"},
		"live":                {operator.Filter{Expiry: operator.ExpiryLive}, "expires_at >= now()"},
		"expired":             {operator.Filter{Expiry: operator.ExpiryExpired}, "expires_at < now()"},
		"created from":        {operator.Filter{CreatedFrom: created}, "created_at >= '" + created.Format(time.RFC3339Nano) + "'"},
		"created to":          {operator.Filter{CreatedTo: created}, "created_at < '" + created.Format(time.RFC3339Nano) + "'"},
		"trace":               {operator.Filter{TraceID: "trace-1"}, "trace_id = 'trace-1'"},
		"attempt":             {operator.Filter{Attempt: id}, "attempt_id = '" + attempt + "'"},
		"together":            {operator.Filter{Scope: "acme", StatusClass: 2, Expiry: operator.ExpiryExpired, TraceID: "trace-1"}, "scope = 'acme' AND key LIKE '%3'"},
	} {
		want := strings.Fields(b.Text(t, "SELECT COALESCE(string_agg(scope || '/' || key, ' ' ORDER BY scope, key), '') FROM idempotency_keys WHERE "+test.where))
		for _, rows := range []int{7, 1000} {
			keys, _ := b.walk(t, test.filter, operator.Page{Rows: rows})
			if !slices.Equal(keys, want) {
				t.Errorf("%s, pages of %d: %d keys, want %d", name, rows, len(keys), len(want))
			}
		}
	}
}

// A filter that finds nothing stops at its limit, returns the place, and continues from there: the
// number of examined rows is exact.
func TestListStopsAtItsLimitOfRows(t *testing.T) {
	t.Parallel()
	b := setup(t, &operator.Options{RowsExaminedMax: 1000, ScanTimeMax: time.Minute})
	b.plant(t, "acme", 2500)
	filter := operator.Filter{StatusClass: 5}
	var after operator.Cursor
	for i, want := range []int64{1000, 1000, 500} {
		list, err := b.operator.List(t.Context(), filter, operator.Page{After: after})
		if err != nil || len(list.Records) != 0 || list.RowsExamined != want || (list.Next == "") != (i == 2) {
			t.Fatalf("page %d: %d records, %d examined, next %q, %v; want %d examined", i, len(list.Records), list.RowsExamined, list.Next, err, want)
		}
		after = list.Next
	}
	keys, pages := b.walk(t, operator.Filter{KeyPrefix: "k0000250"}, operator.Page{})
	if len(keys) != 1 || pages != 3 {
		t.Errorf("%d keys on %d pages; the one that is there is on the third", len(keys), pages)
	}
}

// The time is limited too, whatever the number of rows.
func TestListStopsAtItsLimitOfTime(t *testing.T) {
	t.Parallel()
	b := setup(t, &operator.Options{ScanTimeMax: time.Nanosecond})
	b.plant(t, "acme", 3000)
	list, err := b.operator.List(t.Context(), operator.Filter{StatusClass: 5}, operator.Page{})
	if err != nil || list.Next == "" || list.RowsExamined == 0 || list.RowsExamined >= 3000 {
		t.Errorf("%d examined, next %q, %v", list.RowsExamined, list.Next, err)
	}
}

func TestListRefusesWhatCannotBe(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.plant(t, "acme", 3)
	list, err := b.operator.List(t.Context(), operator.Filter{Scope: "acme"}, operator.Page{Rows: 1})
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		filter operator.Filter
		page   operator.Page
	}{
		"too many rows":            {operator.Filter{}, operator.Page{Rows: operator.PageRowsMax + 1}},
		"negative":                 {operator.Filter{}, operator.Page{Rows: -1}},
		"scope":                    {operator.Filter{Scope: strings.Repeat("x", idempotency.ScopeBytesMax+1)}, operator.Page{}},
		"scope with NUL":           {operator.Filter{Scope: "a\x00"}, operator.Page{}},
		"prefix":                   {operator.Filter{KeyPrefix: "canary canary"}, operator.Page{}},
		"status":                   {operator.Filter{StatusClass: 1}, operator.Page{}},
		"expiry":                   {operator.Filter{Expiry: "soon"}, operator.Page{}},
		"trace":                    {operator.Filter{TraceID: "canary canary"}, operator.Page{}},
		"cursor of another scope":  {operator.Filter{Scope: "beta"}, operator.Page{After: list.Next}},
		"cursor that is none":      {operator.Filter{}, operator.Page{After: "canary!"}},
		"cursor that is not JSON":  {operator.Filter{}, operator.Page{After: "AAAA"}},
		"cursor without a place":   {operator.Filter{}, operator.Page{After: "WyIiLCIiXQ"}}, // ["",""]
		"cursor that is too short": {operator.Filter{}, operator.Page{After: "W10"}},        // []
	} {
		if _, err := b.operator.List(t.Context(), test.filter, test.page); err == nil {
			t.Errorf("%s: no error", name)
		} else {
			wantError(t, err, operator.ErrInvalid)
		}
	}
	if _, err := b.operator.List(t.Context(), operator.Filter{}, operator.Page{Rows: operator.PageRowsMax}); err != nil {
		t.Errorf("as many rows as there may be: %v", err)
	}
}

func TestRecentShowsTheNewestOfAllScopes(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.plant(t, "acme", 20000) // more than Recent reads
	b.do(t, key("canary"), 201)
	b.do(t, idempotency.Key{Scope: "beta", Value: "canary"}, 402)
	list, err := b.operator.Recent(t.Context(), 3)
	if err != nil || len(list.Records) != 3 || list.Records[0].Key.Scope != "beta" || list.Records[1].Key != key("canary") {
		t.Fatalf("%+v, %v", list, err)
	}
	if total := int64(b.Count(t, "SELECT count(*) FROM idempotency_keys")); list.RowsExamined == 0 || list.RowsExamined >= total {
		t.Errorf("%d of %d rows were read", list.RowsExamined, total)
	}
	_, err = b.operator.Recent(t.Context(), operator.PageRowsMax+1)
	wantError(t, err, operator.ErrInvalid)
}

// Pages follow the primary key, even if the table was never analyzed: nothing is sorted, and
// nothing is read to the end.
func TestListGoesAlongThePrimaryKey(t *testing.T) {
	t.Parallel()
	b := setup(t, nil)
	b.plant(t, "acme", 20000)
	for name, filter := range map[string]operator.Filter{
		"all": {}, "scope": {Scope: "acme"}, "prefix": {KeyPrefix: "k0001"}, "both": {Scope: "acme", KeyPrefix: "k0001"},
		"rest": {StatusClass: 4, Expiry: operator.ExpiryLive, TraceID: "x"},
	} {
		for _, descending := range []bool{false, true} {
			plan := b.operator.ExplainList(t, filter, operator.Page{Descending: descending, After: operator.CursorOf("acme", "k00010000")})
			if !strings.Contains(plan, "idempotency_keys_pkey") || strings.Contains(plan, "Seq Scan") || strings.Contains(plan, "Sort") {
				t.Errorf("%s, descending %t:\n%s", name, descending, plan)
			}
			// 500 rows at most, wherever in the table: some 20 pages of its 700, and not half of
			// the index as well.
			if pages := buffers(t, plan); pages > 30 {
				t.Errorf("%s, descending %t: %d pages were looked at\n%s", name, descending, pages, plan)
			}
		}
	}
}

// buffers returns the number of pages that a statement read, by its plan.
func buffers(t *testing.T, plan string) (pages int) {
	t.Helper()
	found := regexp.MustCompile(`Buffers: shared hit=(\d+)(?: read=(\d+))?`).FindStringSubmatch(plan)
	if found == nil {
		t.Fatalf("no buffers in\n%s", plan)
	}
	for _, number := range found[1:] {
		n, _ := strconv.Atoi("0" + number)
		pages += n
	}
	return pages
}
