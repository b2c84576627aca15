// Package rulestest tests the alert rules and the dashboard of observe/prometheus with Prometheus
// itself: its parsers, its query engine and its database, fed with scrapes of a service while
// events happen. It is a module of its own, so that no user depends on Prometheus.
package rulestest
