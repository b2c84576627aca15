package terminal

import (
	"fmt"
	"runtime"
	"runtime/debug"
)

// Versions are the versions that a report was made with.
type Versions struct {
	PostgreSQL string `json:"postgresql"`
	Go         string `json:"go"`
	Platform   string `json:"platform"`
	CPUs       int    `json:"cpus"`
	Revision   string `json:"revision"` // of this program's source; empty if unknown
}

// NewVersions returns the versions of this program, with the given PostgreSQL version.
func NewVersions(postgres string) Versions {
	v := Versions{PostgreSQL: postgres, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH, CPUs: runtime.NumCPU()}
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, setting := range info.Settings {
			switch {
			case setting.Key == "vcs.revision":
				v.Revision = setting.Value + v.Revision
			case setting.Key == "vcs.modified" && setting.Value == "true":
				v.Revision += "+changes"
			}
		}
	}
	return v
}

// String returns the versions as one line of a report.
func (v Versions) String() string {
	text := fmt.Sprintf("versions: PostgreSQL %s, %s, %s, %d CPUs", v.PostgreSQL, v.Go, v.Platform, v.CPUs)
	if v.Revision != "" {
		text += ", source " + v.Revision
	}
	return text
}
