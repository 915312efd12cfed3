package integration

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// apart runs a shell script as root in a mount namespace of its own, where it
// may change what the machine offers to users: nothing of it stays. $DEFS and
// $MOUNT are the programs, $W is an empty directory that everybody may enter.
func apart(t *testing.T, script string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root can make a mount namespace and become another user")
	}
	dir, err := os.MkdirTemp("/tmp", "defs-apart-") // the run's own directory is closed to other users
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"defs", "defs-mount"} {
		run(t, time.Minute, "install", "-m", "755", program(name), dir)
	}
	// A mount's process outlives the script where that fails: its mount goes with the namespace, and then it ends.
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "bash", "-Eeuo", "pipefail", "-c", `
		DEFS=$W/defs MOUNT=$W/defs-mount
		fail() { echo "$*"; exit 1; }
		trap 'echo "failed: $BASH_COMMAND"' ERR
		cd "$W"
		`+script)
	cmd.Env = append(environment(), "W="+dir, "HOME="+dir, "XDG_CONFIG_HOME="+dir+"/none", "XDG_DATA_HOME="+dir+"/none", "XDG_STATE_HOME="+dir+"/none")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

// TestFstab mounts by lines of an fstab, through mount(8) and its helper.
func TestFstab(t *testing.T) {
	apart(t, `
		mkdir helper mnt
		cp defs-mount helper/mount.fuse.defs
		mount -t overlay -o lowerdir=$W/helper:/usr/sbin overlay /usr/sbin
		closed() { timeout 20 flock "$W/volume/lock" true || fail "the volume is still open"; }
		$DEFS init t --data "$W/volume" >/dev/null 2>&1
		echo "$W/volume $W/mnt fuse.defs defaults,noauto,nofail,_netdev,x-systemd.automount,comment=x,allow_other 0 0" >fstab
		mount -T fstab "$W/mnt"
		echo content >mnt/file
		install -m 4755 /usr/bin/id mnt/id
		mknod mnt/null c 1 3
		chmod 666 mnt/null
		echo x >mnt/null
		[ "$(runuser -u nobody -- cat mnt/file)" = content ] || fail "another user cannot read"
		[ "$(runuser -u nobody -- mnt/id -un)" = root ] || fail "set-user-ID does not work"
		! mount -T fstab "$W/mnt" 2>message || fail "mounted twice"
		grep -q 'mounted at' message || fail "$(cat message)"
		mount -a -O no_such_option -T fstab

		# The kernel changes a mount, the helper says how.
		! mount -o remount,ro "$W/mnt" 2>message || fail "remounted"
		grep -q 'mount -i -o remount,ro' message || fail "$(cat message)"
		mount -i -o remount,ro "$W/mnt"
		! touch mnt/new 2>/dev/null || fail "written to after the remount"
		mount -i -o remount,rw "$W/mnt"
		touch mnt/new
		umount "$W/mnt"
		closed

		sed -i 's/defaults,noauto/ro,noatime,nosuid,nodev,noexec,default_permissions/' fstab
		mount -a -T fstab
		mount -a -T fstab # what is mounted stays
		[ "$(grep -c " $W/mnt " /proc/self/mountinfo)" = 1 ] || fail "mounted twice"
		grep " $W/mnt ro,nosuid,nodev,noexec,noatime - fuse.defs $W/volume " /proc/self/mountinfo || fail "$(grep mnt /proc/self/mountinfo)"
		[ "$(cat mnt/file)" = content ] || fail "no content"
		! touch mnt/other 2>message || fail "written to"
		grep -q 'Read-only' message || fail "$(cat message)"
		! mnt/id 2>/dev/null || fail "executed"
		! echo x 2>/dev/null >mnt/null || fail "a device was opened"
		umount "$W/mnt"
		closed

		sed -i 's/noatime/noatimes/' fstab
		! mount -T fstab "$W/mnt" 2>message || fail "mounted with a wrong option"
		grep -q 'did you mean "noatime"' message || fail "$(cat message)"`)
}

// TestUserMount mounts as an ordinary user, alone and for others.
func TestUserMount(t *testing.T) {
	apart(t, `
		mknod fuse c 10 229
		chmod 666 fuse
		mount --bind fuse /dev/fuse
		touch fuse.conf
		[ -e /etc/fuse.conf ] || touch /etc/fuse.conf
		mount --bind fuse.conf /etc/fuse.conf
		mkdir home
		chown nobody home
		as() { (cd home && runuser -u nobody -- "$@"); }
		as "$DEFS" init t --data "$W/home/volume" >/dev/null 2>&1
		as mkdir mnt
		start() { as "$MOUNT" t "$W/home/mnt" --data "$W/home/volume" --daemon "$@"; }
		start
		grep " $W/home/mnt rw,nosuid,nodev" /proc/self/mountinfo || fail "$(grep mnt /proc/self/mountinfo)"
		as sh -c 'echo content >mnt/file && chmod 644 mnt/file && ln -s file mnt/link && [ "$(cat mnt/link)" = content ]'
		! as chown root mnt/file 2>/dev/null || fail "a user gave a file away"
		! cat home/mnt/file 2>/dev/null || fail "root looked into the mount of a user"
		as "$DEFS" umount mnt
		! start -o allow_other 2>message || fail "shared without leave"
		grep -q user_allow_other message || fail "$(cat message)"
		echo user_allow_other >fuse.conf
		start -o allow_other
		[ "$(cat home/mnt/file)" = content ] || fail "not shared"

		# A mount whose process was killed is cleaned by the next mount and by the doctor.
		killed() {
			kill -KILL "$(pgrep -f -- "--data $W/home/volume --daemon")"
			timeout 20 flock home/volume/lock true
			! as ls mnt >/dev/null 2>message || fail "a dead mount answers"
		}
		killed
		start
		[ "$(as cat mnt/file)" = content ]
		killed
		as "$DEFS" doctor --data "$W/home/volume" >report || true
		grep -q 'failed *mounts *[1-9]' report || fail "$(cat report)"
		as "$DEFS" doctor --data "$W/home/volume" --fix >report || true
		grep -q 'fixed *mounts *1 ' report || fail "$(cat report)"
		! grep " $W/home/mnt " /proc/self/mountinfo || fail "the dead mount is still there"
		start
		killed
		as "$DEFS" umount mnt
		! grep " $W/home/mnt " /proc/self/mountinfo || fail "the dead mount is still there"`)
}

// TestNotify is what systemd sees of the units with Type=notify: the service is
// ready when the mount answers, a signal unmounts it.
func TestNotify(t *testing.T) {
	dir := t.TempDir()
	socket, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Net: "unixgram", Name: filepath.Join(dir, "notify")})
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	next := func() string {
		t.Helper()
		buf := make([]byte, 256)
		if err := socket.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		n, err := socket.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(buf[:n]))
	}
	data, mnt := filepath.Join(dir, "volume"), filepath.Join(dir, "mnt")
	run(t, time.Minute, program("defs"), "init", "t", "--data", data)
	ticket := filepath.Join(dir, "ticket")
	if err := os.WriteFile(ticket, []byte(run(t, time.Minute, program("defs"), "ticket", "--data", data)), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(mnt, 0o700); err != nil {
		t.Fatal(err)
	}
	notify := "NOTIFY_SOCKET=" + socket.LocalAddr().String()
	node := spawn(t, "node", filepath.Join(dir, "node.log"), "env", notify,
		program("defs"), "node", "--data", filepath.Join(dir, "node"), "--join", "@"+ticket, "--listen", "/ip4/127.0.0.1/tcp/0")
	if said := next(); said != "READY=1" {
		t.Fatalf("the node says %q", said)
	}
	if _, err := os.Stat(filepath.Join(dir, "node", "addrs")); err != nil {
		t.Errorf("ready, but: %v", err)
	}
	mount := spawn(t, "mount", filepath.Join(dir, "mount.log"), "env", notify, program("defs-mount"), "t", mnt, "--data", data)
	if said := next(); said != "READY=1" {
		t.Fatalf("the mount says %q", said)
	}
	if err := os.WriteFile(filepath.Join(mnt, "file"), []byte("x"), 0o600); err != nil {
		t.Errorf("ready, but: %v", err)
	}
	for _, p := range []*process{mount, node} {
		p.signal(syscall.SIGTERM)
		if said := next(); said != "STOPPING=1" {
			t.Errorf("%s says %q after SIGTERM", p.name, said)
		}
		p.waitEnd(time.Minute)
		if code := p.cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("%s ended with code %d: %s", p.name, code, p.tail())
		}
	}
	if table, err := os.ReadFile("/proc/self/mountinfo"); err != nil || strings.Contains(string(table), fmt.Sprintf(" %s ", mnt)) {
		t.Errorf("still mounted, %v", err)
	}
}

// TestMountInOtherNamespace: a copy of the mount in another mount namespace,
// such as that of a service, does not keep the process after a signal or an
// unmount, nor what was written in it.
func TestMountInOtherNamespace(t *testing.T) {
	apart(t, `
		mknod fuse c 10 229
		chmod 666 fuse
		mount --bind fuse /dev/fuse
		mkfifo there
		mkdir mnt home
		chown nobody home
		as() { (cd home && runuser -u nobody -- "$@"); }
		as mkdir mnt
		$DEFS init t --data "$W/volume" >/dev/null 2>&1
		as "$DEFS" init t --data "$W/home/volume" >/dev/null 2>&1
		copy() {
			unshare --mount --propagation private sh -c 'echo >there; exec sleep 300' >/dev/null 2>&1 &
			copy=$!
			read <there
		}
		ended() {
			timeout 20 flock "$1/lock" true || fail "the process of $1 goes on"
			[ "$(cat /proc/$copy/comm)" = sleep ] || fail "the copy has gone"
			kill $copy
			! wait $copy
		}
		for how in signal umount; do
			"$MOUNT" t "$W/mnt" --data "$W/volume" --daemon
			echo $how >>mnt/file
			copy
			if [ $how = signal ]; then pkill -TERM -f -- "$W/mnt --data $W/volume --daemon"; else "$DEFS" umount mnt; fi
			ended volume
			as "$MOUNT" t "$W/home/mnt" --data "$W/home/volume" --daemon
			as sh -c "echo $how >>mnt/file"
			copy
			if [ $how = signal ]; then pkill -TERM -f -- "$W/home/mnt --data $W/home/volume --daemon"; else as "$DEFS" umount mnt; fi
			ended home/volume
		done
		"$MOUNT" t "$W/mnt" --data "$W/volume" --daemon
		as "$MOUNT" t "$W/home/mnt" --data "$W/home/volume" --daemon
		[ "$(cat mnt/file | xargs)" = "signal umount" ] || fail "$(cat mnt/file)"
		[ "$(as cat mnt/file | xargs)" = "signal umount" ] || fail "of the user: $(as cat mnt/file)"
		"$DEFS" umount mnt
		as "$DEFS" umount mnt`)
}
