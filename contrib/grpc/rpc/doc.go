// Package rpc has the parts that adapters for gRPC and for Connect share, and imports neither: the
// key of a call, its fingerprint, the form in which its result is recorded, the table of codes, and
// the statuses of refused calls. Package grpcidem, one folder up, is the adapter for gRPC.
//
// A method has its full name, such as "/bank.v1.Bank/Pay". The same call by gRPC and by Connect has
// the same fingerprint, so each protocol replays an answer that was recorded by the other. An HTTP
// request never has the fingerprint of a call: a key that was used for both is a mismatch.
package rpc
