package kafkaserver

import (
	"errors"
	"os/exec"
)

func isolate(*exec.Cmd) {}

func (p *process) terminate() error { return p.cmd.Process.Kill() }
func (p *process) pause() error     { return errors.ErrUnsupported }
func (p *process) resume() error    { return errors.ErrUnsupported }
