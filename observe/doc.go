// Package observe has the shared parts of the engine's observers: [Join] gives one engine several
// tracers, [Log] writes events to a [log/slog.Logger], [ErrorKind] and [Outcome] turn errors and
// outcomes into labels. Metrics are in observe/prometheus, spans in observe/otel, the detector of
// clients that lose their keys in observe/lostkey, and the history of a key's requests in
// observe/history. A program contains only those that it imports.
//
// No key, scope or body reaches a metric, a span or a log, whatever a client sends.
package observe
