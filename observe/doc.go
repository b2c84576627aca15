// Package observe holds what the engine's observers share: [Join] gives one engine several tracers, [Log] writes events to a
// [log/slog.Logger], [ErrorKind] and [Outcome] are errors and outcomes as labels. Metrics are in observe/prometheus, spans in
// observe/otel, the detector of clients that lose their keys in observe/lostkey, and the history of a key's requests in
// observe/history. A program that imports none of them contains none.
//
// No key, scope or body reaches a metric, a span or a log, whatever a client sends.
package observe
