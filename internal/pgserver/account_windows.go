package pgserver

import "os"

func pickAccount(string) (*account, error)    { return nil, nil }
func (a *account) reach(string, string) error { return nil }
func (a *account) enter(string) error         { return nil }
func (a *account) own(string) error           { return nil }
func (a *account) ownTree(string) error       { return nil }
func handToOwner(*os.File, string) error      { return nil }
func ownedByThisUser(os.FileInfo) bool        { return true }
