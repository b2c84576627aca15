//go:build mutants

package mutants

import "slices"

// Mutant is a seeded bug that somebody might write in good faith, as a change of this repository's
// sources.
type Mutant struct {
	Name  string
	Bug   string // description of the bug
	Test  Test   // the test that must fail; zero: chaos must catch it
	edits []edit
}

// Test names a test for a bug that storms on the bank never or rarely show.
type Test struct{ Folder, Func string }

// edit replaces the one occurrence of before in a file.
type edit struct{ file, before, after string }

const (
	attemptFile    = "storage/postgres/attempt.go"
	exchangeFile   = "storage/postgres/internal/wire/exchange.go"
	deferredFile   = "storage/postgres/internal/sealed/guard.go"
	statementsFile = "storage/postgres/statements.go"
	resolveFile    = "storage/postgres/resolve.go"
	reaperFile     = "storage/postgres/reaper.go"
	engineFile     = "engine.go"
	contextFile    = "context.go"
	decisionFile   = "decision.go"
	middlewareFile = "middleware/middleware.go"
	recorderFile   = "middleware/recorder.go"
	openFile       = "open.go"
	effectFile     = "effect/effect.go"
	resumableFile  = "storage/postgres/resumable.go"
	settleFile     = "storage/postgres/settle.go"
	migrationFile  = "migrations/000004_create_open_requests.up.sql"
	bankFile       = "cmd/demo-bank/internal/bank/routes.go"
	messageFile    = "message/message.go"
	outboxFile     = "storage/postgres/outbox.go"
	inboxFile      = "storage/postgres/inbox.go"
	consumerFile   = "consumer/consumer.go"
	operatorFile   = "storage/postgres/operator/message.go"
	kafkaFile      = "broker/kafka/source.go"
)

const keyedCommit = `	return a.recorded(ctx, "commit", a.commit(ctx, deferred, refused, record))
`

const countedRows = `" SELECT 1 OPERATOR(pg_catalog./) pg_catalog.count(*) FILTER (WHERE same) FROM written",`

// Catalogue returns every seeded bug.
func Catalogue() []Mutant { return slices.Concat(ofAnswers(), ofEffects(), ofMessages()) }

func ofAnswers() []Mutant {
	return []Mutant{
		{
			Name: "record-apart",
			Bug:  "the record is committed in a transaction of its own, before the handler's",
			edits: []edit{{attemptFile, keyedCommit, `	s := &a.store.statements
	conn, err := a.store.connectPrimary(ctx)
	if err != nil {
		return fail("record", idempotency.ErrUnavailable, err)
	}
	defer func() { _ = conn.Close(ctx) }()
	if _, err := s.Flush(ctx, conn.PgConn(), wire.Call{Statement: &s.begin}, a.insertCall(nil, answer), wire.Call{Statement: &s.commit}); err != nil {
		return fail("record", classify(err), err)
	}
	return a.recorded(ctx, "commit", a.commit(ctx, deferred, refused, a.guardCall()))
`}},
		},
		{
			Name: "store-after-commit",
			Bug:  "the record is stored after the handler's transaction has committed",
			edits: []edit{{attemptFile, keyedCommit, `	_, _ = deferred, refused
	s := &a.store.statements
	if err := a.end(ctx, "commit", append(a.calls[:0], a.guardCall(), wire.Call{Statement: &s.commit})); err != nil {
		return err
	}
	return a.end(ctx, "commit", append(a.calls[:0], wire.Call{Statement: &s.begin}, a.insertCall(nil, answer), wire.Call{Statement: &s.commit}))
`}},
		},
		{
			Name: "trust-safe-to-retry",
			Bug:  "pgconn.SafeToRetry is believed when the reply to COMMIT is lost",
			edits: []edit{
				{attemptFile, `	pgErr, ok := wire.Definite(err)
`, `	if pgconn.SafeToRetry(err) {
		return fail(step, idempotency.ErrUnavailable, err)
	}
	pgErr, ok := wire.Definite(err)
`},
				// It returns the error of COMMIT itself, not that of the statement before it, as if
				// the two were sent one after the other.
				{exchangeFile, `		if err != nil {
			abandon(conn)
			return reader.reply, reader.broken(err)
		}
		over, err := reader.read(message)
`, `		if err != nil {
			abandon(conn)
			_, err = conn.ReceiveMessage(context.Background())
			return reader.reply, reader.broken(err)
		}
		over, err := reader.read(message)
`},
			},
		},
		{
			Name: "run-again-on-ambiguous-commit",
			Bug:  "the handler runs again where the outcome of COMMIT is not known",
			edits: []edit{
				{"store.go", "	// Set by Begin, by", "	Again bool\n\n	// Set by Begin, by"},
				{engineFile, `		fact, record, err = e.resolve(ctx, req, disposition, err, trace)
`, `		req.claim.Again = true
		return Result{}, err
`},
				{engineFile, "Attempt: NewAttemptID()}", "Attempt: NewAttemptID(), Again: req.claim.Again}"},
				{attemptFile, `	case a.record != nil: // even if`, `	case claim.Again:
		return a, nil, nil
	case a.record != nil: // even if`},
				{statementsFile, `$4, $5, $6, $7, $8, $9, $10, $11, $12)" +`, `$4, $5, $6, $7, $8, $9, $10, $11, $12) ON CONFLICT DO NOTHING" +`},
				{statementsFile, countedRows, `" SELECT pg_catalog.count(*) FROM written",`},
			},
		},
		{
			Name: "resolve-without-the-lock",
			Bug:  "a lost COMMIT is looked up without waiting for the key's lock",
			edits: []edit{
				{resolveFile, `	statements, lockNumber := &s.statements, wire.EncodeInt8(claim.Key.LockNumber(s.table))
`, `	statements := &s.statements
`},
				{resolveFile, `		wire.Call{Statement: &statements.resolveLock, Params: [][]byte{lockNumber[:]}},
`, ``},
			},
		},
		{
			Name: "lock-and-look-up-in-one",
			Bug:  "lock and look-up are one statement, whose snapshot is older than the lock",
			edits: []edit{
				{statementsFile, `synchronousStandbys + ", " + logPosition + settings,
			OIDs: []uint32{pgtype.Int8OID},`, `synchronousStandbys + ", " + logPosition + settings +
				", " + recordColumns + " FROM (SELECT 1) one LEFT JOIN " + table + " ON scope = $2 AND key = $3",
			OIDs: []uint32{pgtype.Int8OID, pgtype.TextOID, pgtype.TextOID},`},
				{attemptFile, `a.lockCall(), a.lookUpCall())`, `a.lockCall())`},
				{attemptFile, `call.Statement, call.Row = &a.store.statements.lockAt, lockAtRow{a}
`, `call.Statement, call.Row = &a.store.statements.lockAt, lockAtRow{a}
		a.params[0], a.params[1], a.params[2] = a.lockNumber[:], a.scope, a.key
		call.Params = a.params[:3:3]
`},
				{attemptFile, `	a.claim.Timeline, a.claim.Position = d.Position()
	return d.Err
`, `	a.claim.Timeline, a.claim.Position = d.Position()
	err := d.Err
	if row := values[len(values)-recordColumnsCount:]; row[0] != nil {
		a.record, err = decodeRecord(row)
	}
	return err
`},
			},
		},
		{
			Name:  "row-count-not-looked-at",
			Bug:   "an INSERT that succeeded is taken for a record that was written",
			edits: []edit{{statementsFile, countedRows, `" SELECT pg_catalog.count(*) FROM written",`}},
			Test:  Test{"storage/postgres", "TestRecordThatIsNotKeptIsNotExecuted"},
		},
		{
			Name: "deferred-count-not-looked-at",
			Bug:  "a deferred statement that touched no row, or too many, is committed with the answer",
			Test: Test{"storage/postgres", "TestDeferredStatementThatTouchesAnotherNumberOfRowsIsNotExecuted"},
			edits: []edit{{deferredFile, `	if rows >= 0 {
`, `	if rows > 1<<20 {
`}},
		},
		{
			Name: "row-security-not-looked-at",
			Bug:  "a record that row-level security hides from a claim is taken for absent",
			Test: Test{"storage/postgres", "TestClaimThatMayNotSeeTheRecordRunsNothing"},
			edits: []edit{{attemptFile, `	case a.hidden: // even if the lock is taken: perhaps by the replay of a hidden record
		err = fail("look the record up", idempotency.ErrUnknown, rowSecurity(s.table, ""))
`, ``}},
		},
		{
			Name: "row-security-not-looked-at-after-a-lost-commit",
			Bug:  "a record that row-level security hides from the look-up of a lost COMMIT is taken for absent",
			Test: Test{"storage/postgres", "TestLostCommitThatMayNotBeSeenIsUnknown"},
			edits: []edit{{resolveFile, `	case hidden:
`, `	case hidden && false:
`}},
		},
		{
			Name: "old-primary-believed",
			Bug:  "absence on a server that is behind the claim's is taken for proof",
			Test: Test{"storage/postgres", "TestResolveAsksNoServerThatIsBehindTheClaim"},
			edits: []edit{{resolveFile, `				return cmp.Or(d.Err, errOldPrimary)
`, `				return cmp.Or(d.Err, nil)
`}},
		},
		{
			Name: "no-fingerprint-check",
			Bug:  "a record is replayed without a look at its fingerprint",
			edits: []edit{{decisionFile, `	case !ours.Equal(record.Fingerprint):
		return factRecordedOther
`, ``}},
		},
		{
			Name: "reaper-by-key",
			Bug:  "the reaper looks for expired records and then deletes by key",
			edits: []edit{{reaperFile, `	tag, err := w.store.pool.Exec(ctx, `, `	rows, err := w.store.pool.Query(ctx, "SELECT scope || chr(10) || key FROM "+w.table+" WHERE expires_at < statement_timestamp()")
	if err != nil {
		return err
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return err
	}
	time.Sleep(200 * time.Millisecond) // as a large batch would take
	if _, err := w.store.pool.Exec(ctx, "DELETE FROM "+w.table+" WHERE scope || chr(10) || key = ANY ($1)", names); err != nil {
		return err
	}
	tag, err := w.store.pool.Exec(ctx, `}},
		},
		{
			Name:  "scope-left-out",
			Bug:   "keys of all accounts share one scope",
			edits: []edit{{middlewareFile, `Key:         idempotency.Key{Scope: scope, Value: key},`, `Key:         idempotency.Key{Scope: "all", Value: key},`}},
		},
		{
			Name: "derived-key-forgotten",
			Bug:  "a request that asked for a derived key is called not executed",
			Test: Test{"middleware", "TestCallToAnotherServiceIsNeverNotExecuted"},
			edits: []edit{{contextFile, `	r.derived.Store(true)
`, ``}},
		},
		{
			Name: "derived-key-of-an-earlier-run-forgotten",
			Bug:  "a derived key counts for the run that asked for it, and not for the runs after a restart",
			Test: Test{".", "TestDerivedKeyOfAnEarlierRunIsNotForgotten"},
			edits: []edit{{engineFile, `	// The claim.
	started := trace.now()
`, `	// The claim.
	past.derived.Store(false)
	started := trace.now()
`}},
		},
		{
			Name: "key-in-memory-past-the-handler",
			Bug:  "a key is kept in memory until its request ends, so a retry of a recorded key is told that it is in progress",
			Test: Test{".", "TestRecordedKeyIsNeverInProgressFromMemory"},
			edits: []edit{
				{engineFile, `		defer e.family.running.remove(&req.claim)
`, ``},
				{engineFile, `	answer, failed := e.call(`, `	defer e.family.running.remove(&req.claim)
	answer, failed := e.call(`},
			},
		},
		{
			Name: "recorder-unwraps",
			Bug:  "the recorder has an Unwrap, and a handler that flushes",
			edits: []edit{
				{recorderFile, `type recorder struct {
`, `type recorder struct {
	http.Flusher
`},
				{recorderFile, `// Header implements http.ResponseWriter. It begins`, `func (w *recorder) Flush() { w.Flusher.Flush() }

// Header implements http.ResponseWriter. It begins`},
				{middlewareFile, `	run := &run{m: m, next: next,`, `	run := &run{w: w, m: m, next: next,`},
				{middlewareFile, `type run struct {
`, `type run struct {
	w       http.ResponseWriter
`},
				{middlewareFile, `	run.next.ServeHTTP(run.recorder, r)
`, `	run.recorder.Flusher = early{run}
	run.next.ServeHTTP(run.recorder, r)
`},
				{middlewareFile, `// panicOf returns the panic that an error`, `// early sends what is there to the real connection, as an Unwrap lets http.ResponseController do.
type early struct{ run *run }

func (e early) Flush() {
	e.run.w.WriteHeader(e.run.recorder.status)
	_, _ = e.run.w.Write(e.run.recorder.body)
	_ = http.NewResponseController(e.run.w).Flush()
}

// panicOf returns the panic that an error`},
				{bankFile, `	WriteJSON(w, a.status, a.body)
}`, `	WriteJSON(w, a.status, a.body)
	_ = http.NewResponseController(w).Flush()
}`},
			},
		},
		{
			Name: "request-context-for-commit",
			Bug:  "COMMIT runs with the request's context",
			edits: []edit{
				{contextFile, `func (*detached) Done() <-chan struct{} { return nil }
`, `func (c *detached) Done() <-chan struct{} { return c.Context.Done() }
`},
				{contextFile, `func (*detached) Err() error { return nil }
`, `func (c *detached) Err() error { return c.Context.Err() }
`},
				{engineFile, `		err = end(&bounds.end, attempt.Commit, recorded, StepCommit, trace)
`, `		requests, cancelCommit := context.WithTimeout(ctx, e.options.Timeouts.Commit)
		err = end(&bounds.end, func(_ context.Context, answer *Answer) error { return attempt.Commit(requests, answer) }, recorded, StepCommit, trace)
		cancelCommit()
`},
			},
		},
	}
}

// ofEffects returns the bugs of calls to other services. Most of them show in one of hundreds of
// random requests, so each bug names a test with a schedule that shows it.
func ofEffects() []Mutant {
	return []Mutant{
		{
			Name: "call-before-the-intent",
			Bug:  "the intent of a call is committed with its result",
			Test: Test{"effect", "TestDeathAfterTheChargeChargesOnceAndPostsTheSame"},
			edits: []edit{
				{openFile, `	err := e.attempt.Intend(bounded, effect, lease)
`, `	if effect.State == EffectIntended {
		effect.SentFirst, e.epochAt, e.lease, e.clockAt, e.storeAt = at, at, lease, at, at
		e.recorded[effect.Name], e.asked[effect.Name] = effect, effect.Input
		return nil
	}
	err := e.attempt.Intend(bounded, effect, lease)
`},
				{openFile, `	err := e.attempt.Settle(bounded, effect)
`, `	err := e.attempt.Intend(bounded, effect, e.lease)
	e.opened = e.opened || err == nil
`},
			},
		},
		{
			Name: "call-after-an-unknown-intent",
			Bug:  "a call is sent although the reply to its intent's COMMIT is lost",
			Test: Test{"storage/postgres", "TestNothingIsSentBeforeTheIntentIsProven"},
			edits: []edit{{openFile, `		effect.SentFirst, err = e.resolveIntent(err)
`, `		effect.SentFirst, err = at, nil
`}},
		},
		{
			Name: "key-per-try",
			Bug:  "each send has a key of its own",
			Test: Test{"effect", "TestLostReplyIsAskedForAgainWithTheSameKey"},
			edits: []edit{{effectFile, `	return call(ctx, r.effect.DerivedKey, in)
`, `	return call(ctx, idempotency.NewAttemptID().String(), in)
`}},
		},
		{
			Name: "unknown-is-declined",
			Bug:  "a call without an answer is taken for a declined one",
			Test: Test{"effect", "TestLostReplyIsAskedForAgainWithTheSameKey"},
			edits: []edit{{effectFile, `	return r.lapse(idempotency.EffectResultUnknown, "its result is not known", err, idempotency.Lapse{})
`, `	return r.record(idempotency.EffectDeclined, nil, err)
`}},
		},
		{
			Name: "absent-is-declined",
			Bug:  "a call that a look-up does not find is taken for a declined one",
			Test: Test{"effect", "TestAbsenceSettlesNothing"},
			edits: []edit{{effectFile, `		absent = errors.Is(err, ErrAbsent)
`, `		if absent = errors.Is(err, ErrAbsent); absent {
			return r.record(idempotency.EffectDeclined, nil, err)
		}
`}},
		},
		{
			Name: "input-made-anew",
			Bug:  "a later run sends its own input, not the recorded one",
			Test: Test{"effect", "TestDeathAfterTheChargeChargesOnceAndPostsTheSame"},
			edits: []edit{{openFile, `		return effect, true, !bytes.Equal(effect.Input, intent.Input), nil
`, `		drift = !bytes.Equal(effect.Input, intent.Input)
		effect.Input = intent.Input
		return effect, true, drift, nil
`}},
		},
		{
			Name: "lifetime-from-the-last-send",
			Bug:  "the lifetime of a key counts from the last send",
			Test: Test{"effect", "TestNothingIsSentAfterTheKeysLifetime"},
			edits: []edit{{effectFile, `	case r.effects.Age(r.effect) >= r.Declared.effect.KeyLifetime/10*9:
`, `	case r.effects.Now().Sub(slices.MaxFunc([]time.Time{r.effect.SentFirst, r.effect.Doubt}, time.Time.Compare)) >= r.Declared.effect.KeyLifetime/10*9:
`}},
		},
		{
			Name:  "decline-of-a-retry-believed",
			Bug:   "a no to a repeated send is final at once",
			Test:  Test{"effect", "TestDeclineOfARetryIsNotFinal"},
			edits: []edit{{effectFile, `	case r.end.Resumed && !r.quiet(start):`, `	case false:`}},
		},
		{
			Name: "sleeper-sends",
			Bug:  "an owner sends however late it is",
			Test: Test{"effect", "TestSleeperDoesNotSend"},
			edits: []edit{{openFile, `	return !e.over && sinceByBoth(e.epochAt) < e.lease/2
`, `	return !e.over
`}},
		},
		{
			Name: "result-without-epoch",
			Bug:  "an owner that was replaced records the result of its call",
			Test: Test{"effect", "TestNoOfAReplacedOwnerIsRefusedWhileTheNextOneSends"},
			edits: []edit{{resumableFile, `settled_at = " + now + ours +
`, `settled_at = " + now + " WHERE scope OPERATOR(pg_catalog.=) $2 AND key OPERATOR(pg_catalog.=) $3 AND $4 IS NOT NULL" +
`}},
		},
		{
			// Each of three guards is enough, so all are removed: the fence at the beginning, the
			// lock that it takes, and the count at the end.
			Name: "last-transaction-without-fence",
			Bug:  "neither the beginning nor the end of the last transaction looks whose request it is",
			Test: Test{"effect", "TestReplacedOwnerPostsNothing"},
			edits: []edit{
				{resumableFile, `lock, a.fenceCall(&s.fence, phase)}
`, `lock}
`},
				{resumableFile, `				" SELECT 1 OPERATOR(pg_catalog./) ((SELECT pg_catalog.count(*) FROM recorded) OPERATOR(pg_catalog.*) (SELECT pg_catalog.count(*) FROM closed))",
`, `				" SELECT 1",
`},
			},
		},
		{
			Name:  "take-over-within-the-lease",
			Bug:   "a request is taken over while its owner may still be at it",
			Test:  Test{"effect", "TestCallThatIsSentOnceIsNotGivenUpWhileItIsUnderWay"},
			edits: []edit{{resumableFile, `AND route = $3 AND parked IS NULL AND next_at <= " + now + " FOR UPDATE`, `AND route = $3 AND parked IS NULL FOR UPDATE`}},
		},
		{
			Name: "refusal-after-a-charge",
			Bug:  "a 4xx is answered although a call was made and not undone",
			Test: Test{"effect", "TestRefusalAfterAChargeIsParked"},
			edits: []edit{{openFile, `		case decide(fact).action == actionDecline && effect.mayStand() && !undone[name]:
`, `		case effect.Kind == 0:
`}},
		},
		{
			// Each of three guards is enough, so all are removed: the far date, the reaper's
			// condition, and the trigger.
			Name: "open-request-expires",
			Bug:  "an open request expires as a record does, and is deleted",
			Test: Test{"storage/postgres", "TestOpenRequestOutlivesItsTTL"},
			edits: []edit{
				{resumableFile, `'2200-01-01 00:00:00+00', 0, `, `pg_catalog.transaction_timestamp() OPERATOR(pg_catalog.+) interval '1 day', 0, `},
				{reaperFile, ` AND status <> 0
`, `
`},
				{migrationFile, `    IF open THEN
`, `    IF open AND TG_OP = 'TRUNCATE' THEN
`},
			},
		},
		{
			Name: "effects-outlive-their-record",
			Bug:  "the effects stay when the reaper deletes the record",
			Test: Test{"storage/postgres", "TestEffectsGoWithTheirRecord"},
			edits: []edit{{migrationFile, `    EXECUTE format('DELETE FROM %I.idempotency_effects AS e USING %s AS d WHERE e.scope = d.scope AND e.key = d.key', TG_TABLE_SCHEMA, deleted);
`, ``}},
		},
		{
			Name: "undo-without-an-answer",
			Bug:  "an undo counts as made when it was sent",
			Test: Test{"effect", "TestUndoIsNeitherLostNorMadeTwice"},
			edits: []edit{{effectFile, `	return r.lapse(idempotency.EffectResultUnknown, "its result is not known", err, idempotency.Lapse{})
`, `	if r.effect.Kind == idempotency.EffectUndo {
		return r.done(out)
	}
	return r.lapse(idempotency.EffectResultUnknown, "its result is not known", err, idempotency.Lapse{})
`}},
		},
		{
			Name: "at-most-once-sent-again",
			Bug:  "a call that is sent once at most is sent again if it can't be looked up",
			Test: Test{"effect", "TestAtMostOnceIsNeverSentAgain"},
			edits: []edit{{effectFile, `	case once && r.end.Resumed:
`, `	case once && r.end.Resumed && r.Declared.effect.Lookup != nil:
`}},
		},
		{
			Name: "completer-ends-with-an-error",
			Bug:  "the completer stops when the database fails once",
			Test: Test{"effect", "TestCompleterOutlivesAFailedLook"},
			edits: []edit{{"completer.go", `the next look tries again", "error", err)
`, `the next look tries again", "error", err)
			return
`}},
		},
		{
			Name: "not-executed-after-an-intent",
			Bug:  "a refused COMMIT after a call is called not executed",
			Test: Test{"effect", "TestRefusedCommitAfterTheCallIsNeverNotExecuted"},
			edits: []edit{{decisionFile, `another run would make them twice
		return factContradiction
	}
	return factUnsettled
`, `another run would make them twice
		return factContradiction
	}
	return fact
`}},
		},
		{
			Name: "webhook-downgrades",
			Bug:  "a webhook that comes later overwrites a result",
			Test: Test{"effect", "TestWebhookNeverDowngrades"},
			edits: []edit{
				{settleFile, `		case state != idempotency.EffectIntended:
			return ErrSettledOtherwise
`, ``},
				{resumableFile, ` AND key = $2 AND name = $3 AND state = 1",
		audit`, ` AND key = $2 AND name = $3",
		audit`},
			},
		},
		{
			Name: "step-by-ordinal",
			Bug:  "a later run finds its calls by their number, not by their name",
			Test: Test{"effect", "TestStepsAreFoundByName"},
			edits: []edit{{openFile, `	effect := e.recorded[intent.Name]
	switch {
`, `	effect := e.recorded[intent.Name]
	if n := len(e.asked); e.open != nil && !again {
		if effect = nil; n < len(e.open.Effects) {
			effect = &e.open.Effects[n]
		}
	}
	switch {
`}},
		},
		{
			Name: "answer-before-the-result",
			Bug:  "the handler goes on, and its answer is recorded, although the result of its call is not",
			Test: Test{"effect", "TestLostReplyToTheResultIsNoFailure"},
			edits: []edit{{openFile, `		effect.State, effect.Output = EffectIntended, nil
		e.lapseOf(lapse)
		return fmt.Errorf("%w: %w", ErrUnsettled, err)
`, `		return nil
`}},
		},
	}
}

// ofMessages returns the bugs of messages. Each names a test with a schedule that shows it: it takes
// a relay or a consumer that ends, a restore, or a race that chaos may not meet.
func ofMessages() []Mutant {
	return []Mutant{
		{
			Name: "cursor-in-the-relay",
			Bug:  "the relay goes on behind the last message that it has published",
			Test: Test{"relay", "TestMessageThatIsCommittedLateIsNotSkipped"},
			edits: []edit{
				{outboxFile, `	nudged func() <-chan struct{}
}
`, `	nudged func() <-chan struct{}
	cursor [OutboxShards]int64
}
`},
				{outboxFile, ` AS m WHERE shard = $1 AND topic <> ALL ($4) AND "+o.ready()+
`, ` AS m WHERE shard = $1 AND id > $5 AND topic <> ALL ($4) AND "+o.ready()+
`},
				{outboxFile, `shard, limits.Messages, limits.Bytes, o.except)
`, `shard, limits.Messages, limits.Bytes, o.except, o.cursor[shard])
`},
				{outboxFile, `	d.Published, d.Refused = len(published), len(refused)
`, `	d.Published, d.Refused = len(published), len(refused)
	for _, id := range published {
		o.cursor[shard] = max(o.cursor[shard], id)
	}
`},
			},
		},
		{
			Name: "deleted-before-it-is-published",
			Bug:  "the relay deletes a message, and then publishes it",
			Test: Test{"relay", "TestMessageStaysUntilItIsConfirmed"},
			edits: []edit{
				{outboxFile, `	results := publish(ctx, messages)
`, `	if _, err := o.store.pool.Exec(ctx, "DELETE FROM "+o.table+" WHERE shard = $1 AND id = ANY ($2)", shard, ids); err != nil {
		return d, err
	}
	results := publish(ctx, messages)
`},
				{outboxFile, `tag.RowsAffected() != int64(len(published))`, `tag.RowsAffected() > int64(len(published))`},
			},
		},
		{
			Name:  "shard-without-a-lock",
			Bug:   "several relays publish the messages of one shard",
			Test:  Test{"relay", "TestRelaysLoseNothingAndKeepTheOrder"},
			edits: []edit{{outboxFile, `"SELECT pg_try_advisory_xact_lock($1)"`, `"SELECT $1::bigint IS NOT NULL"`}},
		},
		{
			Name:  "id-per-publication",
			Bug:   "the relay gives a message a new id each time that it publishes it",
			Test:  Test{"relay", "TestDeathBetweenConfirmationAndDeletionPublishesAgain"},
			edits: []edit{{outboxFile, `"SELECT id, message_id::text, `, `"SELECT id, gen_random_uuid()::text, `}},
		},
		{
			Name: "random-message-id",
			Bug:  "a message's id is random, so that another run of its request publishes it under another one",
			Test: Test{"storage/postgres", "TestMessageIDIsThatOfTheRequest"},
			edits: []edit{{messageFile, `return idempotency.DerivedID(ctx, "message/"+name) }
`, `return idempotency.NewAttemptID().String() }
`}},
		},
		{
			Name: "message-apart",
			Bug:  "messages are committed in a transaction of their own, before the handler's",
			Test: Test{"storage/postgres", "TestMessageLeavesWithTheWrites"},
			edits: []edit{{outboxFile, `		calls = append(calls[:len(calls):len(calls)], call)
`, `		conn, err := a.store.pool.Acquire(context.Background())
		if err != nil {
			return calls, together, err
		}
		defer conn.Release()
		if _, err := conn.Conn().PgConn().ExecParams(context.Background(), call.Statement.SQL, call.Params, call.Statement.OIDs, []int16{1}, nil).Close(); err != nil {
			return calls, together, err
		}
`}},
		},
		{
			Name: "position-not-compared",
			Bug:  "a batch moves the position, whatever it is by then",
			Test: Test{"consumer", "TestBatchOfAMovedPartitionIsFenced"},
			edits: []edit{{inboxFile, ` AND next_offset OPERATOR(pg_catalog.=) $4" +
`, ` AND $4 IS NOT NULL" +
`}},
		},
		{
			Name: "brokers-offset-trusted",
			Bug:  "a partition begins where the group's offset at the broker says, if there is one",
			Test: Test{"broker/kafka", "TestRestoredBaseBackup"},
			edits: []edit{{kafkaFile, `			numbers[number] = kgo.NewOffset().At(at) // the`, `			if committed := numbers[number].EpochOffset().Offset; committed >= 0 {
				at = committed
			}
			numbers[number] = kgo.NewOffset().At(at) // the`}},
		},
		{
			Name: "position-before-the-effect",
			Bug:  "the position is committed when messages arrive, before their effects",
			Test: Test{"consumer", "TestOutageParksNothing"},
			edits: []edit{
				{inboxFile, `		err = fail("begin a batch", idempotency.ErrUnavailable, errors.New("the partition has no position: the row was deleted"))
	default:
		return nil
	}
`, `		err = fail("begin a batch", idempotency.ErrUnavailable, errors.New("the partition has no position: the row was deleted"))
	default:
		_, err := s.pool.Exec(ctx, "UPDATE "+i.offsets+" SET next_offset = $4 WHERE consumer = $1 AND source = $2 AND partition = $3 AND next_offset < $4",
			claim.Consumer, claim.Partition.Source, claim.Partition.Number, claim.Entries[len(claim.Entries)-1].Offset+1)
		return err
	}
`},
				{inboxFile, ` AND next_offset OPERATOR(pg_catalog.=) $4" +
`, ` AND next_offset OPERATOR(pg_catalog.>=) $4" +
`},
			},
		},
		{
			Name: "id-without-the-consumer",
			Bug:  "the consumers of a topic share the ids of what they have handled",
			Test: Test{"consumer", "TestConsumersOfOneTopicAreApart"},
			edits: []edit{{inboxFile, `return idempotency.MessageScopePrefix + name }
`, `return idempotency.MessageScopePrefix + name[:0] + "all" }
`}},
		},
		{
			Name: "id-not-looked-at",
			Bug:  "a consumer knows what it has handled by its position alone",
			Test: Test{"consumer", "TestMessageThatWasPublishedTwiceIsHandledOnce"},
			edits: []edit{
				{inboxFile, ` OFFSET 0) AS k ON true"`, ` OFFSET 0) AS k ON false"`},
				{inboxFile, ` AS m (id, fingerprint)" +
				" RETURNING key`, ` AS m (id, fingerprint) ON CONFLICT DO NOTHING" +
				" RETURNING key`},
				{inboxFile, `CASE WHEN pg_catalog.array_agg(key) OPERATOR`, `CASE WHEN true OR pg_catalog.array_agg(key) OPERATOR`},
			},
		},
		{
			Name:  "parked-is-handled",
			Bug:   "a message that is parked is recorded as handled",
			Test:  Test{"consumer", "TestPoisonIsParkedWithItsKey"},
			edits: []edit{{consumerFile, `finish.Park = append(finish.Park, park)`, `finish.Park, finish.Recorded = append(finish.Park, park), append(finish.Recorded, i)`}},
		},
		{
			Name:  "poison-is-skipped",
			Bug:   "the position moves over a message that can't be handled, which is kept nowhere",
			Test:  Test{"consumer", "TestMessagesThatAreNotHandled"},
			edits: []edit{{consumerFile, `finish.Park = append(finish.Park, park)`, `r.end.Dead++`}},
		},
		{
			Name:  "key-of-a-parked-message-goes-on",
			Bug:   "messages overtake a parked one of their key",
			Test:  Test{"consumer", "TestPoisonIsParkedWithItsKey"},
			edits: []edit{{inboxFile, `" WHEN $7 AND EXISTS (`, `" WHEN $7 AND false AND EXISTS (`}},
		},
		{
			Name: "outage-counts-for-the-message",
			Bug:  "a message is parked because the database failed",
			Test: Test{"consumer", "TestOutageParksNothing"},
			edits: []edit{
				{consumerFile, `err != nil && (failure == nil || !errors.Is(err, idempotency.ErrAborted)) {
`, `err != nil && failure == nil {
`},
				{consumerFile, `outage := errors.Is(cause, idempotency.ErrUnavailable) || errors.Is(cause, idempotency.ErrNotSerializable) || r.ctx.Err() != nil
`, `outage := r.ctx.Err() != nil
`},
			},
		},
		{
			Name:  "deaths-not-kept",
			Bug:   "the deaths of processes in a message are not kept",
			Test:  Test{"consumer", "TestMessageThatKillsItsProcessIsFound"},
			edits: []edit{{inboxFile, `SET deaths = o.deaths + 1 RETURNING`, `SET deaths = 1 RETURNING`}},
		},
		{
			Name: "topic-not-compared",
			Bug:  "the offset of a deleted topic is used for one that was recreated under its name",
			Test: Test{"consumer", "TestRecreatedTopicStops"},
			edits: []edit{{consumerFile, `	return p.Next >= 0 && p.Incarnation != partition.Incarnation
`, `	return p.Next < 0 && p.Incarnation != partition.Incarnation
`}},
		},
		{
			Name:  "redriven-under-another-id",
			Bug:   "a redriven message has a new id",
			Test:  Test{"storage/postgres/operator", "TestRedriveKeepsTheIDAndTheOrder"},
			edits: []edit{{operatorFile, ` SET state = 1, attempts = 0, not_before = clock_timestamp() WHERE`, ` SET message_id = gen_random_uuid(), state = 1, attempts = 0, not_before = clock_timestamp() WHERE`}},
		},
	}
}
