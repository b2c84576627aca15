// Package bankpb has the bank's messages and service, generated from bank.proto. Requires protoc,
// protoc-gen-go and protoc-gen-go-grpc.
package bankpb

//go:generate protoc -I=.. --go_out=paths=source_relative:.. --go-grpc_out=paths=source_relative:.. bankpb/bank.proto
