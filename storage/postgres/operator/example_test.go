package operator_test

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// All declined requests of an account, page by page, in bounded steps.
func ExampleOperator_List() {
	ctx := context.Background()
	store, err := postgres.Open(ctx, os.Getenv("DATABASE_URL"), nil)
	if err != nil {
		panic(err)
	}
	defer store.Close()
	o := operator.New(store, nil)
	for page := (operator.Page{Rows: 100}); ; {
		list, err := o.List(ctx, operator.Filter{Scope: "acme", StatusClass: 4}, page)
		if err != nil {
			panic(err)
		}
		for _, record := range list.Records {
			fmt.Println(record.Key.Value, record.Status, record.CreatedAt)
		}
		// An empty page may only have reached its limit.
		if list.Next == "" {
			return
		}
		page.After = list.Next
	}
}

// Deletes a record that an operator has looked at, only if it is still the same.
func ExampleOperator_Delete() {
	ctx := context.Background()
	store, err := postgres.Open(ctx, os.Getenv("DATABASE_URL"), nil)
	if err != nil {
		panic(err)
	}
	defer store.Close()
	o := operator.New(store, nil)
	key := idempotency.Key{Scope: "acme", Value: "0198c0de-4b1e-7a3c-9d02-2f6a81c0e7d4"}
	state, err := o.Get(ctx, key)
	if err != nil || state.Record == nil {
		panic(err)
	}
	_, err = o.Delete(ctx, key, operator.Act{Actor: "alice", Reason: "ticket 7", Attempt: state.Record.Attempt})
	switch {
	case errors.Is(err, operator.ErrInProgress), errors.Is(err, operator.ErrChanged):
		fmt.Println("look again")
	case err != nil:
		panic(err)
	}
}

// A check before a deployment.
func ExampleOperator_Doctor() {
	ctx := context.Background()
	store, err := postgres.Open(ctx, os.Getenv("DATABASE_URL"), nil)
	if err != nil {
		panic(err)
	}
	defer store.Close()
	for _, finding := range operator.New(store, nil).Doctor(ctx) {
		if finding.Level != operator.LevelOK {
			fmt.Println(finding.Check, finding.What, finding.Remedy)
		}
	}
}
