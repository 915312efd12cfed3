package volume

import (
	"context"
	"errors"

	"github.com/defs-fs/defs/erasure"
	"github.com/defs-fs/defs/metastore"
)

// xattrPolicy is the attribute of a directory that says how the content of the files below it is coded, in the form of
// `defs init --policy`.
const xattrPolicy = "user.defs.policy"

// setPolicy makes text the policy of a directory; nil takes it away. It holds for what is placed from then on.
func (v *Volume) setPolicy(ctx context.Context, dir Ino, text []byte) error {
	var policy string
	if text != nil {
		parsed, err := erasure.ParsePolicy(string(text))
		if err != nil {
			v.log.Warn("the policy of a directory is not set", "inode", dir, "err", err)
			return Invalid
		}
		policy = parsed.String()
	}
	if err := v.waitRoom(ctx, recordBytes); err != nil {
		return err
	}
	_, err := v.commit(func(t *tx) error {
		n, err := t.inode(dir)
		switch {
		case err == NotExist:
			return Stale
		case err != nil:
			return err
		case !isDir(n.Mode):
			return NotDir
		case text == nil && n.Policy == "":
			return NoAttr
		}
		n.Policy, n.Ctime = policy, t.now
		t.putInode(dir, n)
		return nil
	})
	return err
}

// ownPolicy returns what setPolicy set; NoAttr where it did not.
func (v *Volume) ownPolicy(_ context.Context, dir Ino) ([]byte, error) {
	n, err := v.existing(dir)
	if err == nil && n.Policy == "" {
		err = NoAttr
	}
	return []byte(n.Policy), err
}

// Policy returns the policy by which new content of an inode is placed: that of the nearest directory above that has
// one, else the volume's.
func (v *Volume) Policy(ino Ino) (string, error) {
	if v.network == nil {
		return "", wrap("policy", ino, NotSupported)
	}
	policy, err := policyOf(v.db, ino)
	if err != nil {
		return "", wrap("policy", ino, err)
	}
	if policy == "" {
		policy = v.network.publisher.policy.String()
	}
	return policy, nil
}

// policyOf returns the policy of ino or of the nearest directory above that has one; "" where none has.
func policyOf(tree metastore.Reader, ino Ino) (string, error) {
	for {
		n, err := tree.Inode(ino)
		if errors.Is(err, metastore.ErrNotFound) {
			return "", nil // the directory of a name that is gone
		}
		if err != nil || n.Policy != "" || n.Parent == 0 || ino == RootIno {
			return n.Policy, err
		}
		ino = n.Parent
	}
}

// policiesMax bounds the directories whose policy a flusher remembers.
const policiesMax = 4096

// policy returns the policy by which a file's content is placed, as of the cut.
func (f *flusher) policy(ino Ino) (erasure.Policy, error) {
	n, err := f.cut.Inode(ino)
	if err != nil {
		return erasure.Policy{}, err
	}
	if policy, ok := f.policies[n.Parent]; ok {
		return policy, nil
	}
	text, err := policyOf(f.cut, n.Parent)
	if err != nil {
		return erasure.Policy{}, err
	}
	policy := f.p.policy
	if text != "" {
		if policy, err = erasure.ParsePolicy(text); err != nil {
			return policy, err
		}
	}
	if len(f.policies) >= policiesMax {
		clear(f.policies)
	}
	f.policies[n.Parent] = policy
	return policy, nil
}
