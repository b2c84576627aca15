//go:build unix

package main

import (
	"strings"
	"testing"
	"time"

	"github.com/alecthomas/kong"

	"github.com/paidonce/idempotency/cmd/demo-bank/internal/server"
)

// TestLimitsOfTheFlags checks both sides of each limit.
func TestLimitsOfTheFlags(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		flag          string
		good, refused []string
	}{
		{"--ttl", []string{"1s", "24h", "8760h"}, []string{"999ms", "0s", "-1s", "x"}},
		{"--reap-interval", []string{"1ms", "1m"}, []string{"999us", "0s", "-1s"}},
		{"--handler-timeout", []string{"10ms", "10s", "54s"}, []string{"9ms", "54s1ms", "0s", "-1s"}},
		{"--wait", []string{"0s", "1ms", "1m"}, []string{"1m1ns", "-1s"}},
		{"--wait=2s --ttl", []string{"3s"}, []string{"2s"}},
		{"--acquire-timeout", []string{"1ms", "3s"}, []string{"999us", "0s", "-1s"}},
		{"--pool-size", []string{"1", "1000"}, []string{"0", "1001"}},
	} {
		for _, value := range test.good {
			if _, err := parseFlags(strings.Fields(test.flag + "=" + value)...); err != nil {
				t.Errorf("%s %s: %v", test.flag, value, err)
			}
		}
		for _, value := range test.refused {
			if _, err := parseFlags(strings.Fields(test.flag + "=" + value)...); err == nil {
				t.Errorf("%s %s is taken", test.flag, value)
			}
		}
	}
	cli, err := parseFlags()
	if err != nil {
		t.Fatal(err)
	}
	got := cli.Serve
	if got.TTL != 24*time.Hour || got.ReapInterval != time.Minute || got.HandlerTimeout != 10*time.Second ||
		got.Wait != 0 || got.AcquireTimeout != 3*time.Second || got.PoolSize != server.PoolSizeDefault {
		t.Errorf("the defaults are %+v", got)
	}
}

func parseFlags(args ...string) (*commands, error) {
	var cli commands
	parser, err := kong.New(&cli, defaults)
	if err != nil {
		return nil, err
	}
	_, err = parser.Parse(append([]string{"serve"}, args...))
	return &cli, err
}
