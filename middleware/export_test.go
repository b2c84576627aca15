package middleware

// RestoreRequest is for its fuzz test.
var RestoreRequest = restoreRequest
