package pgserver

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// socketPort only names the socket file; the folder around it is private.
const socketPort = 5432

// ownSettings are decided by Start: with other values the Server's URLs, its log or its lock would
// be wrong.
var ownSettings = []string{
	"config_file", "data_directory", "external_pid_file", "hba_file", "listen_addresses", "log_destination",
	"logging_collector", "port", "unix_socket_directories", "unix_socket_group", "unix_socket_permissions",
}

func checkSettings(settings map[string]string) error {
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		if slices.Contains(ownSettings, strings.ToLower(name)) {
			return fmt.Errorf("setting %s cannot be changed: where PostgreSQL lives and listens is decided by Start", name)
		}
	}
	return nil
}

// settingArgs returns postgres arguments in the order of the names, so that equal settings give
// equal command lines.
func settingArgs(settings map[string]string) []string {
	var args []string
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		args = append(args, "-c", name+"="+settings[name])
	}
	return args
}
