package docs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// decoderName is the name of a function that decodes what somebody else has written.
var decoderName = regexp.MustCompile(`^(?:[dD]ecode|[pP]arse|[uU]nmarshal)(?:[A-Z]|$)`)

// decoders lists, as docs/decoders.md names them, the functions that decode.
func decoders(t *testing.T) (names []string) {
	t.Helper()
	if err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || strings.HasSuffix(path, ".pb.go") {
			return err
		}
		dir, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil || strings.HasPrefix(dir, "bench") {
			return err // measures, and reads its own output
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
		}
		for _, d := range file.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok || !decoderName.MatchString(f.Name.Name) {
				continue
			}
			name := f.Name.Name
			if f.Recv != nil {
				receiver := f.Recv.List[0].Type
				if star, ok := receiver.(*ast.StarExpr); ok {
					receiver = star.X
				}
				if id, ok := receiver.(*ast.Ident); ok {
					name = id.Name + "." + name
				}
			}
			if dir != "." {
				name = filepath.ToSlash(dir) + "." + name
			}
			names = append(names, name)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return names
}

func TestEveryDecoderHasAFuzzTarget(t *testing.T) {
	text := documents(t)["docs/decoders.md"]
	found := decoders(t)
	if len(found) < 30 {
		t.Errorf("only %d decoders found: is the pattern right?", len(found))
	}
	for _, name := range found {
		if !strings.Contains(text, "`"+name+"`") {
			t.Errorf("docs/decoders.md does not name %s and its fuzz target", name)
		}
	}
	for name, dirs := range tests(t) {
		if !strings.HasPrefix(name, "Fuzz") {
			continue
		}
		for _, dir := range dirs {
			if qualified := strings.TrimPrefix(dir+"."+name, ".."); !strings.Contains(text, "`"+qualified+"`") {
				t.Errorf("docs/decoders.md does not name %s", qualified)
			}
		}
	}
	for line := range strings.Lines(text) {
		if cells := strings.Split(line, "|"); len(cells) == 5 && !strings.Contains(line, "---") && strings.TrimSpace(cells[1]) != "what" && !testName.MatchString(cells[3]) {
			t.Errorf("no fuzz target: %s", line)
		}
	}
}
