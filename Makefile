# `make` shows what there is.
GOLANGCI := $(or $(shell command -v golangci-lint),$(shell go env GOPATH)/bin/golangci-lint)
FUZZTIME ?= 10s
PREFIX   ?= /usr/local

.PHONY: help
help: ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## build bin/defs and bin/defs-mount
	@mkdir -p bin
	go build -o bin/ ./cmd/defs ./cmd/defs-mount

.PHONY: test
test: ## run every test, real mounts included
	./scripts/test

.PHONY: race
race: ## run every test with the race detector
	go test -race -timeout 60m ./...

.PHONY: smoke
smoke: ## the whole path on 14 node processes
	./scripts/start --smoke

.PHONY: lint
lint: ## vet, lint, and the rules that keep the layers apart
	go vet ./...
	$(GOLANGCI) run ./...

.PHONY: fuzz
fuzz: ## run each fuzz target for FUZZTIME (10s)
	@for package in $$(go list ./...); do \
		for target in $$(go test -list '^Fuzz' $$package | grep '^Fuzz'); do \
			echo "$$package $$target"; \
			go test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) $$package || exit 1; \
		done; \
	done

.PHONY: install
install: build ## install for all users, with mount(8)'s helper and the systemd unit
	install -D -t $(DESTDIR)$(PREFIX)/bin bin/defs bin/defs-mount
	install -d $(DESTDIR)/sbin $(DESTDIR)$(PREFIX)/share/bash-completion/completions
	bin/defs completion bash >$(DESTDIR)$(PREFIX)/share/bash-completion/completions/defs
	ln -sf $(PREFIX)/bin/defs-mount $(DESTDIR)/sbin/mount.fuse.defs
	install -D -m 644 packaging/systemd/defs-mount@.service $(DESTDIR)$(PREFIX)/lib/systemd/user/defs-mount@.service
	install -D -m 644 packaging/systemd/defs-node.service $(DESTDIR)$(PREFIX)/lib/systemd/user/defs-node.service

.PHONY: programs
programs: ## real programs inside a mount, each checked by its own results: 20 minutes; as root
	./scripts/programs

.PHONY: damage
damage: ## spoil each file of a volume's local state in each way: 5 minutes
	DEFS_DAMAGE=all go test -count 1 -v -timeout 30m -run TestDamageTable ./volume/

.PHONY: bench
bench: ## measure the stages, and the mount beside the native filesystem: 25 minutes at most; as root for all of it
	go run ./bench

.PHONY: bench-quick
bench-quick: ## the same with small sizes: 3 minutes at most
	go run ./bench -quick

.PHONY: bench-stages
bench-stages: ## measure the stages alone
	go run ./bench -stages

.PHONY: bench-compare
bench-compare: ## compare the stages with those of another commit, in turns: REF=COMMIT
	./scripts/bench-compare $(REF)

WORK ?= sequential
.PHONY: flame
flame: ## CPU profiles of the mount at work (WORK=sequential, a group of the benchmark), shown as a flame graph at :8080
	rm -rf bin/profiles
	go run ./bench -mounts -place memory -groups $(WORK) -profiles bin/profiles
	go tool pprof -http localhost:8080 -no_browser bin/profiles/*.pprof

.PHONY: posix
posix: ## the POSIX suites in every kind of mount, in their long form; writes CONFORMANCE.md; as root
	DEFS_CONFORMANCE_REPORT=$(CURDIR)/CONFORMANCE.md go test -count 1 -v -timeout 60m ./conformance/

N ?= 20
.PHONY: crash
crash: ## crash mounts and nodes in the middle of work, N (20) times each, and print what that has cost
	DEFS_CRASHES=$(N) go test -count 1 -v -timeout 0 -run 'Killed|PowerCut' ./integration/

.PHONY: integration
integration: ## the whole system with real processes, real mounts and faults
	go test -count 1 -v -timeout 15m ./integration/

.PHONY: large
large: ## more than a GiB of random bytes through put and get, and the memory that takes: half a minute
	DEFS_LARGE=1 go test -count 1 -v -timeout 5m -run 'TestLargeFile$$' ./integration/

.PHONY: model
model: ## random operations on a mount beside a reference in memory, with kills and power cuts; OPS=100000, SEED=
	DEFS_MODEL_OPS=$(or $(OPS),100000) DEFS_MODEL_SEED=$(SEED) go test -count 1 -v -timeout 12h -run 'TestModel$$' ./integration/

.PHONY: crash-points
crash-points: ## crash every workload of one and of two calls at each call to the disk; SHARD=2/5 for the second of five parts
	DEFS_CRASH_POINTS=2 DEFS_SHARD=$(SHARD) go test -count 1 -v -timeout 12h -parallel 8 -run 'TestCrashPoints$$' ./volume/

.PHONY: io-errors
io-errors: ## let each call to the disk fail, in every small workload and at every start; SHARD=2/5 for the second of five parts
	DEFS_IO_ERRORS=all DEFS_SHARD=$(SHARD) go test -count 1 -v -timeout 12h -parallel 8 -run 'TestIOErrors' ./volume/

.PHONY: entries
entries: ## fill one directory with COUNT (1,000,000) files, and print times and memory
	DEFS_ENTRIES=$(or $(COUNT),1000000) go test -count 1 -v -timeout 2h -run 'TestManyEntries$$' ./integration/

.PHONY: bias
bias: ## place 10^6 stripes and look for a bias: 2 minutes
	DEFS_PLACEMENTS=1000000 go test -count 1 -v -timeout 30m -run 'NoBias|TellsNothing' ./placement/

.PHONY: durability
durability: ## simulate a year of 1,000 nodes, compare it with the Markov model, write docs/durability.md: 10 minutes
	go run ./sim/durability -seed $(or $(SEED),1) -out docs/durability.md

.PHONY: sim
sim: ## faults in a simulated network of real nodes, and in the model of years; SEED=, ROUNDS=3, NODES=20: 5 minutes
	DEFS_SIM_SEED=$(or $(SEED),1) go test -count 1 -v ./sim/
	DEFS_SIM_SEED=$(or $(SEED),1) DEFS_SIM_ROUNDS=$(or $(ROUNDS),3) DEFS_SIM_NODES=$(or $(NODES),20) \
		go test -count 1 -v -timeout 2h -run 'TestSimulatedFaults$$' ./p2p/

.PHONY: lookup
lookup: ## measure lookups in simulated networks of 20 to 1,000 nodes, write docs/lookup.md and its plot
	DEFS_LOOKUP=$(CURDIR)/docs go test -count 1 -v -timeout 2h -run 'TestLookupFigures$$' ./p2p/

.PHONY: soak
soak: ## 24 node processes under every fault while a mount writes and reads: SOAK=30m, SEED=; as root for partitions
	DEFS_SOAK=$(or $(SOAK),30m) DEFS_SOAK_SEED=$(SEED) go test -count 1 -v -timeout 3h -run 'TestSoak$$' ./integration/

.PHONY: net
net: ## the pool heals itself, is drained and scrubbed, and how long reads take during a repair of 512 MiB: 5 minutes
	DEFS_REPAIR_MIB=512 go test -count 1 -v -timeout 20m -run 'TestPoolRepairsItself|TestReadsDuringRepair|TestDrainAndScrub' ./integration/
