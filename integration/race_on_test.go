//go:build race

package integration

// buildFlags build the programs with what the tests are built with.
var buildFlags = []string{"-race"}
