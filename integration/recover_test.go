package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Two machines write to a volume, each on its own. A third one is told what it
// does not get, and gets either on demand.
func TestRecoverOneOfSeveral(t *testing.T) {
	c := newCluster(t, "2+1", 3)
	c.mountNow()
	c.waitNodes(3)
	_, addrs := c.addrs()
	recover := func(dir string, args ...string) (out string, code int) {
		t.Helper()
		out, err := try(60*time.Second, append([]string{program("defs"), "recover", "--data", dir, "--words-file", c.words, "--peer", "@" + addrs}, args...)...)
		if err != nil {
			failed, ok := err.(*toolError)
			if !ok {
				t.Fatal(err)
			}
			code = exitCodeOf(failed)
		}
		return out, code
	}
	c.write(c.mnt+"/common", "common")
	c.waitDurable(60 * time.Second)

	second := filepath.Join(c.dir, "second")
	if out, code := recover(second); code != 0 || !strings.Contains(out, "device 1") || strings.Contains(out, "NOT") {
		t.Fatalf("the only state: code %d\n%s", code, out)
	}
	file := filepath.Join(c.dir, "of-second")
	c.write(file, "of the second")
	id := strings.TrimSpace(run(t, 60*time.Second, program("defs"), "put", "--data", second, file))
	c.write(c.mnt+"/of-first", "of the first") // later: this is the newest state
	c.waitDurable(60 * time.Second)

	var report struct {
		Device uint16
		Head   struct {
			Device uint16
			Head   uint64
		}
		Left []struct {
			Device uint16
			Head   uint64
			Time   time.Time
			Since  struct {
				Device uint16
				Head   uint64
			}
		}
		Warnings []string
	}
	out, code := recover(filepath.Join(c.dir, "third"), "--json")
	if err := json.Unmarshal([]byte(out), &report); err != nil || code != 3 {
		t.Fatalf("code %d, %v\n%s", code, err, out)
	}
	if report.Device != 3 || report.Head.Device != 1 || len(report.Left) != 1 || len(report.Warnings) > 0 {
		t.Fatalf("report: %s", out)
	}
	if left := report.Left[0]; left.Device != 2 || left.Head == 0 || time.Since(left.Time) > time.Hour || left.Since.Device != 1 || left.Since.Head >= report.Head.Head {
		t.Errorf("report: %s", out)
	}

	fourth := filepath.Join(c.dir, "fourth")
	if out, code = recover(fourth, "--head", "2"); code != 3 || !strings.Contains(out, "NOT in it: what device 1 has changed") || !strings.Contains(out, "--head 1") {
		t.Errorf("the other state: code %d\n%s", code, out)
	}
	copied := filepath.Join(c.dir, "copied")
	run(t, 60*time.Second, program("defs"), "get", "--data", fourth, id, copied)
	if b, err := os.ReadFile(copied); err != nil || string(b) != "of the second" {
		t.Errorf("read %q, %v", b, err)
	}
	if out, code = recover(filepath.Join(c.dir, "fifth"), "--head", "9"); code != 1 {
		t.Errorf("a device that there is not: code %d\n%s", code, out)
	}
}
