// Package bank holds the demo bank's books: accounts, transfers, orders, the ledger, and the audit
// that compares them with the recorded answers.
//
//   - [Bank.Mount] adds the bank's routes to a router
//   - transfer.go and order.go move money, each in the transaction that it is given
//   - topup.go, payout.go and receipt.go call the processor of processor.go between transactions
//   - audit.go reports whether the books are right
//   - migrations/ creates the tables and the opening data
package bank
