# To be sourced by scripts/programs: programs that make load and check it.

program_fio() {
	local engine pattern direct
	for engine in psync libaio mmap; do
		for pattern in write randwrite randrw; do
			direct=0
			[ "$engine" != libaio ] || direct=1
			fio --name="$engine-$pattern" --filename="$engine-$pattern" --size=64m --ioengine="$engine" --rw="$pattern" --bs=4k,16k,4k \
				--iodepth=8 --direct=$direct --verify=crc32c --verify_fatal=1 --do_verify=1 --fsync=256 --minimal >/dev/null
			# Again from what is there, by another process.
			fio --name="$engine-$pattern" --filename="$engine-$pattern" --size=64m --ioengine=psync --rw=write --bs=16k \
				--verify=crc32c --verify_fatal=1 --do_verify=1 --minimal >/dev/null
		done
	done
}

program_stress_ng() {
	local code=0
	# 3 says that a stressor does not run on this kernel or file system.
	stress-ng --class filesystem --sequential 1 --timeout 2s --verify --temp-path "$PWD" --skip-silent --metrics-brief || code=$?
	[ "$code" -eq 0 ] || [ "$code" -eq 3 ] || fail "exit code $code"
}

program_dbench() { dbench -t 20 -D "$PWD" 4; }

program_bonnie__() { bonnie++ -f -u root -d "$PWD" -s 256 -r 128 -n 4; }

program_postmark() {
	printf 'set location %s\nset number 2000\nset subdirectories 20\nset transactions 5000\nrun\nquit\n' "$PWD" | postmark | tee "$out/report"
	grep -q 'transactions (' "$out/report" || fail "no report"
	! grep -qi 'error\|cannot' "$out/report" || fail "errors in the report"
	[ -z "$(find . -type f)" ] || fail "files are left"
}
