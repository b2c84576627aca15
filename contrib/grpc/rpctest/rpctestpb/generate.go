// Package rpctestpb has the messages and the service of the conformance suite, generated from
// rpctest.proto. Requires protoc, protoc-gen-go and protoc-gen-go-grpc.
package rpctestpb

//go:generate protoc -I=../.. --go_out=paths=source_relative:../.. --go-grpc_out=paths=source_relative:../.. rpctest/rpctestpb/rpctest.proto
