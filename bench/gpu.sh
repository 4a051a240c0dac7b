#!/usr/bin/env bash
# All checks and measurements that need a GPU, in one call of under nine minutes:
#
#     bash bench/gpu.sh [DIR]
#
# DIR (bench/results without one) gets a log per step, summary.txt, and the benchmark's JSON and
# PNG. A step that fails does not stop the next. The exit status is 0 only if none failed.
set -u

readonly TOTAL_SECONDS=515 # with the last step's grace below: under nine minutes
readonly GRACE_SECONDS=15  # between the polite signal and the hard one
readonly LEAST_SECONDS=60  # for the benchmark, which gets what the other steps leave

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
results=${1:-$root/bench/results}
mkdir -p "$results" && results=$(cd "$results" && pwd) || exit 2
cd "$root" || exit 2
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
python=${PYTHON:-$(command -v python3 || command -v python)}
summary=$results/summary.txt
table=()
failed=0

# record NAME RESULT SECONDS: one line of the table that is printed last
record() {
  table+=("$(printf '%-14s %-20s %4s s' "$1" "$2" "$3")")
}

# step NAME LIMIT_SECONDS LINES COMMAND...: run under a limit, log it, show the log's last LINES.
# The signal is SIGINT: on it, the benchmark writes what it has and exits with 130. That is part of
# the answer, and no failure.
step() {
  local name=$1 limit=$2 lines=$3 began=$SECONDS status result=PASS
  shift 3
  printf '\n== %s (at most %s s): %s\n' "$name" "$limit" "${*##*/}"
  timeout --preserve-status --signal=INT --kill-after="$GRACE_SECONDS" "$limit" "$@" \
    >"$results/$name.log" 2>&1
  status=$?
  tail -n "$lines" "$results/$name.log"
  if ((status == 130)) && [[ $name == bench ]]; then
    status=0 result="PART (out of time)"
  elif ((SECONDS - began >= limit)); then
    result="FAIL (timed out)"
  elif ((status != 0)); then
    result="FAIL (status $status)"
  fi
  ((status == 0)) || failed=1
  record "$name" "$result" "$((SECONDS - began))"
}

# sanitizer TOOL LIMIT_SECONDS: one tool of compute-sanitizer over the small run
sanitizer() {
  local checker
  checker=$(command -v compute-sanitizer || command -v "${CUDA_HOME:-}/bin/compute-sanitizer")
  if [[ -z $checker ]]; then
    printf '\n== %s: compute-sanitizer is not installed here, so this was NOT checked\n' "$1"
    record "$1" "SKIP (no tool)" 0
    return
  fi
  # Without the caching allocator each tensor is an allocation of its own, with guarded ends.
  step "$1" "$2" 15 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$checker" --tool "$1" \
    --target-processes application-only --error-exitcode 9 "$python" -m bench.sanitize
}

{
  printf '== environment\n'
  if command -v nvidia-smi >/dev/null; then nvidia-smi; else echo "no nvidia-smi"; fi
  "$python" - <<'PYTHON'
import importlib.metadata as metadata
import platform
import sys

print("python", platform.python_version())
for package in ("torch", "triton", "numpy", "pytest", "hypothesis", "rich", "matplotlib"):
    try:
        print(package, metadata.version(package))
    except metadata.PackageNotFoundError:
        print(package, "not installed")

import torch

if not torch.cuda.is_available():
    sys.exit("bench/gpu.sh: PyTorch sees no CUDA device here, so there is nothing to check")
print(torch.cuda.get_device_name(), "CUDA", torch.version.cuda)
PYTHON
} 2>&1 | tee "$summary"
((PIPESTATUS[0] == 0)) || exit 2

# Compiling the kernel for each type and layout is most of the suite's time on a GPU: it needs all
# cores, and tests that spread over them one by one. Types and machine code need no GPU.
workers=()
if "$python" -c "import xdist" 2>/dev/null; then workers=(-n "$(nproc)" --dist worksteal); fi
step pytest 200 25 "$python" -m pytest -q "${workers[@]}" \
  --ignore tests/test_typing.py --ignore tests/test_codegen.py
sanitizer memcheck 60
sanitizer racecheck 45
sanitizer initcheck 45
step determinism 40 15 "$python" -m bench.determinism
if "$python" -c "import torchvision" 2>/dev/null; then
  step torchvision 60 15 "$python" -m bench torchvision --out "$results"
fi
left=$((TOTAL_SECONDS - SECONDS))
step bench "$((left > LEAST_SECONDS ? left : LEAST_SECONDS))" 200 \
  "$python" -m bench --device cuda --out "$results"

{
  printf '\n== summary\n'
  printf '%s\n' "${table[@]}"
  if ((failed)); then echo "FAIL"; else echo "PASS"; fi
} | tee -a "$summary"
exit "$failed"
