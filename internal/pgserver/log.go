package pgserver

import (
	"fmt"
	"io"
	"os"
	"strings"
)

const (
	logBytesMax  = 10 << 20 // a longer log becomes the old log at the next start
	tailBytesMax = 4 << 10
	tailLinesMax = 12
)

// openLog opens the log for appending. A long one becomes the old log first.
func (d *dataDir) openLog() (*serverLog, error) {
	path := d.file(logName)
	if info, err := os.Lstat(path); err == nil && info.Size() > logBytesMax {
		if err := os.Rename(path, d.file(oldLogName)); err != nil {
			return nil, fmt.Errorf("set old log aside: %w", err)
		}
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|noFollow, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	end, err := file.Seek(0, io.SeekEnd)
	if err == nil {
		err = handToOwner(file, d.path)
	}
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("open log: %w", err)
	}
	return &serverLog{file: file, path: path, start: end}, nil
}

// serverLog is PostgreSQL's log since one start.
type serverLog struct {
	file  *os.File
	path  string
	start int64
}

// tail returns the last lines, or the reason why they cannot be read.
func (l *serverLog) tail() string {
	f, err := os.Open(l.path)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err.Error()
	}
	from := max(l.start, info.Size()-tailBytesMax)
	text, err := io.ReadAll(io.NewSectionReader(f, from, tailBytesMax))
	if err != nil {
		return err.Error()
	}
	return lastLines(string(text))
}

func lastLines(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(lines[max(0, len(lines)-tailLinesMax):], "\n")
}
