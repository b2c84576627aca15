// Package endtoend has the proof of messages from end to end, in its tests.
//
// Requests publish messages, a relay takes them to a broker, and three processes consume them, each
// message with one row in a table that has no unique constraint. Meanwhile the processes are killed
// and paused past their session, broker and PostgreSQL crash and come back, and some messages are
// published twice. In the end SQL counts the rows: none may be missing or there twice, and the rows
// of a key must be in its order.
//
// The same proof runs on kfake, NATS and Kafka. Processes, brokers and databases are real and die
// of real signals, so it needs Linux. Plain go test runs a small proof on kfake and NATS. .ci/run
// messages runs the whole one, on Kafka too if .ci/kafka can get it.
package endtoend
