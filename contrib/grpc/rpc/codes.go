package rpc

import (
	"net/http"

	"google.golang.org/genproto/googleapis/rpc/code"

	"github.com/paidonce/idempotency"
)

// DefaultDisposition returns the meaning of a code for the handler's transaction. OK is committed.
// An error about the request itself (InvalidArgument, NotFound, AlreadyExists, FailedPrecondition,
// OutOfRange) is declined: the handler's writes are undone, and the error is recorded. After every
// other code, Aborted and Canceled among them, a retry may get another one, so it is forgotten.
func DefaultDisposition(c code.Code) idempotency.Disposition {
	switch c {
	case code.Code_OK:
		return idempotency.DispositionCommit
	case code.Code_INVALID_ARGUMENT, code.Code_NOT_FOUND, code.Code_ALREADY_EXISTS, code.Code_FAILED_PRECONDITION, code.Code_OUT_OF_RANGE:
		return idempotency.DispositionDecline
	}
	return idempotency.DispositionForget
}

// statusCanceled is the HTTP status of a canceled call, which has no name in package net/http.
const statusCanceled = 499

// HTTPStatus returns the HTTP status that google.rpc.Code documents for a code, and 500 for an
// unknown one.
func HTTPStatus(c code.Code) int {
	switch c {
	case code.Code_OK:
		return http.StatusOK
	case code.Code_CANCELLED:
		return statusCanceled
	case code.Code_INVALID_ARGUMENT, code.Code_FAILED_PRECONDITION, code.Code_OUT_OF_RANGE:
		return http.StatusBadRequest
	case code.Code_DEADLINE_EXCEEDED:
		return http.StatusGatewayTimeout
	case code.Code_NOT_FOUND:
		return http.StatusNotFound
	case code.Code_ALREADY_EXISTS, code.Code_ABORTED:
		return http.StatusConflict
	case code.Code_PERMISSION_DENIED:
		return http.StatusForbidden
	case code.Code_UNAUTHENTICATED:
		return http.StatusUnauthorized
	case code.Code_RESOURCE_EXHAUSTED:
		return http.StatusTooManyRequests
	case code.Code_UNIMPLEMENTED:
		return http.StatusNotImplemented
	case code.Code_UNAVAILABLE:
		return http.StatusServiceUnavailable
	}
	return http.StatusInternalServerError
}
