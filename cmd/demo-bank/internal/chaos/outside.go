package chaos

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/check"
	"github.com/paidonce/idempotency/cmd/demo-bank/internal/storm"
	"github.com/paidonce/idempotency/internal/deadline"
)

// startOutside starts the processor and the gateway in front of it.
func (r *run) startOutside(ctx context.Context) error {
	if !r.profile.effects {
		return nil
	}
	if err := r.processor.start(ctx); err != nil {
		return err
	}
	if err := r.processor.set(ctx, goodProcessor()); err != nil {
		return err
	}
	return r.gateway.start()
}

// firstTransfer makes the transfer that all receipts are for.
func (r *run) firstTransfer(ctx context.Context) error {
	if !r.profile.effects {
		return nil
	}
	k := r.keys.script(askTransfer, "")
	k.to = r.keys.names[accounts-1]
	c := newClient(r, len(r.clients))
	r.clients = append(r.clients, c)
	l := c.lanes[0]
	l.ask(ctx, k, false, storm.NoTrouble)
	if len(l.ops) == 0 || l.ops[len(l.ops)-1].ID == "" {
		return fmt.Errorf("the first transfer has no answer: %w", context.Cause(ctx))
	}
	r.keys.transfer = l.ops[len(l.ops)-1].ID
	return nil
}

// awaitNothingOpen blocks until no request is open except those that are left to a person. It is a
// finding if that takes longer than settleMax.
func (r *run) awaitNothingOpen(ctx context.Context) {
	for until := time.Now().Add(settleMax); ; {
		var open int64
		err := r.cluster.with(ctx, databaseTimeout, func(ctx context.Context, conn *pgx.Conn) error {
			return conn.QueryRow(ctx, `SELECT count(*) FROM idempotency_open WHERE parked IS NULL`).Scan(&open)
		})
		if err == nil && open == 0 {
			return
		}
		if time.Now().After(until) {
			r.findings.add("%d requests are open %v after the last fault (%v)", open, settleMax, err)
			return
		}
		if deadline.Sleep(ctx, scrapeInterval) != nil {
			return
		}
	}
}

// left is the final state of the requests that call the processor.
type left struct {
	check.Outside
	takeOvers int64
	ages      []time.Duration // of the effects, since their first send
	parked    counters        // by reason
}

// readLeft reads the books of the bank and the lists of the processor, at rest.
func (r *run) readLeft(ctx context.Context, conn *pgx.Conn) error {
	o := &r.left.Outside
	o.Answers = map[check.Key]int{}
	tx, err := conn.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly})
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback(ctx) }() // it wrote nothing
	var p check.Posting
	if err := each(ctx, tx, `
		SELECT 'topup', scope, key, id::text, charge, amount, '' FROM topups
		UNION ALL SELECT 'payout', scope, key, id::text, payout, amount, '' FROM payouts WHERE state = 'posted'
		UNION ALL SELECT 'receipt', scope, key, id::text, '', 0, sent FROM receipts ORDER BY 4`,
		[]any{&p.Kind, &p.Key.Scope, &p.Key.Key, &p.ID, &p.Item, &p.Amount, &p.Sent}, func() { o.Postings = append(o.Postings, p) }); err != nil {
		return err
	}
	var e check.RecordedEffect
	var tries int64
	var age float64
	if err := each(ctx, tx, `SELECT scope, key, name, kind, state, derived_key::text, tries, EXTRACT(epoch FROM now() - sent_first_at) FROM idempotency_effects ORDER BY sent_first_at`,
		[]any{&e.Key.Scope, &e.Key.Key, &e.Name, &e.Kind, &e.State, &e.DerivedKey, &tries, &age}, func() {
			o.Effects = append(o.Effects, e)
			r.left.takeOvers += tries - 1
			r.left.ages = append(r.left.ages, time.Duration(age*float64(time.Second)))
		}); err != nil {
		return err
	}
	var open check.OpenRequest
	if err := each(ctx, tx, `
		SELECT o.scope, o.key, COALESCE(o.parked, ''), COALESCE((SELECT sum(amount)::bigint FROM payouts p WHERE p.scope = o.scope AND p.key = o.key AND p.state = 'held'), 0)
		FROM idempotency_open o ORDER BY started_at`,
		[]any{&open.Key.Scope, &open.Key.Key, &open.Parked, &open.Holds}, func() { o.Open = append(o.Open, open) }); err != nil {
		return err
	}
	var key check.Key
	var status int
	if err := each(ctx, tx, `SELECT scope, key, status FROM idempotency_keys WHERE status <> 0 AND scope NOT LIKE 'chaos-%' AND scope NOT LIKE 'message:%'`,
		[]any{&key.Scope, &key.Key, &status}, func() { o.Answers[key] = status }); err != nil {
		return err
	}
	if err := tx.QueryRow(ctx, `SELECT COALESCE(sum(balance), 0)::bigint FROM accounts WHERE starts_with(id, 'bank:held:')`).Scan(&o.Held); err != nil {
		return fmt.Errorf("held: %w", err)
	}
	for kind, into := range map[string]*[]check.Item{"charges": &o.Charges, "refunds": &o.Refunds, "payouts": &o.Payouts, "mails": &o.Mails} {
		items, err := r.processor.list(ctx, kind)
		if err != nil {
			return err
		}
		for _, i := range items {
			if kind == "mails" && i.Key != "" { // a notice; the mail of a receipt has no key
				continue
			}
			*into = append(*into, check.Item{ID: i.ID, Key: i.Key, Of: i.Charge + i.To, Amount: i.Amount})
		}
	}
	o.Inputs = map[string][]string{}
	for name, c := range r.gateway.all() {
		o.Inputs[name.service+" "+name.key] = c.inputs
	}
	r.explain()
	return nil
}

// each calls do for each row of the query.
func each(ctx context.Context, tx pgx.Tx, sql string, into []any, do func()) error {
	rows, err := tx.Query(ctx, sql)
	if err == nil {
		_, err = pgx.ForEachRow(rows, into, func() error {
			do()
			return nil
		})
	}
	if err != nil {
		return fmt.Errorf("read what is left: %w", err)
	}
	return nil
}

// explain finds the fault of the run that left a request to a person.
func (r *run) explain() {
	o := &r.left.Outside
	services := []string{"/charges", "/payouts", "/refunds"}
	for i := range o.Open {
		open := &o.Open[i]
		for n, e := range o.Effects {
			age := r.left.ages[n]
			if e.Key != open.Key || e.Kind == idempotency.EffectPhase || e.State != idempotency.EffectIntended {
				continue
			}
			for _, service := range services {
				if r.gateway.seen(callName{service, e.DerivedKey}).forEver {
					open.Explained = "the processor answers 500 to its key for ever"
				}
			}
			if strings.Contains(open.Parked, "may have forgotten its key") && age >= keyLifetime/10*9 {
				open.Explained = "its faults lasted longer than the key's lifetime"
			}
		}
		if open.Parked != "" {
			r.left.parked.add(open.Parked)
		}
	}
}

// judgeOutside compares the final state with the clients' history.
func (r *run) judgeOutside(ctx context.Context, ops []check.Operation, expected []check.Expectation) ([]check.Result, error) {
	err := r.cluster.with(ctx, judgeWaitMax, r.readLeft)
	if err != nil {
		return nil, err
	}
	calling, _ := r.split(ops, expected)
	results := r.left.Judge(calling.ops, calling.expected)
	return append(results, r.operations(ctx), r.directed.findings.result("directed", "the directed schedules end as they should", r.directed.done())), nil
}

// sides are the requests that call the processor, and the others.
type side struct {
	ops      []check.Operation
	expected []check.Expectation
}

// split separates the requests that call the processor from the others.
func (r *run) split(ops []check.Operation, expected []check.Expectation) (calling, plain side) {
	calls := map[check.Key]bool{}
	for _, k := range r.keys.all() {
		if k.asks.calls() {
			calls[check.Key{Scope: tenants[k.tenant].scope, Key: k.text}] = true
		}
	}
	for i := range ops {
		if calls[check.Key{Scope: ops[i].Scope, Key: ops[i].Key}] {
			calling.ops = append(calling.ops, ops[i])
		} else {
			plain.ops = append(plain.ops, ops[i])
		}
	}
	for _, e := range expected {
		if calls[check.Key{Scope: e.Scope, Key: e.Key}] {
			calling.expected = append(calling.expected, e)
		} else {
			plain.expected = append(plain.expected, e)
		}
	}
	return calling, plain
}

// operations reads each status resource that a client got. It must be done, with the recorded
// answer, unless the request is left to a person.
func (r *run) operations(ctx context.Context) check.Result {
	result := check.Result{Name: "operations", Title: "each status resource that a client was told of shows the recorded answer, to its own client", Examples: []string{}}
	wrong := func(format string, args ...any) {
		if result.Count++; len(result.Examples) < check.ExamplesMax {
			result.Examples = append(result.Examples, fmt.Sprintf(format, args...))
		}
	}
	client := newScraper()
	for _, k := range r.keys.all() {
		k.mu.Lock()
		path := k.status
		k.mu.Unlock()
		if path == "" {
			continue
		}
		result.Seen++
		key := check.Key{Scope: tenants[k.tenant].scope, Key: k.text}
		bank := result.Seen % len(r.banks.slots)
		status, shown := r.operation(ctx, client, bank, path, tenants[k.tenant].authorization)
		parked := slices.ContainsFunc(r.left.Open, func(o check.OpenRequest) bool { return o.Key == key })
		switch recorded := r.left.Answers[key]; {
		case status != http.StatusOK:
			wrong("%s: %s answered %d", key, path, status)
		case parked && shown.Status != needsAttention, !parked && (shown.Status != "done" || shown.Answer.Status != recorded):
			wrong("%s: %s shows %q with the answer %d, and the record has %d (parked: %t)", key, path, shown.Status, shown.Answer.Status, recorded, parked)
		}
		if other := (int(k.tenant) + 1) % len(tenants); result.Seen%8 == 0 {
			if status, _ := r.operation(ctx, client, bank, path, tenants[other].authorization); status != http.StatusNotFound {
				wrong("%s: %s answered %d to another tenant", key, path, status)
			}
		}
	}
	return result
}

// operationShown is the body of a status resource.
type operationShown struct {
	Status string `json:"status"`
	Answer struct {
		Status int `json:"status"`
	} `json:"answer"`
}

func (r *run) operation(ctx context.Context, client *http.Client, bank int, path, authorization string) (status int, shown operationShown) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.banks.address(bank)+path, nil)
	if err != nil {
		return 0, shown
	}
	if authorization != "" {
		request.Header.Set("Authorization", authorization)
	}
	response, err := client.Do(request)
	if err != nil {
		return 0, shown
	}
	defer func() { _ = response.Body.Close() }() // it was read, or is of no use
	_ = json.NewDecoder(response.Body).Decode(&shown)
	return response.StatusCode, shown
}

// healOutside ends the faults of the processor.
func (r *run) healOutside(ctx context.Context) error {
	return r.processor.set(ctx, goodProcessor())
}

// EffectsReport is the part of a report about the requests that call the processor.
type EffectsReport struct {
	TopUps    int64 `json:"topups"` // number of keys
	Payouts   int64 `json:"payouts"`
	Receipts  int64 `json:"receipts"`
	Charges   int   `json:"charges"` // at the processor
	PaidOut   int   `json:"processor_payouts"`
	Mails     int   `json:"mails"`
	Refunds   int   `json:"refunds"`
	Postings  int   `json:"postings"` // of top-ups and payouts
	Sent      int64 `json:"calls"`    // that write, as the gateway saw them
	LookUps   int64 `json:"look_ups"`
	Maybe     int   `json:"maybe"`      // receipts that say so
	TakeOvers int64 `json:"take_overs"` // of requests with an unsettled call
	Open      int   `json:"open"`       // that are not left to a person

	Parked []Count `json:"parked"` // by reason
	Stops  []Count `json:"stops"`  // of banks, for longer than a lease
}

// effectsReport sums up a run with effects.
func (r *run) effectsReport() *EffectsReport {
	if !r.profile.effects {
		return nil
	}
	t, o := &r.tally, &r.left.Outside
	p := &EffectsReport{
		TopUps: t.clientFaults.get("top-up"), Payouts: t.clientFaults.get("payout"), Receipts: t.clientFaults.get("receipt"),
		Charges: len(o.Charges), PaidOut: len(o.Payouts), Mails: len(o.Mails), Refunds: len(o.Refunds),
		Sent: r.gateway.posts.Load(), LookUps: r.gateway.lookups.Load(), TakeOvers: r.left.takeOvers,
		Parked: r.left.parked.list(nil), Stops: t.stops.list(r.profile.stopNames()),
	}
	for _, posting := range o.Postings {
		switch {
		case posting.Kind != check.Receipt:
			p.Postings++
		case posting.Sent == "maybe":
			p.Maybe++
		}
	}
	for _, open := range o.Open {
		if open.Parked == "" {
			p.Open++
		}
	}
	return p
}

// write writes this part of the text report.
func (p *EffectsReport) write(b *strings.Builder) {
	fmt.Fprintf(b, "\neffects: %d top-ups, %d payouts and %d receipts asked for; %d calls and %d look-ups; %d take-overs\n", p.TopUps, p.Payouts, p.Receipts, p.Sent, p.LookUps, p.TakeOvers)
	fmt.Fprintf(b, "processor: %d charges, %d payouts, %d refunds, %d mails; %d postings; %d receipts say maybe; %d requests are open\n", p.Charges, p.PaidOut, p.Refunds, p.Mails, p.Postings, p.Maybe, p.Open)
	for _, c := range p.Parked {
		fmt.Fprintf(b, "left to a person: %d, %s\n", c.Count, c.Name)
	}
}
