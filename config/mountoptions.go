package config

import (
	"errors"
	"fmt"
	"slices"
	"strings"
)

// plainMountOptions are those of mount(8) and fstab(5) that ask for what holds
// anyway, or that are for others to read.
var plainMountOptions = []string{
	"rw", "defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "_netdev", "async",
	"suid", "dev", "exec", "atime", "relatime", "diratime", "nodiratime", "strictatime", "lazytime", "default_permissions", "nonempty",
}

// ParseMountOptions reads the argument of -o: names and NAME=VALUE, separated
// by commas. The result is for Sources.Mount. A setting that is a list is given
// once for each value.
func ParseMountOptions(text string) (map[string]any, error) {
	out := make(map[string]any)
	var errs []error
	if slices.Contains(strings.Split(text, ","), "remount") {
		// The rest is what the mount table shows of the mount.
		return nil, errors.New("a mount is changed by the kernel alone, and in ro, rw, noatime, nosuid, nodev and noexec only: mount -i -o remount,ro; for the rest unmount it first")
	}
	for _, word := range strings.Split(text, ",") {
		name, value, hasValue := strings.Cut(word, "=")
		switch name {
		case "ro":
			name = "read-only"
		case "allow_other":
			name = "allow-other"
		}
		switch {
		case name == "" || slices.Contains(plainMountOptions, name) || strings.HasPrefix(name, "x-") || name == "comment":
		case !slices.Contains(Keys(), name):
			errs = append(errs, fmt.Errorf("unknown mount option %q%s", name, Suggest(name, append(Keys(), "ro", "allow_other"))))
		case isList(name):
			list, _ := out[name].([]string)
			out[name] = append(list, value)
		case hasValue:
			out[name] = value
		default:
			out[name] = "true"
		}
	}
	return out, errors.Join(errs...)
}
