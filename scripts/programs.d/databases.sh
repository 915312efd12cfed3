# To be sourced by scripts/programs: databases.

# sqlite_load prints the statements of one round: inserts, an index, updates,
# deletes, a join, blobs, a vacuum. They do the same in each database.
sqlite_load() {
	cat <<'END'
CREATE TABLE a (i INTEGER PRIMARY KEY, n INTEGER, t TEXT);
CREATE TABLE b (i INTEGER PRIMARY KEY, v BLOB);
BEGIN;
WITH RECURSIVE s(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM s WHERE i < 50000)
INSERT INTO a SELECT i, i * 7919 % 100003, 'text of row ' || i FROM s;
COMMIT;
CREATE INDEX a_n ON a (n);
WITH RECURSIVE s(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM s WHERE i < 300)
INSERT INTO b SELECT i, zeroblob(i * 97) FROM s;
END
	local i
	for i in $(seq 60); do
		echo "UPDATE a SET t = t || '+$i' WHERE n BETWEEN $((i * 1600)) AND $((i * 1600 + 90));"
		echo "INSERT INTO a VALUES ($((100000 + i)), $i, hex($i));"
	done
	cat <<'END'
BEGIN; DELETE FROM a WHERE i % 7 = 0; ROLLBACK;
DELETE FROM a WHERE i % 5 = 0;
UPDATE b SET v = zeroblob(length(v) * 2) WHERE i IN (SELECT n % 300 FROM a WHERE n < 1000);
ALTER TABLE a ADD COLUMN more DEFAULT 'x';
VACUUM;
END
}

program_sqlite() {
	local mode i killed
	for mode in wal delete truncate persist; do
		for at in "$PWD" "$out"; do
			(echo "PRAGMA journal_mode = $mode; PRAGMA synchronous = FULL;"; sqlite_load) | sqlite3 -bail "$at/$mode.db" >/dev/null
		done
		[ "$(sqlite3 $mode.db 'PRAGMA integrity_check')" = ok ] || fail "$mode: integrity"
		[ "$(sqlite3 $mode.db .dump | sha256sum)" = "$(sqlite3 "$out/$mode.db" .dump | sha256sum)" ] || fail "$mode: not what the native one holds"
		# Three writers at a time, one of which is killed again and again.
		sqlite3 $mode.db 'CREATE TABLE c (w INTEGER, i INTEGER)'
		for w in 1 2; do
			for i in $(seq 60); do echo "INSERT INTO c VALUES ($w, $i);"; done | sqlite3 -bail -cmd '.timeout 60000' $mode.db &
		done
		for killed in $(seq 5); do
			(while true; do echo "INSERT INTO c VALUES (3, $killed);"; done) | sqlite3 -cmd '.timeout 60000' $mode.db >/dev/null 2>&1 &
			sleep 0.3
			kill -9 $! && { wait $! || true; } 2>/dev/null
		done
		while [ "$(jobs -r | wc -l)" -gt 0 ]; do sleep 0.1; done
		[ "$(sqlite3 -cmd '.timeout 60000' $mode.db 'PRAGMA integrity_check; SELECT count(*) FROM c WHERE w < 3')" = "$(printf 'ok\n120')" ] || fail "$mode: writers at a time"
	done
}

program_postgresql() {
	local bin port=5432 logged kept i
	bin=$(ls -d /usr/lib/postgresql/*/bin | sort -V | tail -n 1)
	mkdir -m 700 data
	mkdir "$out/run"
	chown postgres data "$out" "$out/run"
	pg() { (cd "$out" && runuser -u postgres -- "$@"); }
	sql() { pg "$bin/psql" -h "$out/run" -p $port -qAt -v ON_ERROR_STOP=1 bench -c "$1"; }
	local data=$PWD/data
	start() { pg "$bin/pg_ctl" -s -w -t 120 -D "$data" -l "$out/log" -o "-k $out/run -p $port -h ''" start; }
	trap "runuser -u postgres -- '$bin/pg_ctl' -s -m immediate -D '$data' stop || true" EXIT
	pg "$bin/initdb" -k -A trust -D "$data"
	start
	pg "$bin/createdb" -h "$out/run" -p $port bench
	pg "$bin/pgbench" -h "$out/run" -p $port -i -q -s 3 bench
	pg "$bin/pgbench" -h "$out/run" -p $port -c 4 -j 2 -T 8 bench
	for i in 1 2 3; do
		sql 'TRUNCATE pgbench_history; UPDATE pgbench_accounts SET abalance = 0; UPDATE pgbench_branches SET bbalance = 0; UPDATE pgbench_tellers SET tbalance = 0'
		pg "$bin/pgbench" -h "$out/run" -p $port -c 4 -j 2 -T 60 -l --log-prefix="$out/transactions$i" bench &
		sleep 4
		# All of it at once, as by the kernel.
		local master
		master=$(head -n 1 data/postmaster.pid)
		kill -STOP "$master" # or it starts others
		pkill -KILL -P "$master"
		kill -KILL "$master"
		wait $! || true
		# The dead may hold the shared memory for a moment longer.
		for _ in $(seq 30); do
			if start; then break; fi
			sleep 1
		done
		# What was acknowledged is there, and the sums agree.
		logged=$(cat "$out/transactions$i"* | wc -l)
		kept=$(sql 'SELECT count(*) FROM pgbench_history')
		[ "$logged" -gt 0 ] || fail "no transaction before the kill"
		[ "$kept" -ge "$logged" ] || fail "$kept transactions are there, $logged were acknowledged"
		[ "$(sql 'SELECT count(*) FROM (SELECT (SELECT sum(abalance) FROM pgbench_accounts) a, (SELECT sum(bbalance) FROM pgbench_branches) b,
			(SELECT sum(tbalance) FROM pgbench_tellers) t, (SELECT sum(delta) FROM pgbench_history) h) s WHERE a = b AND b = t AND t = h')" = 1 ] || fail "the sums differ"
		echo "killed and recovered: $logged acknowledged, $kept there"
	done
	pg "$bin/vacuumdb" -h "$out/run" -p $port -q --full --analyze bench
	pg "$bin/pg_amcheck" -h "$out/run" -p $port --install-missing --heapallindexed bench
	pg "$bin/pg_ctl" -s -m fast -D "$data" stop
	trap - EXIT
	pg "$bin/pg_checksums" --check -D "$data"
}
