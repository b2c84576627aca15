// Package locks has the numbers of the advisory locks of partitions and of the outbox's shards.
// They are those of keys with an empty scope, which no request has.
package locks

import (
	"fmt"
	"strconv"

	"github.com/paidonce/idempotency"
)

// Partition returns the lock of a consumer's partition. The table is the name of the records' table
// with its schema, unquoted.
func Partition(table, consumer, source string, partition int32) int64 {
	return idempotency.Key{Value: "consumer " + strconv.Quote(consumer) + " " + strconv.Quote(source) + " " + strconv.Itoa(int(partition))}.LockNumber(table)
}

// Shard returns the lock of a shard of the outbox.
func Shard(table string, shard int) int64 {
	return idempotency.Key{Value: fmt.Sprintf("outbox %d", shard)}.LockNumber(table)
}
