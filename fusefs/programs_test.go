package fusefs

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// run runs a shell script in dir and returns what it prints. The shell changes the directory: a child of this process
// that has not called exec yet must not wait for a server that lives in this process.
func run(t *testing.T, dir, script string) string {
	t.Helper()
	cmd := exec.Command("sh", "-euc", "cd '"+dir+"'\n"+script)
	cmd.Env = append(os.Environ(), "GIT_CONFIG_GLOBAL=/dev/null", "GIT_CONFIG_NOSYSTEM=1",
		"GIT_AUTHOR_NAME=a", "GIT_AUTHOR_EMAIL=a@localhost", "GIT_COMMITTER_NAME=a", "GIT_COMMITTER_EMAIL=a@localhost")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

func needs(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("%s is not installed", p)
		}
	}
}

// sampleTree makes a directory outside the mount with what a copy has to preserve.
func sampleTree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	random := rand.NewChaCha8([32]byte{2})
	for i := range 100 {
		sub := filepath.Join(dir, fmt.Sprintf("dir%d", i%7))
		must(t, os.MkdirAll(sub, 0o750))
		content := make([]byte, i*i*3)
		random.Read(content)
		must(t, os.WriteFile(filepath.Join(sub, fmt.Sprintf("file %d", i)), content, os.FileMode(0o400+i%0o200)))
	}
	must(t, os.Link(dir+"/dir1/file 1", dir+"/dir2/hard link"))
	must(t, os.Symlink("../dir3/file 3", dir+"/dir3/symbolic link"))
	must(t, os.Symlink("missing", dir+"/dangling"))
	run(t, dir, `mkfifo fifo; mkdir empty; chmod 1777 empty; truncate -s 3M sparse; printf x >>sparse
		touch -d 1999-12-31T23:59:59.123456789 "dir4/file 4" dir4; chown 12:34 "dir5/file 5"; chmod 4755 "dir6/file 6"`)
	return dir
}

func TestRsyncRoundTrip(t *testing.T) {
	needs(t, "rsync")
	mnt, server := mountServer(t)
	tree := sampleTree(t)
	run(t, mnt, "rsync -aHAXS "+tree+"/ copy/ 2>/dev/null || rsync -aHS "+tree+"/ copy/")
	must(t, server.InvalidateEntry(1, "copy"))
	if out := run(t, mnt, "rsync -naHS --checksum --delete --itemize-changes "+tree+"/ copy/"); out != "" {
		t.Fatalf("the copy differs:\n%s", out)
	}
}

func TestTarRoundTrip(t *testing.T) {
	needs(t, "tar", "rsync")
	mnt := mount(t)
	tree := sampleTree(t)
	run(t, mnt, "mkdir copy; tar -C "+tree+" -cf tree.tar .; tar -C copy -xpf tree.tar; tar -C copy --compare -f tree.tar")
	if out := run(t, mnt, "rsync -naH --checksum --delete --itemize-changes "+tree+"/ copy/"); out != "" {
		t.Fatalf("the copy differs:\n%s", out)
	}
}

func TestCopyAndRemove(t *testing.T) {
	needs(t, "rsync")
	mnt := mount(t)
	tree := sampleTree(t)
	run(t, mnt, "cp -a "+tree+" one; cp -a one two; mv two three; rm -r one")
	if out := run(t, mnt, "rsync -naH --checksum --delete --itemize-changes "+tree+"/ three/"); out != "" {
		t.Fatalf("the copy differs:\n%s", out)
	}
	run(t, mnt, "rm -r three")
}

func TestGit(t *testing.T) {
	needs(t, "git")
	mnt := mount(t)
	out := run(t, mnt, `
		git init -q one; cd one
		for i in $(seq 50); do mkdir -p d$((i%5)); echo line $i >d$((i%5))/f$i; done
		git add .; git commit -qm first
		echo change >>d1/f1; git mv d2/f2 moved; git rm -q d3/f3; git commit -qam second
		git checkout -qb branch HEAD~1; echo other >d4/f4; git commit -qam third
		git merge -q -m merged -; git gc -q; git fsck --strict 2>&1
		cd ..; git clone -q one two; cd two; git status --porcelain; git log --oneline | wc -l`)
	if strings.TrimSpace(out) != "4" {
		t.Fatalf("got:\n%s", out)
	}
}

func TestSQLite(t *testing.T) {
	needs(t, "sqlite3")
	mnt := mount(t)
	for _, journal := range []string{"delete", "truncate", "persist", "wal"} {
		var sql strings.Builder
		fmt.Fprintf(&sql, "pragma journal_mode=%s; pragma synchronous=full; create table t(id integer primary key, v text);\n", journal)
		for i := range 50 {
			fmt.Fprintf(&sql, "insert into t(v) values('%d %s');\n", i, strings.Repeat("v", i*20))
		}
		sql.WriteString("update t set v = v || 'x' where id % 3 = 0; delete from t where id % 5 = 0; vacuum;\n")
		write(t, mnt+"/sql", sql.String())
		out := run(t, mnt, "sqlite3 -bail "+journal+".db <sql; sqlite3 "+journal+".db 'pragma integrity_check; select count(*) from t'")
		if !strings.HasSuffix(out, "ok\n40\n") {
			t.Fatalf("%s: %s", journal, out)
		}
	}
}

// Editors save by renaming a new file over the old one, which somebody may have open.
func TestSaveByRename(t *testing.T) {
	mnt := mount(t)
	write(t, mnt+"/doc", "version 0")
	for i := range 50 {
		old, err := os.Open(mnt + "/doc")
		must(t, err)
		write(t, mnt+"/doc.tmp", fmt.Sprintf("version %d", i+1))
		must(t, os.Rename(mnt+"/doc.tmp", mnt+"/doc"))
		buf := make([]byte, 20)
		n, err := old.Read(buf)
		must(t, err)
		if want := fmt.Sprintf("version %d", i); string(buf[:n]) != want {
			t.Fatalf("the old file holds %q, want %q", buf[:n], want)
		}
		must(t, old.Close())
		wantContent(t, mnt+"/doc", fmt.Sprintf("version %d", i+1))
	}
}
