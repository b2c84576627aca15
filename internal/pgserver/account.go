package pgserver

import (
	"context"
	"os"
	"os/exec"
	"strings"
)

// account is PostgreSQL's user if this process is root. Nil means the user of this process.
type account struct {
	name     string
	uid, gid uint32
	groups   []uint32 // supplementary
}

// command prepares a program to run in dir as the account, without the terminal and without
// PostgreSQL's own variables.
func (a *account) command(dir, path string, args ...string) *exec.Cmd {
	return a.prepare(exec.Command(path, args...), dir)
}

// commandContext is like command, but the program and its children end with ctx.
func (a *account) commandContext(ctx context.Context, dir, path string, args ...string) *exec.Cmd {
	return a.prepare(exec.CommandContext(ctx, path, args...), dir)
}

func (a *account) prepare(cmd *exec.Cmd, dir string) *exec.Cmd {
	cmd.Dir = dir
	cmd.Env = environment(os.Environ())
	isolate(cmd, a)
	return cmd
}

// environment drops the variables that would change PostgreSQL (PGDATA, PGPORT, a locale) or that
// it does not need (DATABASE_URL). TZ saves initdb its slow search for the time zone's name, and
// makes the server's default UTC.
func environment(environ []string) []string {
	var kept []string
	for _, entry := range environ {
		name, _, _ := strings.Cut(entry, "=")
		if strings.HasPrefix(name, "PG") || strings.HasPrefix(name, "LC_") ||
			name == "LANG" || name == "LANGUAGE" || name == "TZ" || name == "DATABASE_URL" {
			continue
		}
		kept = append(kept, entry)
	}
	return append(kept, "LC_ALL=C", "TZ=UTC")
}
