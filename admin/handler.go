package admin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"path"
	"strings"
	"time"

	"github.com/paidonce/idempotency"
	"github.com/paidonce/idempotency/storage/postgres"
	"github.com/paidonce/idempotency/storage/postgres/operator"
)

// Permission is a right that an [AuthorizeFunc] checks.
type Permission string

// The permissions. None includes another: the [AuthorizeFunc] decides on each.
const (
	// PermissionView allows everything that only reads, except bodies: scopes, keys, recorded
	// headers, the history of keys, figures, findings.
	PermissionView Permission = "view"
	// PermissionViewBody allows reading recorded bodies, which are the clients' answers, and the
	// contents of messages.
	PermissionViewBody Permission = "view-body"
	// PermissionExpire allows expiring a record, after which a retry of its request may run again.
	PermissionExpire Permission = "expire"
	// PermissionDelete allows deleting a record, after which a retry of its request runs again and
	// may pay twice.
	PermissionDelete Permission = "delete"
	// PermissionSettle allows settling the effects of an open request, and resuming and parking it. If
	// a payment is wrongly settled as not sent, it can be made twice.
	PermissionSettle Permission = "settle"
	// PermissionAbandon allows deleting an open request without an answer, after which a retry of it
	// runs again and may pay twice.
	PermissionAbandon Permission = "abandon"
	// PermissionRedrive allows redriving messages that a consumer has parked, and retrying messages
	// that the broker has refused.
	PermissionRedrive Permission = "redrive"
	// PermissionDrop allows deleting such messages: nobody handles or gets them.
	PermissionDrop Permission = "drop"
)

// AuthorizeFunc checks whether the caller of a request has a permission, and returns the caller as
// a name for the audit table, such as an e-mail address, of at most operator.ActorBytesMax bytes.
// An error refuses with 403, or with 401 if it is [ErrUnauthenticated]; its text is never shown. An
// empty actor is refused too.
//
// It is called several times for one page, because a page offers only acts that its reader may do.
// So it should be quick and must change nothing. It must be safe for concurrent use.
type AuthorizeFunc func(r *http.Request, want Permission) (actor string, err error)

// ErrUnauthenticated is returned by an [AuthorizeFunc] that does not know the caller: 401.
var ErrUnauthenticated = errors.New("caller is not known")

// Limits.
const (
	SecretBytesMin = 32

	// FormAgeMax is the time after which the form of an act is refused.
	FormAgeMax = 30 * time.Minute
)

// Options tune a [Handler]. Nil and the zero value are the defaults, which are the safest.
type Options struct {
	// ReadOnly removes every act for everybody. Then a role with only SELECT suffices.
	ReadOnly bool

	// Secret seals the tokens that stand for keys in URLs and forms. It has at least
	// [SecretBytesMin] random bytes, and is the same in all processes behind one address and after
	// a restart. If it is nil each Handler makes its own: then every other process refuses its
	// links and forms, and after a restart all are refused.
	Secret []byte

	// Operator tunes the pages' database calls.
	Operator operator.Options

	// Title is shown in the head of each page, such as "payments, production". May be empty.
	Title string

	// Challenge is the WWW-Authenticate header of a 401, such as `Basic realm="admin"`. Defaults to
	// none.
	Challenge string

	// Logger gets failures, each act, and each shown body: who, the act, and the record's attempt;
	// never a scope, key, body or credential. Defaults to slog.Default.
	Logger *slog.Logger
}

// Handler serves the pages. It is safe for concurrent use. The zero value answers 403 to
// everything; see [New].
type Handler struct {
	operator    *operator.Operator
	authorize   AuthorizeFunc
	options     Options
	sealer      *sealer
	crossOrigin *http.CrossOriginProtection
	now         func() time.Time // only for the age of forms
	figures     figures
}

var _ http.Handler = (*Handler)(nil)

// New returns the pages of a store's records. It sends nothing. It panics if the store or the
// authorization function is missing, or an option is invalid.
func New(store *postgres.Store, authorize AuthorizeFunc, opts *Options) *Handler {
	if store == nil {
		panic("idempotency/admin: New needs a store")
	}
	if authorize == nil {
		panic("idempotency/admin: New needs an AuthorizeFunc: without it anyone could read and delete records")
	}
	h := &Handler{authorize: authorize, crossOrigin: http.NewCrossOriginProtection(), now: time.Now}
	if opts != nil {
		h.options = *opts
	}
	h.operator = operator.New(store, &h.options.Operator)
	if h.options.Secret != nil && len(h.options.Secret) < SecretBytesMin {
		panic(fmt.Sprintf("idempotency/admin: Options.Secret has %d bytes: it must have at least %d", len(h.options.Secret), SecretBytesMin))
	}
	if h.options.Logger == nil {
		h.options.Logger = slog.Default()
	}
	h.sealer = newSealer(h.options.Secret)
	h.options.Secret = nil
	return h
}

// Limits of one request. The operator limits each of its calls more tightly.
const (
	pageTimeout  = 15 * time.Second
	actTimeout   = 15 * time.Second // even if the client leaves: an act that has begun is finished
	formBytesMax = 16 << 10
)

// route has the functions of a path: one of the two is set for each allowed method.
type route struct {
	get, post func(h *Handler, p *page) error
}

// routes are all paths, relative to the mount point. They have one level, so that links between
// them are the same under every prefix.
var routes = map[string]route{
	"":       {get: (*Handler).home},
	"list":   {get: (*Handler).list},
	"search": {post: (*Handler).search},
	"key":    {get: (*Handler).key},
	"body":   {get: (*Handler).body},
	"expire": {get: (*Handler).confirmExpire, post: (*Handler).expire},
	"delete": {get: (*Handler).confirmDelete, post: (*Handler).delete},
	"stats":  {get: (*Handler).stats},
	"doctor": {get: (*Handler).doctor},
	"live":   {get: (*Handler).live},

	"open":    {get: (*Handler).open},
	"settle":  {get: (*Handler).confirmSettle, post: (*Handler).settle},
	"resume":  {get: (*Handler).confirmResume, post: (*Handler).resume},
	"park":    {get: (*Handler).confirmPark, post: (*Handler).park},
	"abandon": {get: (*Handler).confirmAbandon, post: (*Handler).abandon},

	"consumers": {get: (*Handler).consumers},
	"outbox":    {get: (*Handler).outbox},
	"parked":    {get: (*Handler).parked},
	"message":   {get: (*Handler).message},
	"content":   {get: (*Handler).content},
	"redrive":   {get: (*Handler).confirmRedrive, post: (*Handler).redrive},
	"drop":      {get: (*Handler).confirmDrop, post: (*Handler).drop},
	"retry":     {get: (*Handler).confirmRetry, post: (*Handler).retry},
}

// page is one request that is being answered.
type page struct {
	w      http.ResponseWriter
	r      *http.Request
	actor  string          // has PermissionView
	client context.Context // ends when the client leaves; r's context ends with the answer too
}

func (p *page) ctx() context.Context { return p.r.Context() }

// ServeHTTP implements [http.Handler]. The path is relative to the mount point: see
// http.StripPrefix.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	secure(w.Header())
	p := &page{w: w, r: r, client: r.Context()}
	if err := h.serve(p); err != nil {
		h.refuse(p, err)
	}
}

// serve answers one request. If it returns an error it has written nothing.
func (h *Handler) serve(p *page) error {
	if h == nil || h.authorize == nil {
		return refusal{status: http.StatusForbidden}
	}
	if err := h.crossOrigin.Check(p.r); err != nil {
		return refusal{status: http.StatusForbidden, detail: "This request came from another site's page. Nothing was done."}
	}
	actor, err := h.allowed(p.r, PermissionView)
	if err != nil {
		return err
	}
	p.actor = actor
	name := strings.TrimPrefix(p.r.URL.Path, "/")
	if asset, ok := assetsByName[name]; ok {
		return asset.serve(p)
	}
	found, ok := routes[name]
	if !ok {
		return refusal{status: http.StatusNotFound, detail: "There is no such page."}
	}
	var serve func(*Handler, *page) error
	switch p.r.Method {
	case http.MethodGet, http.MethodHead:
		serve = found.get
	case http.MethodPost:
		serve = found.post
	}
	if serve == nil {
		p.w.Header().Set("Allow", found.allow())
		return refusal{status: http.StatusMethodNotAllowed, detail: "This page can't be asked for that way."}
	}
	if name == "" && missingSlash(p) {
		return nil
	}
	ctx, cancel := context.WithTimeout(p.r.Context(), pageTimeout)
	defer cancel()
	p.r = p.r.WithContext(ctx)
	if p.r.Method == http.MethodPost {
		p.r.Body = http.MaxBytesReader(p.w, p.r.Body, formBytesMax)
		if err := p.r.ParseForm(); err != nil {
			return refusal{status: http.StatusBadRequest, detail: "The form did not arrive whole, or is too large. Nothing was done."}
		}
	}
	return serve(h, p)
}

func (r route) allow() string {
	switch {
	case r.get == nil:
		return "POST"
	case r.post == nil:
		return "GET, HEAD"
	}
	return "GET, HEAD, POST"
}

// allowed returns the caller as actor, or a refusal if the caller lacks the permission.
func (h *Handler) allowed(r *http.Request, want Permission) (actor string, err error) {
	if h.options.ReadOnly && want != PermissionView && want != PermissionViewBody {
		return "", refusal{status: http.StatusForbidden, detail: "This page is for looking only."}
	}
	actor, err = h.authorize(r, want)
	switch {
	case errors.Is(err, ErrUnauthenticated):
		return "", refusal{status: http.StatusUnauthorized}
	case err != nil:
		return "", refusal{status: http.StatusForbidden}
	// UTF-8 without NUL, as for a scope.
	case actor == "" || len(actor) > operator.ActorBytesMax || idempotency.ValidateScope(actor) != nil:
		h.options.Logger.Error("admin: the AuthorizeFunc allowed a request and named no actor that can be kept: it is refused", "permission", string(want))
		return "", refusal{status: http.StatusForbidden}
	}
	return actor, nil
}

// has reports whether the reader has the permission, so that a page may offer the act.
func (h *Handler) has(p *page, want Permission) bool {
	_, err := h.allowed(p.r, want)
	return err == nil
}

// missingSlash redirects a request for the mount point without its final slash: there, relative
// links would lead elsewhere. The location is relative, because only the client knows the prefix.
func missingSlash(p *page) bool {
	asked, _, _ := strings.Cut(p.r.RequestURI, "?")
	if p.r.URL.Path != "" || asked == "" || strings.HasSuffix(asked, "/") {
		return false
	}
	p.w.Header().Set("Location", "./"+path.Base(asked)+"/")
	p.w.WriteHeader(http.StatusPermanentRedirect)
	return true
}

// secure sets the headers of every answer.
func secure(header http.Header) {
	header.Set("Content-Security-Policy", "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
	header.Set("Cache-Control", "no-store")
	header.Set("Cross-Origin-Opener-Policy", "same-origin")
	header.Set("Cross-Origin-Resource-Policy", "same-origin")
	header.Set("Referrer-Policy", "no-referrer")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("X-Frame-Options", "DENY")
}
