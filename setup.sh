# shellcheck shell=bash
# Prepares the machine and the virtual environment; sourced by itests and run-tests.
#
# set_up EXTRAS   returns at once when all is there. Otherwise, as root: installs the
#                 missing packages, makes .venv, installs the project into it with
#                 its EXTRAS ("" or "dev,docs"), and fetches the kernel for guests.
#                 With EXTRAS also what only the project's own tests need.
# PYTHON          the interpreter to make .venv with (python3; 3.11 or newer)

set -euo pipefail

# As in qubes_itests/exit_codes.py.
readonly NOT_ROOT=10 NO_LOOP_DEVICES=11 MISSING_TOOL=12 NO_NETWORK=15

root=$(cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")" && pwd)
table=$root/qubes_itests/host/packages.tsv
venv=$root/.venv
stamp=$venv/.set-up
# There while something is installed: whatever a kill leaves half made is made anew. A pip
# of which some files are there can be imported, and does not run.
unfinished=$venv/.unfinished
log=$root/build/setup.log
: "${PYTHON:=python3}" "${HOME:=/root}"
# A root shell that su opened may lack these.
export HOME PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

say() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
}

die() {
    local status=$1
    shift
    say "$*"
    exit "$status"
}

# logged STATUS SENTENCE COMMAND...: run quietly; a failure shows the log's end.
logged() {
    local status=$1 sentence=$2
    shift 2
    "$@" >>"$log" 2>&1 </dev/null && return
    tail -n 15 -- "$log" >&2
    die "$status" "$sentence (all of it: $log)"
}

require_root() {
    [ "$EUID" -eq 0 ] || die $NOT_ROOT "this must run as root, which mounts and" \
        "namespaces need. Run the same command with sudo."
}

require_loop_devices() {
    [ -c /dev/loop-control ] || modprobe loop 2>/dev/null || true
    { [ -c /dev/loop-control ] && : <>/dev/loop-control; } 2>/dev/null ||
        die $NO_LOOP_DEVICES "there are no loop devices here (/dev/loop-control)." \
            "Load them with: modprobe loop; a container must be given them."
}

# Which column of the table holds this system's packages.
distribution() {
    local ID='' ID_LIKE='' name
    # shellcheck source=/dev/null
    [ -r /etc/os-release ] && . /etc/os-release
    for name in $ID $ID_LIKE; do
        case $name in debian | ubuntu) echo "$name" && return ;; esac
    done
}

# present NEED EXTRAS: what only tests need is not missed where none are run.
present() {
    case $1 in
        tool:*) command -v -- "${1#*:}" >/dev/null ;;
        static:*) is_static "$(command -v -- "${1#*:}")" ;;
        file:*) compgen -G "${1#*:}" >/dev/null ;;
        guest:*) true ;;
        test:*) [ -z "$2" ] || command -v -- "${1#*:}" >/dev/null ;;
    esac
}

# A dynamic program names the linker that it wants in its first page.
is_static() {
    [ -n "$1" ] && ! head -c 4096 -- "$1" | grep -q -a -e '/ld-'
}

# find_missing DISTRIBUTION EXTRAS: fills the arrays missing (needs) and packages (what
# brings them here).
find_missing() {
    local need debian ubuntu package column=$1 extras=$2
    missing=() packages=()
    while IFS=$'\t' read -r need _ debian ubuntu; do
        [[ $need && $need != '#'* ]] || continue
        [ "$column" = ubuntu ] && package=$ubuntu || package=$debian
        present "$need" "$extras" || {
            missing+=("${need##*[:/]}")
            packages+=("$package")
        }
    done <"$table"
}

install_missing() {
    local column updated=yes extras=$1
    column=$(distribution)
    find_missing "$column" "$extras"
    [ ${#missing[@]} -gt 0 ] || return 0
    [ -n "$column" ] && command -v apt-get >/dev/null ||
        die $MISSING_TOOL "these are missing and must be installed: ${missing[*]}." \
            "Packages are known for Debian and Ubuntu only; in Debian:" "${packages[@]}"
    say "installing packages: ${packages[*]}"
    export DEBIAN_FRONTEND=noninteractive NEEDRESTART_SUSPEND=1
    local apt=(apt-get -q -y -o DPkg::Lock::Timeout=600 -o Dpkg::Use-Pty=0)
    "${apt[@]}" -o APT::Update::Error-Mode=any update >>"$log" 2>&1 || updated=no
    "${apt[@]}" install --no-install-recommends "${packages[@]}" \
        >>"$log" 2>&1 </dev/null || install_failed "$updated"
    find_missing "$column" "$extras"
    [ ${#missing[@]} -eq 0 ] ||
        die $MISSING_TOOL "still missing after their packages were installed:" \
            "${missing[*]}."
}

install_failed() {
    tail -n 15 -- "$log" >&2
    [ "$1" = yes ] || die $NO_NETWORK "missing: ${missing[*]}, and the package" \
        "archive cannot be reached. With a network, run this again (log: $log)."
    die $MISSING_TOOL "missing: ${missing[*]}, and apt-get cannot install" \
        "${packages[*]} (log: $log)."
}

make_venv() {
    local good='import sys, pip; sys.exit(sys.version_info < (3, 11))'
    if [ ! -e "$unfinished" ] && "$venv/bin/python" -c "$good" 2>/dev/null &&
        [[ $(cat "$venv/.made-with" 2>/dev/null || echo "$PYTHON") = "$PYTHON" ]]; then
        return
    fi
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        die $MISSING_TOOL "$PYTHON is not Python 3.11 or newer." \
            "Name one: PYTHON=/path/to/python3 $0"
    say "making .venv with $PYTHON"
    # its interpreter first: what is left of it by a kill must not pass for whole
    rm -rf -- "${venv:?}/bin" "$venv"
    mkdir -- "$venv"
    : >"$unfinished"
    logged $MISSING_TOOL "$PYTHON cannot make a virtual environment" \
        "$PYTHON" -m venv "$venv"
    echo "$PYTHON" >"$venv/.made-with"
}

# The bundled plugins are installed like any other, in place.
install_project() {
    say "installing the project and its Python dependencies"
    local plugin status=$MISSING_TOOL
    # qubes-storage is on no index: named beside the project that needs it.
    local pip=("$venv/bin/python" -m pip --disable-pip-version-check
        --no-input install --progress-bar off --editable "$root/storage"
        --editable "$root${1:+[$1]}")
    for plugin in "$root"/plugins/*/setup.py; do
        [ ! -e "$plugin" ] || pip+=(--editable "${plugin%/*}")
    done
    # Where its packages go is no matter of the user's settings; how they come is.
    local name settings=() unset=()
    for name in "${!PIP_@}" "${!PYTHON@}"; do unset+=(--unset="$name"); done
    mapfile -d '' settings < <("$venv/bin/python" -I \
        "$root/qubes_itests/host/pip_settings.py" "$venv/bin/python" 2>>"$log")
    : >"$unfinished"
    env "${unset[@]}" "${settings[@]}" "${pip[@]}" >>"$log" 2>&1 </dev/null &&
        rm -- "$unfinished" && return
    # what pip cannot do it undoes
    rm -- "$unfinished"
    tail -n 15 -- "$log" >&2
    ! tail -n 60 -- "$log" | grep -q -i -E \
        'connection|resolution|unreachable|timed out|no matching' ||
        status=$NO_NETWORK
    [ $status = $MISSING_TOOL ] || die $NO_NETWORK "the Python package index cannot" \
        "be reached. With a network, run this again (log: $log)."
    die $MISSING_TOOL "pip cannot install the project's dependencies (log: $log)."
}

kernel_present() {
    [ -n "${QUBES_ITESTS_KERNEL:-}" ] || compgen -G \
        "${QUBES_ITESTS_CACHE:-$HOME/.cache/qubes_itests}/kernel/*/boot/vmlinuz-*" \
        >/dev/null
}

fetch_kernel() {
    kernel_present && return
    say "fetching the kernel for guests"
    "$venv/bin/python" -P -m qubes_itests.host.kernel fetch >>"$log"
}

# What the set-up depends on, in one word.
inputs() {
    {
        cat -- "$root"/{setup.sh,setup.cfg,{,storage/}pyproject.toml} "$table" \
            "$root"/plugins/*/setup.py 2>/dev/null || true
        echo "$root" "$PYTHON" "$root"/plugins/*/setup.py
        readlink -f -- "$venv/bin/python"
    } | cksum
}

# is_set_up EXTRAS: the environment that the tests need also serves the runs.
is_set_up() {
    local done_for='' done_key=''
    [ -x "$venv/bin/python" ] && [ ! -e "$unfinished" ] && [ -r "$stamp" ] &&
        kernel_present || return 1
    { read -r done_key && read -r done_for; } <"$stamp" || true
    [[ $done_key = "$(inputs)" && ( $done_for = "$1" || -z $1 ) ]] || return 1
    find_missing "$(distribution)" "$1"
    [ ${#missing[@]} -eq 0 ]
}

set_up() {
    is_set_up "$1" && return
    require_root
    require_loop_devices
    mkdir -p -- "${log%/*}"
    # Two at once take turns; the second finds everything done.
    exec {lock}<"$root"
    flock "$lock"
    if ! is_set_up "$1"; then
        : >"$log"
        install_missing "$1"
        make_venv
        install_project "$1"
        fetch_kernel
        printf '%s\n' "$(inputs)" "$1" >"$stamp.new"
        mv -- "$stamp.new" "$stamp"
    fi
    exec {lock}<&-
}
