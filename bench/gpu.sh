#!/usr/bin/env bash
# What only a GPU can show, in four stages that each fit into one short call:
#
#     bash bench/gpu.sh measure [DIR]    240 s: a smoke test, then the benchmark
#     bash bench/gpu.sh sweep [DIR]      180 s: `python -m bench sweep`, the launch's constants
#     bash bench/gpu.sh check [DIR]      240 s: the tests
#     bash bench/gpu.sh sanitize [DIR]   240 s: every kind of launch under compute-sanitizer
#
# DIR (bench/results without one) gets a log of each step, STAGE.txt with the environment and the
# outcome, and the figures: each is written as soon as it is there, the most telling first, so what
# stops a stage costs only the rest. A step that fails does not stop the next; the exit status is 0
# only if none failed. README.md beside this file says what takes how long.
#
# DEVICE=cpu rehearses a stage on a machine without a GPU.
set -u

readonly GRACE_SECONDS=15  # between the polite signal and the hard one
readonly SMOKE_SECONDS=60  # at most
readonly END_SECONDS=10    # for the workload in hand when a benchmark's time ends, and the tables

stage=${1:-}
case $stage in
  measure | check | sanitize) total=240 ;;
  sweep) total=180 ;;
  *)
    echo "usage: bash bench/gpu.sh measure|sweep|check|sanitize [DIR]" >&2
    exit 2
    ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
results=${2:-$root/bench/results}
mkdir -p "$results" && results=$(cd "$results" && pwd) || exit 2
cd "$root" || exit 2
unset PYTEST_ADDOPTS
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-$(command -v python3 || command -v python)}
device=${DEVICE:-cuda}
summary=$results/$stage.txt
table=()
failed=0

# left: the seconds in which a step that begins now must end, its grace included
left() {
  local seconds=$((total - SECONDS - GRACE_SECONDS))
  echo $((seconds > 1 ? seconds : 1))
}

# record NAME RESULT SECONDS: one line of the table that is printed last
record() {
  table+=("$(printf '%-12s %-20s %4s s' "$1" "$2" "$3")")
}

# step NAME LIMIT_SECONDS LINES COMMAND...: run under a limit, log it, show the log's last LINES.
# The signal is SIGINT, on which Python's programs tell what they have.
step() {
  local name=$1 limit=$2 lines=$3 began=$SECONDS status result=PASS
  shift 3
  printf '\n== %s (at most %s s): %s\n' "$name" "$limit" "${*##*/}"
  timeout --preserve-status --signal=INT --kill-after="$GRACE_SECONDS" "$limit" "$@" \
    >"$results/$name.log" 2>&1
  status=$?
  tail -n "$lines" "$results/$name.log"
  if ((SECONDS - began >= limit)); then
    result="FAIL (out of time)"
  elif ((status != 0)); then
    result="FAIL (status $status)"
  fi
  [[ $result == PASS ]] || failed=1
  record "$name" "$result" "$((SECONDS - began))"
}

# suite NAME LIMIT_SECONDS ARGUMENTS...: pytest, on all cores where pytest-xdist is installed.
# Compiling the kernel for each type and layout is most of the time: so tests are handed out a few at
# a time, in the order given. What fails is told at once: a suite that is stopped prints no report.
suite() {
  local name=$1 limit=$2 workers=()
  shift 2
  if "$python" -c "import xdist" 2>/dev/null; then
    workers=(-n "$(nproc)" --dist load --maxschedchunk 4)
  fi
  # A worker that compiles with torch.compile would start workers of its own for that.
  step "$name" "$limit" 30 env TORCHINDUCTOR_COMPILE_THREADS=1 \
    "$python" -m pytest -v --continue-on-collection-errors -p bench.told_at_once \
    "${workers[@]}" "$@"
}

# sanitizer TOOL LIMIT_SECONDS: one tool of compute-sanitizer over the tests that are marked for it
sanitizer() {
  local checker
  checker=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-}/bin/compute-sanitizer")
  if [[ -z $checker ]]; then
    printf '\n== %s: compute-sanitizer is not installed here, so this was NOT checked\n' "$1"
    record "$1" "FAIL (no tool)" 0
    failed=1
    return
  fi
  local options=(--tool "$1" --target-processes application-only --error-exitcode 9)
  # PyTorch asks the driver what may fail, and handles it.
  [[ $1 == memcheck ]] && options+=(--report-api-errors no)
  step "$1" "$2" 15 \
    "$checker" "${options[@]}" "$python" -m pytest -v -m sanitize tests/test_loss.py
}

measure() {
  suite smoke "$SMOKE_SECONDS" -m smoke tests/test_{loss,determinism,concurrency}.py
  step bench "$(left)" 300 \
    "$python" -m bench --device "$device" --out "$results" --limit $(($(left) - END_SECONDS))
}

sweep() {
  # Without a GPU the kernel runs in Triton's interpreter.
  [[ $device == cpu ]] && export TRITON_INTERPRET=1
  step sweep "$(left)" 300 \
    "$python" -m bench sweep --device "$device" --out "$results" --limit $(($(left) - END_SECONDS))
}

check() {
  # What takes longest and what has never run without a GPU come first. Types, machine code, faults
  # of Triton's, distributed training and the documents need no GPU.
  local files=(
    tests/test_special_values.py tests/test_properties.py tests/test_concurrency.py
    tests/test_determinism.py tests/test_loss.py tests/test_bench.py tests/test_export.py
  )
  local spared="typing codegen toolchain distributed documents" file
  for file in tests/test_*.py; do
    case " ${files[*]} $(printf 'tests/test_%s.py ' $spared)" in
      *" $file "*) ;;
      *) files+=("$file") ;;
    esac
  done
  suite pytest "$(left)" "${files[@]}"
}

sanitize() {
  sanitizer memcheck $(($(left) / 3))
  sanitizer racecheck $(($(left) / 2))
  sanitizer initcheck "$(left)"
}

{
  printf '== environment\n'
  if command -v nvidia-smi >/dev/null; then nvidia-smi; else echo "no nvidia-smi"; fi
  "$python" - "$device" <<'PYTHON'
import importlib.metadata as metadata
import platform
import sys

print("python", platform.python_version())
packages = "torch triton numpy pytest pytest-xdist hypothesis rich matplotlib scikit-learn flag-gems"
for package in packages.split():
    try:
        print(package, metadata.version(package))
    except metadata.PackageNotFoundError:
        print(package, "not installed")

import torch

if sys.argv[1] == "cuda":
    if not torch.cuda.is_available():
        sys.exit("bench/gpu.sh: PyTorch sees no CUDA device here (DEVICE=cpu rehearses)")
    print(torch.cuda.get_device_name(), "CUDA", torch.version.cuda)
PYTHON
} 2>&1 | tee "$summary"
((PIPESTATUS[0] == 0)) || exit 2

"$stage"

{
  printf '\n== %s on %s: %s s\n' "$stage" "$device" "$SECONDS"
  printf '%s\n' "${table[@]}"
  if ((failed)); then echo "FAIL"; else echo "PASS"; fi
} | tee -a "$summary"
exit "$failed"
