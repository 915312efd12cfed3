# To be sourced by scripts/programs: compilers and package managers.

program_go() {
	local modules
	modules=$(go env GOMODCACHE)/cache/download
	cp -r "$REPOSITORY"/{go.mod,go.sum,chunker,erasure,placement,cache,metastore} .
	mkdir tmp
	export GOCACHE=$PWD/build GOMODCACHE=$PWD/modules GOTMPDIR=$PWD/tmp GOFLAGS='-modcacherw -p=2' GOPROXY
	GOPROXY=file://$modules,$(go env GOPROXY)
	go build ./chunker ./erasure ./placement ./cache ./metastore
	go test -short ./chunker ./placement
	go mod verify
	# The cache answers: nothing is compiled again.
	[ -z "$(go build -v ./chunker ./erasure ./placement ./cache ./metastore 2>&1)" ] || fail "the second build compiled something"
	chmod -R u+w .
}

# Deadlines on files that no poller watches cannot work in any FUSE mount.
program_gotest() {
	mkdir tmp
	TMPDIR=$PWD/tmp go test -count 1 -skip '^TestNonpollableDeadline$' os path/filepath io/fs
}

program_npm() {
	export npm_config_cache=$PWD/cache npm_config_audit=false npm_config_fund=false npm_config_update_notifier=false
	mkdir app
	cd app
	npm init -y >/dev/null
	npm install --no-progress typescript@5 webpack@5 eslint@8 @babel/core@7 @babel/preset-env@7 express@4
	npm ls --all >/dev/null
	local files
	files=$(find node_modules -type f | wc -l)
	[ "$files" -gt 5000 ] || fail "only $files files"
	echo 'const n: number = [1, 2, 3].reduce((a, b) => a + b); console.log(n)' >sum.ts
	npx tsc sum.ts
	[ "$(node sum.js)" = 6 ] || fail "the compiled program is wrong"
	node -e 'require("webpack"); require("@babel/core"); require("express")'
	# What the cache in the mount gives elsewhere is the same.
	mkdir "$out/app"
	cp package.json package-lock.json "$out/app"
	(cd "$out/app" && npm ci --prefer-offline --no-progress)
	diff -r --no-dereference node_modules "$out/app/node_modules"
}

program_make() {
	local i
	export CCACHE_DIR=$PWD/ccache
	mkdir src
	cd src
	for i in $(seq 60); do
		printf '#include "all.h"\nint f%d(void) { return %d; }\n' "$i" "$i" >f$i.c
		echo "int f$i(void);" >>all.h
	done
	printf '#include <stdio.h>\n#include "all.h"\nint main(void) { printf("%%d\\n", f1() + f60()); return 0; }\n' >main.c
	printf 'OBJECTS = $(patsubst %%.c,%%.o,$(wildcard *.c))\nprogram: $(OBJECTS)\n\tgcc -o $@ $^\n%%.o: %%.c all.h\n\tccache gcc -c -o $@ $<\n' >Makefile
	make -s -j 2
	[ "$(./program)" = 61 ] || fail "the program is wrong"
	[ "$(make)" = "make: 'program' is up to date." ] || fail "make would build again"
	sleep 0.01
	touch f7.c
	[ "$(make | grep -c 'gcc -c')" = 1 ] || fail "make did not build just what changed"
	rm -f ./*.o
	make -s -j 2
	[ "$(./program)" = 61 ] || fail "the program of the second build is wrong"
	ccache -s -v | tee stats
	[ "$(ccache --print-stats | awk '/^(direct|preprocessed)_cache_hit/ { n += $2 } END { print n }')" -ge 61 ] || fail "the cache had no hits"
	# find and du agree with a native copy.
	cp -a . "$out/native"
	[ "$(find . -name '*.c' -newer Makefile | wc -l)" = "$(find "$out/native" -name '*.c' -newer "$out/native/Makefile" | wc -l)" ] || fail "find -newer"
	[ "$(find . -type f -printf '%s %m %p\n' | sort)" = "$(cd "$out/native" && find . -type f -printf '%s %m %p\n' | sort)" ] || fail "find -printf"
	[ "$(find . -type f -print0 | du -bc --files0-from=- | tail -n 1)" = "$(cd "$out/native" && find . -type f -print0 | du -bc --files0-from=- | tail -n 1)" ] || fail du
}
