// Package locks has the numbers of the advisory locks that belong to no request. They are those of
// keys with an empty scope, which no request has.
package locks

import (
	"fmt"
	"strconv"

	"github.com/paidonce/idempotency"
)

// Partition returns the lock of a consumer's partition. The table is that of the records, qualified
// and unquoted.
func Partition(table, consumer, source string, partition int32) int64 {
	return idempotency.Key{Value: "consumer " + strconv.Quote(consumer) + " " + strconv.Quote(source) + " " + strconv.Itoa(int(partition))}.LockNumber(table)
}

// Shard returns the lock of a shard of the outbox.
func Shard(table string, shard int) int64 {
	return idempotency.Key{Value: fmt.Sprintf("outbox %d", shard)}.LockNumber(table)
}
