// Package rpc has the parts that adapters for gRPC and for Connect share, and imports neither: the
// key of a call, its fingerprint, the form in which its result is recorded, the table of codes, and
// the statuses of refused calls. Package grpcidem, one folder up, is the adapter for gRPC.
//
// A call is one of the unary method that its full name says, such as "/bank.v1.Bank/Pay". The same
// call by gRPC and by Connect has the same fingerprint, so each protocol replays what was recorded
// by the other. A request by HTTP never has the fingerprint of a call: a key that was used for both
// is a mismatch.
package rpc
