package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What must be nowhere but in the mount: words from file contents, from names,
// from the target of a link and from an extended attribute.
var canaries = []string{"canary-of-content-7f1c", "canary-of-a-name-91be", "canary-of-a-link-c2d4", "canary-of-an-attribute-05aa"}

// makeTree makes a small tree with all that a copy must keep.
func makeTree(t *testing.T, dir string) {
	t.Helper()
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	random := rand.NewChaCha8([32]byte{1})
	content := func(n int) []byte {
		b := make([]byte, n)
		random.Read(b)
		return b
	}
	for i := range 12 {
		sub := filepath.Join(dir, fmt.Sprintf("dir-%d", i), "deep", canaries[1])
		check(os.MkdirAll(sub, 0o755))
		for j := range 20 {
			text := fmt.Sprintf("%s line %d of %d\n", canaries[0], j, i)
			check(os.WriteFile(filepath.Join(sub, fmt.Sprintf("text-%d", j)), []byte(strings.Repeat(text, 1+j*j)), fs.FileMode(0o600+j%8*9)))
		}
	}
	for _, n := range []int{0, 1, 4095, 4096, 4097, 65535, 65536, 1<<20 + 3, 5<<20 + 1, 17 << 20} {
		check(os.WriteFile(filepath.Join(dir, fmt.Sprint("random-", n)), content(n), 0o640))
	}
	holes, err := os.Create(filepath.Join(dir, "holes"))
	check(err)
	_, err = holes.WriteAt([]byte("end"), 9<<20)
	check(err)
	check(holes.Close())
	check(os.Symlink(canaries[2]+"/nowhere", filepath.Join(dir, "dangling")))
	check(os.Symlink("../dir-1/deep", filepath.Join(dir, "dir-2", "sideways")))
	check(os.Link(filepath.Join(dir, "random-4097"), filepath.Join(dir, "dir-3", "same-as-4097")))
	check(os.WriteFile(filepath.Join(dir, "name with spaces, ünï, \"quotes\"\nand a line"), []byte("x"), 0o444))
	check(unix.Mkfifo(filepath.Join(dir, "pipe"), 0o600))
	check(os.Mkdir(filepath.Join(dir, "empty"), 0o711))
	check(os.WriteFile(filepath.Join(dir, "program"), []byte("#!/bin/sh\nexit 0\n"), 0o4755))
	check(os.Chmod(filepath.Join(dir, "program"), 0o755|fs.ModeSetuid))
	check(unix.Setxattr(filepath.Join(dir, "random-1"), "user.note", []byte(canaries[3]), 0))
	old := time.Date(1999, 12, 31, 23, 59, 59, 123456789, time.UTC)
	check(os.Chtimes(filepath.Join(dir, "random-65536"), old, old))
	check(os.Chtimes(filepath.Join(dir, "empty"), old, old))
}

// sameTree compares the mount with the reference, byte for byte.
func (c *cluster) sameTree(reference string) time.Duration {
	c.t.Helper()
	began := time.Now()
	if diff := run(c.t, 120*time.Second, "rsync", "-naHX", "--checksum", "--delete", "--itemize-changes", reference+"/", c.mnt+"/"); diff != "" {
		c.t.Fatalf("the mount differs from the reference:\n%s", diff)
	}
	return time.Since(began)
}

// search returns the files below the directories that hold one of the words.
func search(t *testing.T, words []string, dirs ...string) (found []string, bytesRead int64) {
	t.Helper()
	for _, dir := range dirs {
		if err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			b, err := os.ReadFile(path)
			bytesRead += int64(len(b))
			for _, w := range words {
				if bytes.Contains(b, []byte(w)) || strings.Contains(path, w) {
					found = append(found, path+" holds "+w)
				}
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}
	return found, bytesRead
}

// A tree is copied in, worked on, made durable; as many nodes as the volume
// says it can lose are lost; it is read back from the others, then recovered
// from the words alone, and nobody but the mount has seen any of it.
func TestRoundTrip(t *testing.T) {
	c := newCluster(t, "4+2", 6)
	c.mountNow()
	c.waitNodes(6)
	source, reference := filepath.Join(c.dir, "source"), filepath.Join(c.dir, "reference")
	for _, d := range []string{source, reference} {
		if err := os.Mkdir(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	makeTree(t, source)

	began := time.Now()
	run(t, 60*time.Second, "cp", "-a", source, c.mnt+"/copied")
	run(t, 60*time.Second, "rsync", "-aHX", source+"/", c.mnt+"/synced/")
	repository := c.mnt + "/repository"
	run(t, 60*time.Second, "git", "init", "-q", c.mnt+"/origin")
	run(t, 60*time.Second, "sh", "-c", `cp -r "$1"/dir-* "$2/origin" && cd "$2/origin" && git add -A && git commit -qm one && git clone -q . "$2/repository"`, "sh", source, c.mnt)
	run(t, 60*time.Second, "sh", "-c", `cd "$1" && rm -r dir-5 && echo more > more && git add -A && git commit -qm two && git status --porcelain && git fsck --strict`, "sh", repository)
	run(t, 60*time.Second, "sqlite3", c.mnt+"/database", "CREATE TABLE t (id INTEGER PRIMARY KEY, note TEXT);")
	var inserts strings.Builder
	for i := range 100 {
		fmt.Fprintf(&inserts, "BEGIN; INSERT INTO t VALUES (%d, '%s'); COMMIT;\n", i, canaries[0])
	}
	run(t, 60*time.Second, "sqlite3", c.mnt+"/database", inserts.String())
	if out := run(t, 60*time.Second, "sqlite3", c.mnt+"/database", "SELECT count(*) FROM t; PRAGMA integrity_check;"); out != "100\nok\n" {
		t.Fatalf("sqlite: %q", out)
	}
	t.Logf("cp, rsync, git, sqlite: %v", time.Since(began).Round(time.Millisecond))
	run(t, 60*time.Second, "rsync", "-aHX", c.mnt+"/", reference+"/")
	if found, _ := search(t, canaries, reference); len(found) < 4 {
		t.Fatalf("the search finds nothing where there is something: %v", found)
	}

	t.Logf("durable after %v", c.waitDurable(120*time.Second).Round(time.Millisecond))
	status := c.status()
	if status.SurvivesLosses.Nodes != 2 || status.SurvivesLosses.Hosts != 2 {
		t.Errorf("4+2 on 6 nodes of 6 hosts survives the loss of %+v", status.SurvivesLosses)
	}
	lost := rand.Perm(len(c.nodes))[:status.SurvivesLosses.Nodes]
	for _, i := range lost {
		c.nodes[i].kill()
	}
	t.Logf("lost nodes %v", lost)
	if err := c.dropCache(); err != nil {
		t.Fatal(err)
	}
	c.unmount()
	c.mountNow()
	t.Logf("compared, from the peers: %v", c.sameTree(reference).Round(time.Millisecond))
	c.unmount()
	device, _ := search(t, canaries, c.device)
	if len(device) > 0 {
		t.Errorf("plaintext on this disk: %v", device)
	}

	if err := os.RemoveAll(c.device); err != nil {
		t.Fatal(err)
	}
	began = time.Now()
	_, addrs := c.addrs()
	run(t, 60*time.Second, program("defs"), "recover", "--data", c.device, "--words-file", c.words, "--peer", "@"+addrs)
	t.Logf("recovered: %v", time.Since(began).Round(time.Millisecond))
	c.mountNow()
	t.Logf("compared, after recovery: %v", c.sameTree(reference).Round(time.Millisecond))
	run(t, 60*time.Second, "sh", "-c", `cd "$1" && git status --porcelain && git fsck --strict && sqlite3 "$2" 'PRAGMA integrity_check'`, "sh", repository, c.mnt+"/database")
	c.unmount()

	found, size := search(t, canaries, c.device, filepath.Join(c.dir, "nodes"), filepath.Join(c.dir, "log"))
	if len(found) > 0 {
		t.Errorf("plaintext left the mount: %v", found)
	}
	t.Logf("searched %d MiB", size>>20)
}

// The commands that scripts build on: fields, exit codes, files without a mount.
func TestCommands(t *testing.T) {
	c := newCluster(t, "2+1", 3)
	defs := func(args ...string) string {
		t.Helper()
		return run(t, 60*time.Second, append([]string{program("defs"), args[0], "--data", c.device}, args[1:]...)...)
	}
	exitCode := func(args ...string) int {
		t.Helper()
		_, err := try(60*time.Second, append([]string{program("defs")}, args...)...)
		failed, ok := err.(*toolError)
		if !ok {
			t.Fatalf("defs %v: %v", args, err)
		}
		return exitCodeOf(failed)
	}
	c.mountNow()
	c.waitNodes(3)
	content := make([]byte, 3<<20+5)
	rand.NewChaCha8([32]byte{2}).Read(content)
	file := filepath.Join(c.dir, "file")
	c.write(file, string(content))
	c.write(c.mnt+"/hello", "hello")

	id := strings.TrimSpace(defs("put", file))
	defs("wait", "--durable", "--timeout", "60s")
	var status map[string]any
	if err := json.Unmarshal([]byte(defs("status", "--json")), &status); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{
		"schema", "volume", "mounted", "bytes.journaled", "bytes.queued", "bytes.recoverable", "bytes.durable",
		"cache.clean_bytes", "cache.max_bytes", "journal.bytes", "journal.max_bytes", "pool.nodes", "pool.hosts",
		"health.stripes", "health.degraded", "health.lost", "survives_losses.nodes", "survives_losses.hosts", "tasks",
	} {
		var at any = status
		for _, key := range strings.Split(path, ".") {
			object, _ := at.(map[string]any)
			at = object[key]
		}
		if at == nil {
			t.Errorf("status has no %s: %v", path, status)
		}
	}
	if n := status["bytes"].(map[string]any)["durable"].(float64); n != float64(len(content)+len("hello")) {
		t.Errorf("%v bytes are durable", n)
	}
	if out := defs("peers", "--json"); strings.Count(out, `"alive"`) < 3 {
		t.Errorf("peers: %s", out)
	}
	if out := run(t, 60*time.Second, program("defs"), "inspect", "--json", c.mnt+"/hello"); !strings.Contains(out, `"durable"`) {
		t.Errorf("inspect: %s", out)
	}
	value := make([]byte, 64)
	n, err := unix.Getxattr(c.mnt+"/hello", "user.defs.state", value)
	if err != nil || string(value[:n]) != "durable" {
		t.Errorf("user.defs.state: %q, %v", value[:max(n, 0)], err)
	}
	if code := exitCode("mount", "--data", c.device, c.mnt); code != 14 {
		t.Errorf("mounting at a mountpoint that is in use: code %d", code)
	}
	defs("cache", "drop")
	run(t, 60*time.Second, program("defs"), "umount", "--durable", c.mnt)
	c.mount.waitEnd(30 * time.Second)
	c.mount = nil

	// Now without a mount, and from the peers.
	copied := filepath.Join(c.dir, "copied")
	defs("get", id, copied)
	if b, err := os.ReadFile(copied); err != nil || !bytes.Equal(b, content) {
		t.Errorf("what was put comes back as %d bytes, %v", len(b), err)
	}
	if code := exitCode("status", "--data", filepath.Join(c.dir, "nothing")); code != 10 {
		t.Errorf("no volume: code %d", code)
	}
	if code := exitCode("status", "--no-such-flag"); code != 64 {
		t.Errorf("wrong flag: code %d", code)
	}
	wrong := filepath.Join(c.dir, "wrong")
	c.write(wrong, strings.Repeat("abandon ", 24))
	_, addrs := c.addrs()
	if code := exitCode("recover", "--data", filepath.Join(c.dir, "other"), "--words-file", wrong, "--peer", "@"+addrs); code != 12 {
		t.Errorf("wrong words: code %d", code)
	}

	// In the background, and with a signal as the end.
	run(t, 60*time.Second, program("defs"), "mount", "--daemon", "--data", c.device, c.mnt)
	if b, err := os.ReadFile(c.mnt + "/hello"); err != nil || string(b) != "hello" {
		t.Errorf("read %q, %v", b, err)
	}
	run(t, 60*time.Second, program("defs"), "umount", c.mnt)

	// Nobody is there to take the bytes.
	for _, n := range c.nodes {
		n.kill()
	}
	c.mountNow()
	c.write(c.mnt+"/lonely", "lonely")
	if code := exitCode("wait", "--data", c.device, "--durable", "--timeout", "1s"); code != 124 && code != 5 {
		t.Errorf("wait without peers: code %d", code)
	}
	c.mount.signal(syscall.SIGTERM)
	c.mount.waitEnd(30 * time.Second)
	c.mount = nil
	if points, err := mountsBelow(c.dir); err != nil || len(points) > 0 {
		t.Errorf("after SIGTERM: mounts %v, %v", points, err)
	}
}
