package volume

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/defs-fs/defs/metastore"
)

// checkedTree returns a volume with some of everything, and the inodes of a
// directory and of a file in it.
func checkedTree(t *testing.T) (f fs, dir, file Ino) {
	f = newFS(t)
	dir = f.create(RootIno, "dir", syscall.S_IFDIR|0o755)
	f.create(dir, "inner", syscall.S_IFDIR|0o755)
	f.create(dir, "link", syscall.S_IFLNK|0o777)
	file = f.create(dir, "file", syscall.S_IFREG|0o644)
	_, err := f.Link(f.ctx, file, RootIno, "other name")
	f.ok(err)
	for _, off := range []int64{0, 200_000, 100_000} {
		_, err := f.Write(f.ctx, file, off, bytes.Repeat([]byte("content "), 16<<10), WriteFlags{})
		f.ok(err)
	}
	f.ok(f.Fsync(f.ctx, file))
	return f, dir, file
}

func faults(t *testing.T, v *Volume) (Checked, string) {
	t.Helper()
	var all []string
	checked, err := v.Fsck(context.Background(), func(fault Fault) { all = append(all, fault.Detail) })
	if err != nil {
		t.Fatal(err)
	}
	return checked, strings.Join(all, "\n")
}

func TestFsckFindsNothingWrong(t *testing.T) {
	f, _, _ := checkedTree(t)
	checked, wrong := faults(t, f.Volume)
	if wrong != "" {
		t.Fatal(wrong)
	}
	if checked.Inodes != 5 || checked.Entries != 5 || checked.LocalBytes != 200_000+128<<10 || checked.RemoteBytes != 0 {
		t.Errorf("%+v", checked)
	}
}

func TestFsckFindsFaults(t *testing.T) {
	for _, c := range []struct {
		name  string
		spoil func(t *tx, dir, file Ino) error
		want  string
	}{
		{"dangling entry", func(t *tx, dir, file Ino) error {
			t.AddDirent(dir, metastore.Dirent{Ino: 9999, Type: syscall.DT_REG, Cookie: 77, Name: "dangling"})
			return nil
		}, "leads to inode 9999, which does not exist"},
		{"wrong type", func(t *tx, dir, file Ino) error {
			t.AddDirent(dir, metastore.Dirent{Ino: file, Type: syscall.DT_DIR, Cookie: 77, Name: "typed"})
			return nil
		}, "says type 4"},
		{"wrong link count", func(t *tx, dir, file Ino) error {
			n, err := t.Txn.Inode(file)
			n.Nlink = 7
			t.Txn.PutInode(file, n)
			return err
		}, "the link count is 7, 2 names lead here"},
		{"wrong parent", func(t *tx, dir, file Ino) error {
			n, err := t.Txn.Inode(dir)
			n.Parent = dir
			t.Txn.PutInode(dir, n)
			return err
		}, "says its parent is"},
		{"wrong size of extents", func(t *tx, dir, file Ino) error {
			n, err := t.Txn.Inode(file)
			n.Allocated++
			t.Txn.PutInode(file, n)
			return err
		}, "the inode says 331073"},
		{"unknown stripe", func(t *tx, dir, file Ino) error {
			t.AddExtent(file, metastore.Extent{Off: 1 << 30, Len: 5, HasRemote: true, Remote: metastore.Remote{Stripe: [16]byte{1}, SliceLen: 5, StoredLen: 5}})
			return nil
		}, "which is not known"},
		{"overlap", func(t *tx, dir, file Ino) error {
			t.AddExtent(file, metastore.Extent{Off: 5, Len: 5, HasRemote: true, Remote: metastore.Remote{Stripe: [16]byte{1}, SliceLen: 5, StoredLen: 5}})
			return nil
		}, "overlap"},
		{"lost inode", func(t *tx, dir, file Ino) error {
			t.Txn.PutInode(8888, metastore.Inode{Mode: syscall.S_IFREG | 0o644})
			return nil
		}, "nothing leads here"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f, dir, file := checkedTree(t)
			_, err := f.commit(func(t *tx) error { return c.spoil(t, dir, file) })
			f.ok(err)
			if _, wrong := faults(t, f.Volume); !strings.Contains(wrong, c.want) {
				t.Errorf("no word of %q in %q", c.want, wrong)
			}
		})
	}
}

func TestFsckFindsDamagedBytes(t *testing.T) {
	f, _, _ := checkedTree(t)
	segments, err := filepath.Glob(filepath.Join(f.dir, "journal", "segment-*"))
	if err != nil || len(segments) == 0 {
		t.Fatalf("segments: %v, %v", segments, err)
	}
	b, err := os.ReadFile(segments[0])
	f.ok(err)
	b[100_000] ^= 1 // in the content, which is nearly all of it
	f.ok(os.WriteFile(segments[0], b, 0o600))
	if _, wrong := faults(t, f.Volume); !strings.Contains(wrong, "corrupt") {
		t.Errorf("no word of damage in %q", wrong)
	}
}
