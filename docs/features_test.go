// Package docs checks that the documents name only what exists.
package docs

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const root = ".."

// documents are the texts that are checked, with their paths from the root.
func documents(t *testing.T) map[string]string {
	t.Helper()
	texts := map[string]string{}
	for _, pattern := range []string{"*.md", "docs/*.md", "docs/adr/*.md"} {
		paths, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			name, err := filepath.Rel(root, path)
			if err != nil {
				t.Fatal(err)
			}
			texts[name] = string(b)
		}
	}
	if len(texts["docs/features.md"]) == 0 {
		t.Fatal("docs/features.md is missing")
	}
	return texts
}

var testFunction = regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Benchmark)\w+)\(`)

// tests maps each test's name to the directories of the packages that have it.
func tests(t *testing.T) map[string][]string {
	t.Helper()
	found := map[string][]string{}
	if err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		dir, err := filepath.Rel(root, filepath.Dir(path))
		for _, match := range testFunction.FindAllStringSubmatch(string(b), -1) {
			found[match[1]] = append(found[match[1]], filepath.ToSlash(dir))
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return found
}

// testName is a test in backquotes, with or without its package's directory.
var testName = regexp.MustCompile("`(?:([a-z0-9/-]+)\\.)?((?:Test|Fuzz|Benchmark)[A-Z]\\w*)`")

func TestNamedTestsExist(t *testing.T) {
	found := tests(t)
	named := 0
	for document, text := range documents(t) {
		for _, match := range testName.FindAllStringSubmatch(text, -1) {
			named++
			dir, name := match[1], match[2]
			exists := len(found[name]) > 0
			if dir != "" {
				exists = false
				for _, have := range found[name] {
					exists = exists || have == dir
				}
			}
			if !exists {
				t.Errorf("%s names %s, which does not exist", document, match[0])
			}
		}
	}
	if named < 50 {
		t.Errorf("only %d names of tests found: is the pattern right?", named)
	}
}

// Every row of the checklist ends with the tests that show it, or says "open".
func TestEveryFeatureIsShownOrOpen(t *testing.T) {
	rows := 0
	for line := range strings.Lines(documents(t)["docs/features.md"]) {
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "|") || strings.HasPrefix(line, "| ---") {
			continue
		}
		cells := strings.Split(strings.Trim(line, "|"), "|")
		last := strings.TrimSpace(cells[len(cells)-1])
		if last == "shown by" {
			continue
		}
		rows++
		if !testName.MatchString(last) && !strings.HasPrefix(last, "open") {
			t.Errorf("no test and not open: %s", line)
		}
	}
	if rows < 40 {
		t.Errorf("only %d rows", rows)
	}
}

// goFile is the path of a source file in backquotes.
var goFile = regexp.MustCompile("`([a-z0-9_/-]+\\.(?:go|proto|json|txt))`")

func TestNamedFilesExist(t *testing.T) {
	for document, text := range documents(t) {
		if document == "README.md" {
			continue // names files of the user
		}
		for _, match := range goFile.FindAllStringSubmatch(text, -1) {
			if !strings.Contains(match[1], "/") {
				continue // a file of a volume's directory
			}
			if _, err := os.Stat(filepath.Join(root, match[1])); err != nil {
				t.Errorf("%s names a file: %v", document, err)
			}
		}
	}
}

func TestArchitectureMapsEveryDirectory(t *testing.T) {
	text := documents(t)["ARCHITECTURE.md"]
	entries, err := os.ReadDir(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		name := e.Name()
		if !e.IsDir() || name == ".git" || name == "bin" { // bin/ is made by builds
			continue
		}
		if !strings.Contains(text, "`"+name+"/`") {
			t.Errorf("ARCHITECTURE.md does not say what %s/ is", name)
		}
	}
}
