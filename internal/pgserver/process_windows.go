package pgserver

import (
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/windows"
)

const unixSockets = false

func (p *process) signalFast() error      { return p.signal("INT") }
func (p *process) signalImmediate() error { return p.signal("QUIT") }

// signal goes through pg_ctl, which knows the pipe that replaces signals on Windows.
func (p *process) signal(name string) error {
	return exec.Command(p.binaries.program("pg_ctl"), "kill", name, strconv.Itoa(p.pid())).Run()
}

// isolate gives cmd a process group of its own, so that Ctrl-C does not reach it.
func isolate(cmd *exec.Cmd, _ *account) {
	cmd.SysProcAttr = &syscall.SysProcAttr{CreationFlags: windows.CREATE_NEW_PROCESS_GROUP}
}

// guard puts the postmaster into a job that Windows ends with the job's last handle, which only
// this process holds.
func guard(postmaster *os.Process) (unguard func(), err error) {
	job, err := windows.CreateJobObject(nil, nil)
	if err != nil {
		return nil, fmt.Errorf("create job: %w", err)
	}
	defer func() {
		if err != nil {
			windows.CloseHandle(job)
		}
	}()
	limits := windows.JOBOBJECT_EXTENDED_LIMIT_INFORMATION{}
	limits.BasicLimitInformation.LimitFlags = windows.JOB_OBJECT_LIMIT_KILL_ON_JOB_CLOSE
	if _, err = windows.SetInformationJobObject(job, windows.JobObjectExtendedLimitInformation,
		uintptr(unsafe.Pointer(&limits)), uint32(unsafe.Sizeof(limits))); err != nil {
		return nil, fmt.Errorf("limit job: %w", err)
	}
	handle, err := windows.OpenProcess(windows.PROCESS_SET_QUOTA|windows.PROCESS_TERMINATE, false, uint32(postmaster.Pid))
	if err != nil {
		return nil, fmt.Errorf("open process: %w", err)
	}
	defer windows.CloseHandle(handle)
	if err = windows.AssignProcessToJobObject(job, handle); err != nil {
		return nil, fmt.Errorf("assign to job: %w", err)
	}
	return func() { windows.CloseHandle(job) }, nil
}

// isPostmaster leaves the decision to PostgreSQL, which checks postmaster.pid itself.
func isPostmaster(int, string) bool { return false }
