# shellcheck shell=bash
# Sourced by quickstart, check and .ci/run, after `set -euo pipefail`. Defines:
#   ROOT         the project's folder, absolute
#   VENV         its virtual environment
#   say, die     one line on standard error; die also ends the script with 1
#   prepare X    make VENV if need be and install the package with extra X ("" for none) if need be

ROOT=$(CDPATH="" cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv

say() { printf '%s\n' "$*" >&2; }
die() {
    say "error: $*"
    exit 1
}

# True if $1 runs and is new enough. A name on PATH proves neither: it may be a version manager's shim.
is_usable_python() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# Prints the Python to build with: $PYTHON where it is set, or else the first that will do.
find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_usable_python "$PYTHON" || die "PYTHON=$PYTHON is not a Python >= 3.11 that runs"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11; do
        if is_usable_python "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    die "no Python >= 3.11 found; install one, or name it: PYTHON=/path/to/python3.12 $0"
}

# True if VENV's Python runs, is new enough, is VENV's own and has pip.
is_usable_venv() {
    is_usable_python "$VENV/bin/python" &&
        (cd / && "$VENV/bin/python" -c 'import pip, sys; sys.exit(sys.prefix == sys.base_prefix)') \
            >/dev/null 2>&1
}

make_venv() {
    local python described log
    if is_usable_venv; then
        return
    fi
    python=$(find_python)
    described=$("$python" -c 'import sys; print("Python %d.%d.%d, %s" % (*sys.version_info[:3], sys.executable))')
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        die "$described has no venv module; on Debian and Ubuntu: apt-get install python3-venv"
    if [ -e "$VENV" ] || [ -L "$VENV" ]; then
        # Only what is recognisably a virtual environment is emptied.
        [ -f "$VENV/pyvenv.cfg" ] || [ -L "$VENV/bin/python" ] ||
            die "$VENV is there and is no virtual environment; move it away"
        say "Making .venv anew with $described: it had no working Python >= 3.11 with pip."
    else
        say "Making .venv with $described."
    fi
    log=$(mktemp)
    if ! "$python" -m venv --clear "$VENV" >"$log" 2>&1; then
        tail -n 5 "$log" >&2
        die "could not make $VENV (whole log: $log)"
    fi
    rm -f "$log"
}

# What an installation depends on. The source is not among it: the installation is editable. The folder
# is: a tree that was copied or moved must not run the code of the place it came from.
fingerprint() {
    {
        printf '%s\n' "$VENV"
        "$VENV/bin/python" -c 'import sys; print(sys.version)'
        cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt"
    } | cksum
}

is_installed() {
    local extra now
    now=$(fingerprint)
    # The dev extra contains the test extra, and every extra contains the package.
    for extra in "$@"; do
        if [ "$(cat "$VENV/.installed-$extra" 2>/dev/null)" = "$now" ]; then
            return 0
        fi
    done
    return 1
}

prepare() {
    local extra=${1:-} name log what=lepton-fl
    name=${extra:-base}
    log=$VENV/install-$name.log
    make_venv
    case $name in
        base) is_installed base test dev && return ;;
        test) is_installed test dev && return ;;
        *) is_installed "$name" && return ;;
    esac
    [ -z "$extra" ] || what="lepton-fl[$extra]"
    say "Installing $what into .venv: minutes the first time (log: $log)."
    if ! (
        cd "$ROOT" &&
            "$VENV/bin/python" -m pip install --quiet --no-input --disable-pip-version-check \
                --constraint constraints.txt --editable ".${extra:+[$extra]}"
    ) >"$log" 2>&1 </dev/null; then
        tail -n 15 "$log" >&2
        die "pip could not install $what (whole log: $log)"
    fi
    # Last, so that an installation cut short is begun again.
    fingerprint >"$VENV/.installed-$name"
}
