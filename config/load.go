package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/knadh/koanf/v2"
	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/pflag"
)

// environmentPrefix begins the variables that are settings.
const environmentPrefix = "DEFS_"

// fileBytesMax bounds a configuration file.
const fileBytesMax = 1 << 20

// Sources are where settings come from; later ones override earlier ones.
type Sources struct {
	Files   []string       // TOML; missing files are skipped
	Environ []string       // NAME=VALUE; only DEFS_* count
	Mount   map[string]any // of -o, see ParseMountOptions
	Flags   *pflag.FlagSet // those that were given; nil for none
}

// Load reads all sources, fills defaults and validates. The error lists every
// violation, unknown names with what may have been meant.
func Load(s Sources) (Options, error) {
	var errs []error
	k := koanf.New("\n") // no setting is nested: a delimiter that no name has
	load := func(origin string, v values) {
		for name := range v {
			if !slices.Contains(Keys(), name) {
				errs = append(errs, fmt.Errorf("%s: unknown setting %q%s", origin, name, Suggest(name, Keys())))
				delete(v, name)
			}
		}
		if err := k.Load(v, nil); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", origin, err))
		}
	}
	for _, path := range s.Files {
		v, err := readFile(path)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		load(path, v)
	}
	load("environment", fromEnvironment(s.Environ))
	load("mount options", s.Mount)
	if s.Flags != nil {
		load("flags", fromFlags(s.Flags))
	}
	var o Options
	for _, f := range fields() {
		if !k.Exists(f.key) {
			continue
		}
		// One at a time, so that each wrong value is named.
		one := koanf.New("\n")
		if err := errors.Join(one.Set(f.key, k.Get(f.key)), one.Unmarshal("", &o)); err != nil {
			errs = append(errs, fmt.Errorf("%s: %v is not a %s", f.key, k.Get(f.key), f.kind))
		}
	}
	o.EnsureDefaults()
	return o, errors.Join(append(errs, o.Validate())...)
}

// values is a koanf.Provider of settings at hand.
type values map[string]any

func (v values) Read() (map[string]any, error) { return v, nil }

func (v values) ReadBytes() ([]byte, error) { return nil, errors.New("not a file") }

func readFile(path string) (values, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if info.Size() > fileBytesMax {
		return nil, fmt.Errorf("%s is larger than %d bytes", path, fileBytesMax)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	v := values{}
	if err := toml.Unmarshal(b, &v); err != nil {
		var at *toml.DecodeError
		if errors.As(err, &at) {
			line, column := at.Position()
			return nil, fmt.Errorf("%s:%d:%d: %w", path, line, column, err)
		}
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return v, nil
}

func fromEnvironment(environ []string) values {
	v := values{}
	for _, e := range environ {
		name, value, _ := strings.Cut(e, "=")
		rest, ours := strings.CutPrefix(name, environmentPrefix)
		if !ours || value == "" {
			continue
		}
		key := strings.ReplaceAll(strings.ToLower(rest), "_", "-")
		v[key] = value
		if isList(key) {
			v[key] = strings.Split(value, ",")
		}
	}
	return v
}

func fromFlags(flags *pflag.FlagSet) values {
	v := values{}
	flags.Visit(func(f *pflag.Flag) {
		if !slices.Contains(Keys(), f.Name) {
			return // of the command itself
		}
		if list, ok := f.Value.(pflag.SliceValue); ok {
			v[f.Name] = list.GetSlice()
			return
		}
		v[f.Name] = f.Value.String()
	})
	return v
}

// Kinds of settings, as messages name them.
const (
	kindText     = "text"
	kindList     = "list"
	kindSize     = "size such as 4GiB"
	kindDuration = "duration such as 30s"
	kindBool     = "true or false"
)

type field struct{ key, usage, kind string }

func fields() []field {
	t := reflect.TypeFor[Options]()
	out := make([]field, 0, t.NumField())
	for i := range t.NumField() {
		f := field{key: t.Field(i).Tag.Get("koanf"), usage: t.Field(i).Tag.Get("usage"), kind: kindText}
		switch t.Field(i).Type {
		case reflect.TypeFor[[]string]():
			f.kind = kindList
		case reflect.TypeFor[Size]():
			f.kind = kindSize
		case reflect.TypeFor[time.Duration]():
			f.kind = kindDuration
		case reflect.TypeFor[bool]():
			f.kind = kindBool
		}
		out = append(out, f)
	}
	return out
}

func isList(key string) bool {
	return slices.ContainsFunc(fields(), func(f field) bool { return f.key == key && f.kind == kindList })
}

// Keys are the names of all settings.
func Keys() []string {
	var keys []string
	for _, f := range fields() {
		keys = append(keys, f.key)
	}
	return keys
}

// AddFlags adds flags for the settings that a command uses.
func AddFlags(flags *pflag.FlagSet, keys ...string) {
	for _, f := range fields() {
		if !slices.Contains(keys, f.key) {
			continue
		}
		switch f.kind {
		case kindBool:
			flags.Bool(f.key, false, f.usage)
		case kindList:
			flags.StringSlice(f.key, nil, f.usage)
		default:
			flags.String(f.key, "", f.usage)
		}
	}
}
