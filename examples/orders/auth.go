package main

import (
	"context"
	"errors"
	"net/http"
	"strings"
)

type accountKey struct{}

// authenticate admits known callers and puts their account into the context.
func authenticate(next http.Handler) http.Handler {
	accounts := map[string]string{ // acme has rotated its token: both are its own
		"token-of-acme":     "acme",
		"new-token-of-acme": "acme",
		"token-of-globex":   "globex",
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		token, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		account, known := accounts[token]
		if !known {
			w.Header().Set("WWW-Authenticate", "Bearer")
			writeProblem(w, http.StatusUnauthorized, "send a token that is known: Authorization: Bearer ...")
			return
		}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), accountKey{}, account)))
	})
}

// accountOf returns the account that authenticate found. It is the scope of the keys.
func accountOf(r *http.Request) (string, error) {
	account, ok := r.Context().Value(accountKey{}).(string)
	if !ok {
		return "", errors.New("authenticate is not mounted outside")
	}
	return account, nil
}
