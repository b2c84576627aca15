package live

import (
	"bytes"
	"embed"
	"html/template"
	"io/fs"
	"net/http"
)

//go:embed assets
var assets embed.FS

// document answers GET / and serves the page's files under /assets/. The page loads nothing from
// other hosts.
type document struct {
	template *template.Template
	assets   http.Handler
}

// newDocument returns the page.
func newDocument() *document {
	files, err := fs.Sub(assets, "assets")
	if err != nil { // the folder is compiled in
		panic(err)
	}
	return &document{
		template: template.Must(template.ParseFS(files, "page.html")),
		assets:   http.StripPrefix("/assets/", http.FileServerFS(files)),
	}
}

// serveAssets serves the style sheets and the scripts.
func (p *document) serveAssets(w http.ResponseWriter, r *http.Request) {
	secure(w)
	p.assets.ServeHTTP(w, r)
}

// ServeHTTP answers with the page. Its curl lines name the host of the request.
func (p *document) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var body bytes.Buffer
	if err := p.template.Execute(&body, struct{ URL string }{"http://" + r.Host}); err != nil {
		http.Error(w, "the page could not be made", http.StatusInternalServerError)
		return
	}
	secure(w)
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	_, _ = w.Write(body.Bytes()) // ignored: the browser may be gone
}

func secure(w http.ResponseWriter) {
	w.Header().Set("Content-Security-Policy", "default-src 'self'; img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Referrer-Policy", "no-referrer")
}
