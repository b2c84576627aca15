// Package rulestest holds the alert rules and the dashboard of observe/prometheus against Prometheus itself: its parsers, its query
// engine and its database, fed with scrapes of a service to which things happen. It is a module of its own, so that
// Prometheus is nobody's dependency.
package rulestest
