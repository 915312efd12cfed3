# To be sourced by scripts/programs: version control, copies, editors.

program_git() {
	export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1
	export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@localhost GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@localhost
	git -c safe.directory='*' clone -q --no-local "$REPOSITORY" clone
	cd clone
	clean() { [ -z "$(git status --porcelain)" ] || fail "status is not clean: $1"; }
	clean "after the clone"
	local main tree
	main=$(git rev-parse HEAD)
	git checkout -q -b left
	seq 1000 >numbers
	git add .
	git commit -q -m left
	git checkout -q -b right "$main"
	mkdir -p deep/er
	echo right >deep/er/file
	git mv README.md READ.md
	git add .
	git commit -q -m right
	git merge -q -m merged left
	[ -e numbers ] && [ -e deep/er/file ] && [ ! -e README.md ] || fail "the merge lacks a side"
	tree=$(git rev-parse 'HEAD^{tree}')
	git worktree add -q ../tree left
	[ -z "$(git -C ../tree status --porcelain)" ] && [ -e ../tree/numbers ] || fail "the worktree is wrong"
	git worktree remove ../tree
	git gc -q --aggressive --prune=now
	git fsck --full --strict
	git rm -rq .
	git reset -q --hard
	clean "after the reset"
	[ "$(git rev-parse 'HEAD^{tree}')" = "$tree" ] || fail "the tree is another"
	git clone -q --bare . "$out/bare"
	git -C "$out/bare" fsck --full
	# Hard links between repositories of the mount.
	git clone -q . ../local
	git -C ../local fsck --full
}

# sample_tree DIR makes what a copy has to preserve, in a native directory.
sample_tree() {
	mkdir -p "$1"
	local i
	for i in $(seq 300); do
		mkdir -p "$1/d$((i % 17))/s$((i % 3))"
		head -c $((i * i * 5)) /dev/urandom >"$1/d$((i % 17))/s$((i % 3))/file $i"
		chmod "$(printf '%o' $((0400 + i % 256)))" "$1/d$((i % 17))/s$((i % 3))/file $i"
	done
	(
		cd "$1"
		ln "d1/s1/file 1" "d2/hard link"
		ln "d1/s1/file 1" "third name"
		ln -s "../d3/s0/file 3" "d3/symbolic link"
		ln -s missing dangling
		mkfifo fifo
		mknod null c 1 3
		mkdir -m 1777 empty
		truncate -s 3M sparse
		printf x >>sparse
		touch -d 1999-12-31T23:59:59.123456789 "d4/s1/file 4" d4
		chown 12:34 "d5/s2/file 5"
		chown -h 56:78 dangling
		chmod 4755 "d6/s0/file 6" && chmod 2775 d7
		setfacl -m u:12:rwx,g:34:r-x,m::r-x "d8/s2/file 8"
		setfacl -m u:12:rwx -m d:u:56:r-x -m d:g:78:rwx d9
		setfattr -n user.text -v "some text" "d10/s1/file 10"
		setfattr -n user.binary -v 0x00ff0a00 d11
		setfattr -n trusted.secret -v root "d11/s2/file 11"
		printf '\xff\xfe' >"$(printf 'not \xff utf-8\n')"
		touch d12
	)
}

# same A B compares two trees in all that rsync knows.
same() {
	local differences
	differences=$(rsync -naHAXc --delete --itemize-changes "$1/" "$2/")
	[ -z "$differences" ] || fail "$1 and $2 differ: $(head -n 20 <<<"$differences")"
}

# attributes DIR prints ACLs and extended attributes, by the tools of their own.
attributes() { (cd "$1" && find . -print0 | sort -z | xargs -0 getfacl -Pn && find . -print0 | sort -z | xargs -0 getfattr -hd -m - -e hex); }

program_rsync() {
	sample_tree "$out/tree"
	rsync -aHAXS "$out/tree/" copy/
	same "$out/tree" copy
	[ "$(attributes "$out/tree")" = "$(attributes copy)" ] || fail "ACLs or attributes differ"
	rsync -aHAXS copy/ "$out/back/"
	same "$out/tree" "$out/back"
	# A change of one file is all that a second run carries.
	echo more >>"$out/tree/d0/s0/file 255"
	[ "$(rsync -aHAXi --inplace "$out/tree/" copy/ | grep -c '^>f')" = 1 ] || fail "a second run carries too much"
	same "$out/tree" copy
}

program_tar() {
	sample_tree "$out/tree"
	mkdir in "$out/back"
	tar -C "$out/tree" --xattrs --xattrs-include='*' --acls -S -cf - . | tar -C in --xattrs --xattrs-include='*' --acls -xpf -
	same "$out/tree" in
	[ "$(attributes "$out/tree")" = "$(attributes in)" ] || fail "ACLs or attributes differ"
	tar -C in --xattrs --xattrs-include='*' --acls -S -cf archive.tar .
	tar -C "$out/back" --xattrs --xattrs-include='*' --acls -xpf archive.tar
	same "$out/tree" "$out/back"
	tar -C in --compare -f archive.tar
}

program_vim() {
	local setting i
	for setting in 'backupcopy=no' 'backupcopy=yes' 'backupcopy=auto'; do
		printf 'line %d\n' $(seq 200) >text
		for i in $(seq 20); do
			vim -Nu NONE -es -c "set $setting backupskip= backup writebackup swapfile undofile fsync" -c "${i}s/line/LINE/" -c 'write' -c quit text
		done
		[ "$(grep -c LINE text)" = 20 ] && [ "$(wc -l <text)" = 200 ] || fail "$setting: the text is wrong"
		[ "$(grep -c LINE text~)" = 19 ] || fail "$setting: the backup is wrong"
		[ -s .text.un~ ] || fail "$setting: no undo file"
		[ ! -e .text.swp ] || fail "$setting: the swap file was left"
		vim -Nu NONE -es -c "set $setting undofile" -c 'undo' -c 'write' -c quit text
		[ "$(grep -c LINE text)" = 19 ] || fail "$setting: undo after reopening"
		rm -f text text~ .text.un~
	done
}

# Saving as LibreOffice and GTK do: a lock file, a temporary file that is
# flushed, a backup, a rename. A reader sees a whole version at any moment.
program_rename() {
	head -c 100000 /dev/zero | tr '\0' 0 >document
	(
		while [ ! -e stop ]; do
			content=$(cat document)
			[ ${#content} = 100000 ] && [ -z "${content//${content:0:1}/}" ] || { echo "a torn version was seen" >&2; exit 1; }
		done
	) &
	local reader=$! i
	for i in $(seq 100); do
		set -o noclobber
		echo "user,host,$i" >'.~lock.document#'
		set +o noclobber
		head -c 100000 /dev/zero | tr '\0' $((i % 10)) >lu$$.tmp
		chmod --reference=document lu$$.tmp
		sync lu$$.tmp
		ln -f document document.bak
		mv -T lu$$.tmp document
		sync .
		rm '.~lock.document#'
		[ "$(head -c 1 document)$(head -c 1 document.bak)" = "$((i % 10))$(((i - 1) % 10))" ] || fail "round $i: a wrong version"
	done
	touch stop
	wait "$reader"
	[ "$(ls -A)" = "$(printf 'document\ndocument.bak\nstop')" ] || fail "left over: $(ls -A)"
}
