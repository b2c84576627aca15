// Package bank is the demo bank's books: accounts, transfers, orders, the ledger beneath them, and the audit that holds
// them against the records of answers.
//
//   - [Bank.Mount] puts the bank's requests on a router
//   - transfer.go and order.go move money, each in the transaction that it is given
//   - audit.go says whether the books are right
//   - migrations/ holds the tables and what the bank opens with
package bank
