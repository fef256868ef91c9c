#!/usr/bin/env bash
# Checks on a real GPU what the tests can only pretend: every branch that README and `instdisc doctor` call untested there.
#
#   tests/benchmarks/gpu.sh [FOLDER]        at most 8 minutes; FOLDER is gpu-checks by default
#
# Each part runs in a process of its own under a time limit of its own and leaves FOLDER/PART.json. Given again, the
# command goes on with the parts that have no result yet, or failed. Parts without their GPU or package are skipped, by
# name. Exit code: 0 if no part failed, 1 otherwise.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
export PYTHONPATH=.:tests/instdisc:${PYTHONPATH:-} OMP_WAIT_POLICY=PASSIVE
exec "$python" tests/benchmarks/gpu_checks.py --folder "${1:-gpu-checks}"
