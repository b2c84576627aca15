// Package paymentapi has the service of the recipe for oapi-codegen, generated from payment.yaml.
// Requires oapi-codegen v2.8.
package paymentapi

//go:generate oapi-codegen --config=config.yaml payment.yaml
