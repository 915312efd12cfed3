# To be sourced by scripts/programs: programs that keep two folders the same,
# one in the mount, one outside.

program_unison() {
	export UNISON=$out/state
	mkdir here "$out/there"
	both() { unison -batch -auto -times -perms -1 -ui text "$PWD/here" "$out/there"; }
	cp -r "$REPOSITORY"/{chunker,erasure} here
	both
	diff -r here "$out/there"
	# Both sides change.
	echo here >here/chunker/new
	rm here/erasure/doc.go
	mv here/chunker/fixed.go here/chunker/moved.go
	echo there >"$out/there/erasure/new"
	echo more >>"$out/there/chunker/chunker.go"
	both
	diff -r here "$out/there"
	[ "$(cat here/erasure/new)" = there ] && [ "$(cat "$out/there/chunker/new")" = here ] && [ ! -e "$out/there/erasure/doc.go" ] && [ -e "$out/there/chunker/moved.go" ] ||
		fail "a change is missing"
	both 2>&1 | grep -q 'Nothing to do' || fail "a third run finds something"
}

program_syncthing() {
	local side ids=()
	syncthings=() # not local: the trap needs it
	mkdir folder "$out/folder" "$out/1" "$out/2"
	local folders=("$PWD/folder" "$out/folder") gui=(18384 18385) listen=(22100 22101)
	trap 'kill "${syncthings[@]}"; wait' EXIT
	api() { curl -sf --max-time 10 -H 'X-API-Key: programs' "${@:3}" "http://127.0.0.1:${gui[$1]}/rest/$2"; }
	for side in 0 1; do
		syncthing generate --no-default-folder --home "$out/$((side + 1))" >/dev/null
		ids+=("$(syncthing --home "$out/$((side + 1))" --device-id)")
		# Nothing but loopback.
		sed -i -e 's|<globalAnnounceEnabled>true|<globalAnnounceEnabled>false|; s|<localAnnounceEnabled>true|<localAnnounceEnabled>false|' \
			-e 's|<relaysEnabled>true|<relaysEnabled>false|; s|<natEnabled>true|<natEnabled>false|; s|<crashReportingEnabled>true|<crashReportingEnabled>false|' \
			-e "s|<listenAddress>default|<listenAddress>tcp://127.0.0.1:${listen[$side]}|; s|<urAccepted>0|<urAccepted>-1|" \
			-e 's|<startBrowser>true|<startBrowser>false|' "$out/$((side + 1))/config.xml"
		STNOUPGRADE=1 syncthing serve --no-browser --no-restart --home "$out/$((side + 1))" --gui-address "http://127.0.0.1:${gui[$side]}" --gui-apikey programs >"$out/log$side" 2>&1 &
		syncthings+=($!)
	done
	for side in 0 1; do
		for _ in $(seq 300); do api $side system/ping >/dev/null && break; sleep 0.2; done
		api $side config/devices -X POST -d "{\"deviceID\": \"${ids[$((1 - side))]}\", \"addresses\": [\"tcp://127.0.0.1:${listen[$((1 - side))]}\"]}"
		api $side config/folders -X POST -d "{\"id\": \"f\", \"path\": \"${folders[$side]}\", \"fsWatcherEnabled\": true, \"fsWatcherDelayS\": 1, \"rescanIntervalS\": 3600,
			\"devices\": [{\"deviceID\": \"${ids[0]}\"}, {\"deviceID\": \"${ids[1]}\"}]}"
	done
	# settled waits until both folders hold the same, which only the watchers can bring about.
	settled() {
		for _ in $(seq 450); do
			if diff -r -x .stfolder folder "$out/folder" >"$out/differences" 2>&1; then return; fi
			sleep 0.2
		done
		fail "$1 did not arrive: $(head -n 5 "$out/differences")"
	}
	for side in 0 1; do
		for _ in $(seq 300); do [ -e "${folders[$side]}/.stfolder" ] && break; sleep 0.2; done
	done
	cp -r "$REPOSITORY"/{chunker,erasure} folder
	head -c 5000000 /dev/urandom >folder/large
	settled "what was copied into the mount"
	[ -e "$out/folder/chunker/chunker.go" ] || fail "nothing was copied"
	cp -r "$REPOSITORY/placement" "$out/folder"
	echo more >>"$out/folder/chunker/chunker.go"
	settled "what was written outside"
	[ -e folder/placement/choose.go ] && [ "$(tail -n 1 folder/chunker/chunker.go)" = more ] || fail "the change went the wrong way"
	mv folder/erasure folder/renamed
	rm folder/large
	printf x | dd of=folder/placement/doc.go bs=1 seek=10 conv=notrunc status=none
	settled "rename, removal and change in the mount"
	[ -e "$out/folder/renamed/doc.go" ] && [ ! -e "$out/folder/large" ] || fail "the change went the wrong way"
	rm -r "$out/folder/renamed"
	settled "removal outside"
	[ ! -e folder/renamed ] || fail "what was removed is back"
}
