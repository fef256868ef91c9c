#!/usr/bin/env bash
# Checks on a real GPU what the tests can only pretend: every branch that README and `instdisc doctor` call untested there.
#
#   tests/benchmarks/gpu.sh [FOLDER]        at most 8 minutes; FOLDER is gpu-checks by default
#
# Each part runs in a process of its own under a time limit of its own and leaves FOLDER/PART.json. Given again, the
# command goes on with the parts that have no result yet, or failed. Parts without their GPU or package are skipped, by
# name. Exit code: 0 if no part failed, 1 otherwise.
set -uo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-gpu-checks}
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
mkdir -p "$folder"
export PYTHONPATH=.:tests/instdisc:${PYTHONPATH:-} OMP_WAIT_POLICY=PASSIVE

end_s=$((SECONDS + 480))
"$python" tests/benchmarks/gpu_checks.py --list | while read -r part limit_s; do
    left_s=$((end_s - SECONDS))
    if [ "$left_s" -lt 10 ]; then
        echo "$part: not started, the 8 minutes are over; give the command again"
        continue
    fi
    [ "$limit_s" -lt "$left_s" ] || limit_s=$left_s
    "$python" tests/benchmarks/gpu_checks.py "$part" --folder "$folder" --limit-s "$limit_s"
done
"$python" tests/benchmarks/gpu_checks.py --summary --folder "$folder"
