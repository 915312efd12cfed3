package conformance

import (
	"fmt"

	"golang.org/x/sys/unix"
)

func readdirCases() []testCase {
	return []testCase{
		{op: "readdir", name: "types, inode numbers, dots", run: listed},
		{op: "readdir", name: "positions", run: positions},
		{op: "readdir", name: "while names come and go", run: listedWhileChanging},
		{op: "readdir", name: "every name removed while it is listed", run: removedWhileListed},
		{op: "readdir", name: "names that are renamed while listed", run: renamedWhileListed},
		{op: "readdir", name: "small buffers", run: func(t *T) {
			fill(t, "dir", 500)
			fd := t.open("dir", unix.O_RDONLY, 0)
			equal(t, "entries", len(t.listRest(fd, 280)), 502)
			_, err := unix.Seek(fd, 0, unix.SEEK_SET)
			t.want(0, err)
			_, err = listSome(fd, 10)
			t.want(unix.EINVAL, err)
		}},
		{op: "readdir", name: "what another descriptor changed is seen after a rewind", run: func(t *T) {
			t.mkdir("dir", 0o755)
			fd := t.open("dir", unix.O_RDONLY, 0)
			for i := range 20 {
				equal(t, "entries", len(t.listRest(fd, 4096)), 2+i)
				t.file(fmt.Sprintf("dir/%d", i), "")
				_, err := unix.Seek(fd, 0, unix.SEEK_SET)
				t.want(0, err)
			}
		}},
		{op: "readdir", name: "times", run: func(t *T) {
			fill(t, "dir", 5)
			before := t.stamps("dir")
			t.tick()
			t.list("dir")
			after := t.stamps("dir")
			t.that(after.atime > before.atime, "atime is not changed by the first listing")
			t.that(after.mtime == before.mtime && after.ctime == before.ctime, "mtime or ctime changed")
			t.changes("dir", "", func() error { t.list("dir"); return nil }) // relatime
		}},
		{op: "readdir", name: "100,000 names", long: true, run: func(t *T) { manyNames(t, 100_000) }},
		{op: "readdir", name: "2,000 names", run: func(t *T) { manyNames(t, 2000) }},
	}
}

func fill(t *T, dir string, n int) {
	t.mkdir(dir, 0o755)
	for i := range n {
		t.must(openClose(fmt.Sprintf("%s/name%06d", dir, i), unix.O_CREAT|unix.O_EXCL|unix.O_WRONLY, 0o644))
	}
}

func listed(t *T) {
	t.mkdir("dir", 0o755)
	for _, k := range t.kinds() {
		t.must(k.make("dir/" + k.name))
	}
	seen := make(map[string]bool)
	for _, e := range t.list("dir") {
		t.row("%s", e.name)
		st := t.lstat("dir/" + e.name)
		equal(t, "inode", e.ino, st.Ino)
		equal(t, "type", e.kind, uint8(st.Mode>>12))
		t.that(!seen[e.name], "listed twice")
		seen[e.name] = true
	}
	t.rows = ""
	equal(t, "entries", len(seen), len(t.kinds())+2)
	t.that(seen["."] && seen[".."], "no dots")
}

// positions: going back to a cookie gives the same entries again.
func positions(t *T) {
	fill(t, "dir", 300)
	fd := t.open("dir", unix.O_RDONLY, 0)
	all := t.listRest(fd, 1024)
	equal(t, "entries", len(all), 302)
	seen := make(map[int64]bool)
	for _, i := range []int{0, 1, 2, 3, 50, 150, 299, 300, 301} {
		_, err := unix.Seek(fd, all[i].cookie, unix.SEEK_SET)
		t.want(0, err)
		rest := t.listRest(fd, 2048)
		equal(t, "entries after a position", len(rest), len(all)-i-1)
		for j, e := range rest {
			equal(t, "name", e.name, all[i+1+j].name)
		}
	}
	for _, e := range all {
		t.that(!seen[e.cookie], "two entries of one position")
		seen[e.cookie] = true
	}
}

// listedWhileChanging: what stays is met once, whatever comes and goes around it.
func listedWhileChanging(t *T) {
	fill(t, "dir", 400)
	fd := t.open("dir", unix.O_RDONLY, 0)
	count := make(map[string]int)
	for round := 0; ; round++ {
		some, err := listSome(fd, 600)
		t.must(err)
		if len(some) == 0 {
			break
		}
		for _, e := range some {
			count[e.name]++
		}
		if round < 100 {
			t.must(unix.Unlink(fmt.Sprintf("dir/name%06d", 4*round+1)))
			t.must(openClose(fmt.Sprintf("dir/new%d", round), unix.O_CREAT|unix.O_WRONLY, 0o644))
			t.must(unix.Mkdir(fmt.Sprintf("dir/sub%d", round), 0o755))
		}
	}
	for i := range 400 {
		name := fmt.Sprintf("name%06d", i)
		switch n := count[name]; {
		case i%4 == 1:
			t.that(n <= 1, "%s, which went, is met %d times", name, n)
		default:
			equal(t, "how often "+name+" is met", n, 1)
		}
	}
	for i := range 100 {
		t.that(count[fmt.Sprintf("new%d", i)] <= 1, "a new name is met twice")
	}
}

// removedWhileListed is what rm -r does.
func removedWhileListed(t *T) {
	fill(t, "dir", 1000)
	fd := t.open("dir", unix.O_RDONLY, 0)
	for {
		some, err := listSome(fd, 800)
		t.must(err)
		if len(some) == 0 {
			break
		}
		for _, e := range some {
			if e.name != "." && e.name != ".." {
				t.must(unix.Unlink("dir/" + e.name))
			}
		}
	}
	t.want(0, unix.Rmdir("dir"))
}

// renamedWhileListed: a listing ends although each name that it meets gets a new one.
func renamedWhileListed(t *T) {
	fill(t, "dir", 300)
	fd := t.open("dir", unix.O_RDONLY, 0)
	met := 0
	for met < 10_000 {
		some, err := listSome(fd, 800)
		t.must(err)
		if len(some) == 0 {
			break
		}
		for _, e := range some {
			if e.name == "." || e.name == ".." {
				continue
			}
			met++
			t.must(unix.Rename("dir/"+e.name, fmt.Sprintf("dir/renamed%d", met)))
		}
	}
	t.that(met >= 300 && met < 10_000, "%d names met of 300", met)
	equal(t, "names", len(t.list("dir")), 302)
}

func manyNames(t *T, n int) {
	fill(t, "dir", n)
	seen := make(map[string]bool, n)
	for _, e := range t.list("dir") {
		seen[e.name] = true
	}
	equal(t, "names", len(seen), n+2)
	for i := 0; i < n; i += n / 100 {
		t.that(seen[fmt.Sprintf("name%06d", i)], "name %d is missing", i)
		t.want(0, unix.Lstat(fmt.Sprintf("dir/name%06d", i), new(unix.Stat_t)))
	}
	for i := range n {
		t.must(unix.Unlink(fmt.Sprintf("dir/name%06d", i)))
	}
	t.want(0, unix.Rmdir("dir"))
}
