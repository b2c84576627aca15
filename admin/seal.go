package admin

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"strings"
)

// A token is bound to its purpose: a token made for a link cannot act.
const (
	purposeKey  = "key"  // a keyRef in a link
	purposeList = "list" // a listQuery in a link
	purposeForm = "form" // a ticket in a form that acts
	purposeDone = "done" // an outcome that the next page reports

	purposeOpenList = "open-list" // an openQuery in a link
	purposeOpenForm = "open-form" // an openTicket in a form that acts

	purposeMessage     = "message"      // a messageRef in a link
	purposeParkedList  = "parked-list"  // a parkedQuery in a link
	purposeOutboxList  = "outbox-list"  // a place in the outbox in a link
	purposeMessageForm = "message-form" // a messageTicket in a form that acts
)

// errToken: the token was not made by this handler, or was made for another purpose.
var errToken = errors.New("token can't be opened")

// sealer seals values for URLs and forms. It is safe for concurrent use.
type sealer struct{ aead cipher.AEAD }

// newSealer returns a sealer with a secret; with a random one if it is nil.
func newSealer(secret []byte) *sealer {
	if secret == nil {
		secret = make([]byte, SecretBytesMin)
		_, _ = rand.Read(secret) // never fails
	}
	key, err := hkdf.Key(sha256.New, secret, nil, "github.com/paidonce/idempotency/admin 1", 32)
	if err != nil {
		panic("idempotency/admin: " + err.Error())
	}
	block, err := aes.NewCipher(key)
	if err != nil { // the key has the right length
		panic("idempotency/admin: " + err.Error())
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		panic("idempotency/admin: " + err.Error())
	}
	return &sealer{aead}
}

// seal returns a token for value, which is safe in a URL. No two are the same.
func (s *sealer) seal(purpose string, value any) string {
	text, err := json.Marshal(value)
	if err != nil { // plain structs of this package
		panic("idempotency/admin: " + err.Error())
	}
	return base64.RawURLEncoding.EncodeToString(s.aead.Seal(nil, nil, text, []byte(purpose)))
}

// open decodes into value a token that was sealed for the purpose. Any other token returns
// errToken.
func (s *sealer) open(purpose, token string, value any) error {
	sealed, err := base64.RawURLEncoding.Strict().DecodeString(token)
	if err != nil || strings.ContainsAny(token, "\r\n") { // the decoder skips these
		return errToken
	}
	text, err := s.aead.Open(nil, nil, sealed, []byte(purpose))
	if err != nil {
		return errToken
	}
	if err := json.Unmarshal(text, value); err != nil {
		return errToken
	}
	return nil
}
