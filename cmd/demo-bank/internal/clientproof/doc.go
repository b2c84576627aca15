// Package clientproof holds package client against the real bank: through a proxy that loses requests and replies, and
// through kill -9 of the client's process. It is all tests:
//
//	go test ./cmd/demo-bank/internal/clientproof                                                              # 2,000 operations
//	go test ./cmd/demo-bank/internal/clientproof -run TestOperations -operations 20000 -count=1 -v            # all of them, with figures
package clientproof
