package main

import (
	"bytes"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/defs-fs/defs/cmd/internal/command"
)

// documented is a command line in a document: in backquotes, or in an example,
// where a comment or two spaces end it.
var documented = regexp.MustCompile("(?m)(?:`|^|  )(?:bin/)?defs ([a-z][^`#\n]*)")

var flagName = regexp.MustCompile(`--[a-z-]+`)

// TestDocumentsNameCommandsThatExist asks the help of each command that a
// document names for the flags that are given there.
func TestDocumentsNameCommandsThatExist(t *testing.T) {
	help := func(args ...string) string {
		var out bytes.Buffer
		if code := command.Defs(append(args, "--help"), command.Streams{In: strings.NewReader(""), Out: &out, Err: &out}); code != 0 {
			t.Fatalf("defs %v --help: code %d", args, code)
		}
		return out.String()
	}
	var paths []string
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/adr/*.md"} {
		found, err := filepath.Glob(filepath.Join("../..", pattern))
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, found...)
	}
	lines := 0
	for _, path := range paths {
		if filepath.Base(path) == "FORMAT.md" {
			continue // names of keys look the same
		}
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range documented.FindAllStringSubmatch(string(text), -1) {
			line, _, _ := strings.Cut(match[1], "  ")
			lines++
			words := strings.Fields(line)
			about := help(words[0])
			if !strings.Contains(about, "\n  defs "+words[0]) {
				t.Errorf("%s: there is no command defs %s", filepath.Base(path), words[0])
				continue
			}
			for _, word := range words[1:] { // its own commands
				if strings.Contains(about, "\n  "+word+" ") && strings.Contains(about, "Available Commands") {
					about += help(words[0], word)
				}
			}
			for _, flag := range flagName.FindAllString(line, -1) {
				if flag == "--peer" {
					flag = "--peers" // it stands for both
				}
				if !strings.Contains(about, flag+" ") && !strings.Contains(about, flag+"\n") {
					t.Errorf("%s: defs %s has no %s", filepath.Base(path), words[0], flag)
				}
			}
		}
	}
	if lines < 20 {
		t.Errorf("only %d command lines found: is the pattern right?", lines)
	}
}
