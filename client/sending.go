package client

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"sync/atomic"
)

// sending watches one request being sent, to prove that a request without an answer never reached
// its server. The zero value is ready. It is safe for concurrent use, because net/http writes on
// its own goroutine.
type sending struct {
	asked  atomic.Int64 // connections asked for
	got    atomic.Int64 // connections got
	headed atomic.Bool  // the request's header may be on a connection
	body   *watchedBody // nil if there is none
}

func (s *sending) trace() *httptrace.ClientTrace {
	return &httptrace.ClientTrace{
		GetConn:          func(string) { s.asked.Add(1) },
		GotConn:          func(httptrace.GotConnInfo) { s.got.Add(1) },
		WroteHeaderField: func(string, []string) { s.headed.Store(true) },
		WroteHeaders:     func() { s.headed.Store(true) },
	}
}

func (s *sending) watch(body io.ReadCloser) io.ReadCloser {
	if body == nil || body == http.NoBody {
		return body
	}
	s.body = &watchedBody{ReadCloser: body}
	return s.body
}

// unsent reports whether the server can't have the request, now that RoundTrip has returned an
// error. No base reports that itself, so there are two proofs: the base asked for a connection and
// never got one; or not a byte of the body was read, which also holds for a base that fails before
// it calls net/http. HTTP/2 reports a header only after it is written, so once there is a
// connection, silence by itself proves nothing.
func (s *sending) unsent() bool {
	if s.headed.Load() {
		return false
	}
	return s.asked.Load() > 0 && s.got.Load() == 0 || s.body != nil && s.body.seal()
}

// watchedBody is a body that is unread, read, or sealed against reading.
type watchedBody struct {
	io.ReadCloser
	state atomic.Int32
}

const (
	bodyUntouched int32 = iota
	bodyRead
	bodySealed
)

// Read implements io.Reader.
func (b *watchedBody) Read(p []byte) (int, error) {
	if !b.state.CompareAndSwap(bodyUntouched, bodyRead) && b.state.Load() == bodySealed {
		return 0, http.ErrBodyReadAfterClose
	}
	return b.ReadCloser.Read(p)
}

// seal reports whether the body was never read, and prevents later reads.
func (b *watchedBody) seal() bool { return b.state.CompareAndSwap(bodyUntouched, bodySealed) }

// hopeless reports whether an unsent request would end the same way if it were tried again.
func hopeless(err error) bool {
	var certificate *tls.CertificateVerificationError
	var record tls.RecordHeaderError // the other side does not speak TLS
	var address *net.AddrError
	var name *net.DNSError
	return errors.As(err, &certificate) || errors.As(err, &record) || errors.As(err, &address) ||
		errors.As(err, &name) && name.IsNotFound && !name.IsTemporary && !name.IsTimeout
}

// sendable returns an error for a request that no base would send.
func sendable(r *http.Request) error {
	switch u := r.URL; {
	case u == nil:
		return errors.New("request has no URL")
	case u.Scheme != "http" && u.Scheme != "https":
		return errors.New("URL of the request is neither http nor https: complete it before the request gets here")
	case u.Host == "":
		return errors.New("URL of the request has no host")
	case !visible(u.RequestURI(), false):
		return errors.New("URL of the request has a control character")
	}
	for kind, header := range map[string]http.Header{"header": r.Header, "trailer": r.Trailer} {
		for name, values := range header {
			if !isToken(name) {
				return fmt.Errorf("name of a %s of the request is not valid", kind)
			}
			for _, value := range values {
				if !visible(value, true) {
					return fmt.Errorf("%s %s of the request has a control character, which may be a line break at its end", kind, name)
				}
			}
		}
	}
	return nil
}

// visible reports whether a text has no control character, except tabs if they are allowed.
func visible(text string, tabs bool) bool {
	for i := range len(text) {
		if c := text[i]; c == 0x7f || c < ' ' && (c != '\t' || !tabs) {
			return false
		}
	}
	return true
}

// isToken reports whether a text is a token of RFC 9110, as a header's name and a method are.
func isToken(text string) bool {
	for i := range len(text) {
		switch c := text[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case c > ' ' && c < 0x7f && !isDelimiter(c):
		default:
			return false
		}
	}
	return text != ""
}

func isDelimiter(c byte) bool {
	switch c {
	case '"', '(', ')', ',', '/', ':', ';', '<', '=', '>', '?', '@', '[', '\\', ']', '{', '}':
		return true
	}
	return false
}
