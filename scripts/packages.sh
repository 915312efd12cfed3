# To be sourced: functions that install what is missing.

# need COMMAND PACKAGE ... installs, on Debian and its kin, the packages whose
# command is not there.
need() {
	local missing=()
	while [ $# -gt 1 ]; do
		PATH="$PATH:/usr/sbin:/sbin" command -v "$1" >/dev/null || missing+=("$2")
		shift 2
	done
	[ ${#missing[@]} -eq 0 ] && return
	local admin=()
	if [ "$(id -u)" -ne 0 ]; then
		command -v sudo >/dev/null || fail "install these packages first: ${missing[*]}"
		admin=(sudo)
	fi
	echo "Installing ${missing[*]} ..."
	"${admin[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null 2>&1 || {
		"${admin[@]}" apt-get update -qq
		"${admin[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
	}
}

# need_go finds Go, also where its installer puts it.
need_go() {
	command -v go >/dev/null || PATH="$PATH:/usr/local/go/bin"
	command -v go >/dev/null || fail "Go is not installed: see https://go.dev/doc/install (version 1.26 or newer)"
}

fail() {
	echo "$(basename "$0"): $*" >&2
	exit 1
}
