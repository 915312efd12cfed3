package volume

import (
	"bytes"
	"context"
	"fmt"
	"syscall"
	"testing"

	"github.com/defs-fs/defs/metastore"
)

func (v *testVolume) mkdir(t *testing.T, parent Ino, name string) Ino {
	t.Helper()
	a, err := v.Create(t.Context(), parent, name, Create{Mode: syscall.S_IFDIR | 0o755})
	if err != nil {
		t.Fatal(err)
	}
	return a.Ino
}

func (v *testVolume) putIn(t *testing.T, dir Ino, name string, data []byte) Ino {
	t.Helper()
	a, err := v.Create(t.Context(), dir, name, Create{Mode: syscall.S_IFREG | 0o644})
	if err != nil {
		t.Fatal(err)
	}
	v.write(t, a.Ino, 0, data)
	return a.Ino
}

func (v *testVolume) setPolicy(t *testing.T, dir Ino, policy string) {
	t.Helper()
	if err := v.SetXattr(t.Context(), dir, xattrPolicy, []byte(policy), 0); err != nil {
		t.Fatal(err)
	}
}

// stripesOf returns the stripes of a file's content.
func stripesOf(t *testing.T, v *Volume, ino Ino) map[[16]byte]metastore.StripeInfo {
	t.Helper()
	out := make(map[[16]byte]metastore.StripeInfo)
	if err := v.db.Extents(ino, 0, 1<<62, func(e metastore.Extent) bool {
		if !e.HasRemote {
			t.Errorf("inode %d: bytes at %d are not placed", ino, e.Off)
		}
		info, err := v.db.Stripe(e.Remote.Stripe)
		if err != nil {
			t.Error(err)
		}
		out[e.Remote.Stripe] = info
		return true
	}); err != nil {
		t.Fatal(err)
	}
	return out
}

func wantParity(t *testing.T, v *Volume, ino Ino, m int) {
	t.Helper()
	for id, info := range stripesOf(t, v, ino) {
		if info.M != m {
			t.Errorf("inode %d: stripe %x is %d+%d, want %d of parity", ino, id, info.K, info.M, m)
		}
	}
}

// TestDirectoryPolicy places equal content below directories of several
// policies: each file's stripes are of the nearest one, none is shared, and
// recovery brings the policies back.
func TestDirectoryPolicy(t *testing.T) {
	pool := newTestPool(t, 8)
	v := newTestVolume(t, pool, "rs-ratio:4+2,mirror=off")
	data := random(300_000)
	strong := v.mkdir(t, RootIno, "strong")
	below := v.mkdir(t, strong, "below")
	weak := v.mkdir(t, below, "weak")
	late := v.mkdir(t, RootIno, "late")
	v.setPolicy(t, strong, "2+4,mirror=off")
	v.setPolicy(t, weak, "slice:1+1,mirror=off")
	parity := map[Ino]int{}
	for i := range 3 { // in turns, so that several stripes are open at a time
		for dir, m := range map[Ino]int{RootIno: 2, strong: 4, below: 4, weak: 1, late: 2} {
			parity[v.putIn(t, dir, fmt.Sprint(i), data)] = m
		}
	}
	moved := v.putIn(t, RootIno, "moved", data[:1000])
	if err := v.Rename(t.Context(), RootIno, "moved", weak, "moved", 0); err != nil {
		t.Fatal(err)
	}
	linked := v.putIn(t, RootIno, "linked", data[:2000])
	if _, err := v.Link(t.Context(), linked, below, "linked"); err != nil {
		t.Fatal(err)
	}
	parity[moved], parity[linked] = 1, 4
	wait(t, v.Volume)
	owner := map[[16]byte]int{}
	for ino, m := range parity {
		wantParity(t, v.Volume, ino, m)
		for id := range stripesOf(t, v.Volume, ino) {
			if before, ok := owner[id]; ok && before != m {
				t.Errorf("stripe %x has content of two policies", id)
			}
			owner[id] = m
		}
	}

	// A policy holds for what is placed from then on.
	v.setPolicy(t, late, "2+3,mirror=off")
	fresh := v.putIn(t, late, "fresh", random(1000))
	wait(t, v.Volume)
	wantParity(t, v.Volume, fresh, 3)
	if err := v.Close(context.Background()); err != nil {
		t.Fatal(err)
	}

	r := recoverVolume(t, pool, v.words)
	defer func() { r.Close(context.Background()) }()
	for dir, want := range map[Ino]string{
		RootIno: "rs-ratio:4+2,mirror=off", strong: "rs-ratio:2+4,mirror=off", below: "rs-ratio:2+4,mirror=off",
		weak: "slice:1+1,mirror=off", late: "rs-ratio:2+3,mirror=off", moved: "slice:1+1,mirror=off",
	} {
		if got, err := r.Policy(dir); err != nil || got != want {
			t.Errorf("inode %d: policy %q, %v, want %q", dir, got, err, want)
		}
	}
	later := r.putIn(t, below, "later", random(1000))
	wait(t, r.Volume)
	wantParity(t, r.Volume, later, 4)
}

// TestManyPolicies has more policies in turn than stripes may be open.
func TestManyPolicies(t *testing.T) {
	pool := newTestPool(t, 12)
	v := newTestVolume(t, pool, "rs-ratio:4+2,mirror=off")
	defer func() { v.Close(context.Background()) }()
	var dirs []Ino
	for m := range openStripesMax + 3 {
		dirs = append(dirs, v.mkdir(t, RootIno, fmt.Sprint("d", m)))
		v.setPolicy(t, dirs[m], fmt.Sprintf("2+%d,mirror=off", m+1))
	}
	files := map[Ino]int{}
	for i := range 4 {
		for m, dir := range dirs {
			files[v.putIn(t, dir, fmt.Sprint(i), random(5000))] = m + 1
		}
	}
	wait(t, v.Volume)
	for ino, m := range files {
		wantParity(t, v.Volume, ino, m)
	}
}

func TestPolicyAttribute(t *testing.T) {
	pool := newTestPool(t, 6)
	v := newTestVolume(t, pool, "rs-ratio:4+2")
	defer func() { v.Close(context.Background()) }()
	ctx := t.Context()
	dir := v.mkdir(t, RootIno, "dir")
	file := v.putIn(t, dir, "file", []byte("x"))
	want := func(err error, kind Kind) {
		t.Helper()
		if err == nil || KindOf(err) != kind {
			t.Errorf("%v, want %v", err, kind)
		}
	}
	_, err := v.GetXattr(ctx, dir, xattrPolicy)
	want(err, NoAttr)
	want(v.RemoveXattr(ctx, dir, xattrPolicy), NoAttr)
	want(v.SetXattr(ctx, dir, xattrPolicy, []byte("raid:5"), 0), Invalid)
	want(v.SetXattr(ctx, file, xattrPolicy, []byte("4+2"), 0), NotDir)
	want(v.SetXattr(ctx, dir, xattrPolicy, []byte("4+2"), XattrReplace), NoAttr)
	v.setPolicy(t, dir, "2+1")
	want(v.SetXattr(ctx, dir, xattrPolicy, []byte("4+2"), XattrCreate), Exist)
	if got, err := v.GetXattr(ctx, dir, xattrPolicy); err != nil || string(got) != "rs-ratio:2+1" {
		t.Errorf("%q, %v", got, err)
	}
	if names, err := v.ListXattr(ctx, dir); err != nil || len(names) > 0 {
		t.Errorf("listed: %q, %v", names, err)
	}
	v.reopen(t, pool)
	if got, err := v.Policy(file); err != nil || got != "rs-ratio:2+1" {
		t.Errorf("%q, %v", got, err)
	}
	if err := v.RemoveXattr(ctx, dir, xattrPolicy); err != nil {
		t.Error(err)
	}
	if got, err := v.Policy(file); err != nil || got != "rs-ratio:4+2" {
		t.Errorf("after removal: %q, %v", got, err)
	}
}

// TestSmallShards writes chunks and log slices that are larger than a stripe
// of the smallest shards.
func TestSmallShards(t *testing.T) {
	for _, policy := range []string{"slice:1+2,shard=16KiB", "file:1+2,shard=64KiB", "rs-ratio:2+2,shard=16KiB"} {
		t.Run(policy, func(t *testing.T) {
			pool := newTestPool(t, 5)
			v := newTestVolume(t, pool, policy)
			data := append(random(600_000), bytes.Repeat([]byte("compresses "), 60_000)...)
			v.put(t, "file", data)
			for i := range 2000 { // names that make the log longer than one slice
				v.putIn(t, RootIno, fmt.Sprintf("%x", random(100))+fmt.Sprint(i), nil)
			}
			wait(t, v.Volume)
			if err := v.Close(context.Background()); err != nil {
				t.Fatal(err)
			}
			r := recoverVolume(t, pool, v.words)
			defer r.Close(context.Background())
			wantContent(t, r.Volume, "file", data)
		})
	}
}
