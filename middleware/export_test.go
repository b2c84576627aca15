package middleware

// StoreRequest and RestoreRequest are for their fuzz test.
var (
	StoreRequest   = storeRequest
	RestoreRequest = restoreRequest
)

// Wildcards is for its test.
var Wildcards = wildcards
