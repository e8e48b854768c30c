#!/bin/sh
# Everything that takes a GPU: builds the library for it, compares every kernel with the CPU, runs compute-sanitizer if there is one, measures,
# and prints a table. Takes some minutes.
#
#     tests/gpu/run.sh [--emulated] [--only PART ...] [--files NAME ...] [--tests EXPRESSION]
#
# PYTHON names an interpreter that has modelq (built with MODELQ_TESTING=1), pytest and ml_dtypes. --emulated runs the same without a GPU, by
# the library that g++ makes of the kernels, at sizes for that. Exit codes: 0 all is well, 1 something is not, 3 there is no GPU, 4 there is
# no nvcc.
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
if [ -z "$PYTHON" ]; then
    PYTHON=python3
    [ -x "$here/../../.venv/bin/python" ] && PYTHON=$here/../../.venv/bin/python
fi
exec "$PYTHON" "$here/run.py" "$@"
