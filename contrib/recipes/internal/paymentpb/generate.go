// Package paymentpb has the service of the recipe for grpc-gateway, generated from payment.proto and
// payment.yaml. Requires protoc, protoc-gen-go, protoc-gen-go-grpc and protoc-gen-grpc-gateway.
package paymentpb

//go:generate protoc -I=. --go_out=paths=source_relative:. --go-grpc_out=paths=source_relative:. --grpc-gateway_out=paths=source_relative,grpc_api_configuration=payment.yaml:. payment.proto
