#!/bin/sh
# Test and measure on a machine with a GPU, in under nine minutes, without a network: compile the kernels, run the tests
# marked `cuda`, and measure the ops, the training step and the reading of data. A checkout is enough. It ends with one
# table.
#
#   OUT=DIR            folder for the output of each step; runs/gpu_check
#   PYTHON=PROGRAM     a Python with torch for CUDA, numpy, pillow, pytest, ninja, safetensors, click, tqdm; python3
#   SADDLE_WHEELS=DIR  folder with the wheels that launch/gpu_wheels.txt lists, if these packages are not installed
#
# Exit code: 0 if all steps passed; 1 if a step failed; 2 if there is no GPU.
set -u
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
case ${OUT:=runs/gpu_check} in /*) out=$OUT ;; *) out=$PWD/$OUT ;; esac
started=$(date +%s)
deadline=$((started + 525))
failed=0

found=$("$python" -c 'import torch; print("GPU" if torch.cuda.is_available() else f"torch {torch.__version__} sees none")' 2>&1 | tail -n 1)
if [ "$found" != GPU ]; then
    echo "gpu_check: no GPU to check on: ${found:-$python does not run}" >&2
    exit 2
fi
mkdir -p "$out" || exit 2
scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM
: > "$scratch/table"

export PYTHONPATH="$PWD:$scratch/wheels${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export SADDLE_OPS=compiled  # fail rather than measure the reference kernels in place of ours

# step NAME SECONDS PATTERN COMMAND...: run a command for at most SECONDS, with its output in NAME.txt; add its result and
# the last line of output that matches PATTERN to the table
step() {
    name=$1 limit=$2 pattern=$3
    shift 3
    begun=$(date +%s)
    left=$((deadline - begun))
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 1 ]; then
        code="no time left"
    else
        echo "gpu_check: $name, at most $limit s"
        # On SIGINT a benchmark shows what it has measured so far.
        timeout --signal=INT --kill-after=10 "$limit" "$@" > "$out/$name.txt" 2>&1
        code=$?
    fi
    case $code in
        0) result=ok ;;
        124) result="failed: took longer than $limit s" ;;
        *) result="failed: $code" ;;
    esac
    [ "$code" = 0 ] || failed=1
    line=$(grep -E "$pattern" "$out/$name.txt" 2>/dev/null | tail -n 1 | tr -s " ")
    printf '%-10s  %-34s  %4s s  %s\n' "$name" "$result" "$(($(date +%s) - begun))" "$line" >> "$scratch/table"
}

if [ -n "${SADDLE_WHEELS:-}" ]; then
    step wheels 60 '^Successfully|^ERROR|already satisfied' "$python" -m pip install --quiet --no-index --no-deps \
        --find-links "$SADDLE_WHEELS" --target "$scratch/wheels" -r launch/gpu_wheels.txt
fi
step build 150 '^ops(: ready|.build: error)' "$python" -m ops.build
# Only files with such tests are collected: others import packages that this machine may lack.
marked=$(grep -lE 'mark\.cuda|^from devices import' tests/test_*.py)
# shellcheck disable=SC2086 # a list of files
step tests 200 '[0-9]+ (passed|failed|error|deselected)|^no tests' "$python" -m pytest -m cuda -p no:cacheprovider $marked
step ops 330 '^every op on CUDA' "$python" -m launch.benchmark ops --device=cuda --repeats=5 --json="$out/ops.json"
step step 60 '^32 +32x32 +16 ' "$python" -m launch.benchmark step --gpus=1 --rounds=3 --json="$out/step.json"
step data 45 '^32x32 +loader' "$python" -m launch.benchmark data --resolution=32 --count=1000 --repeats=3 --json="$out/data.json"

{
    echo
    grep -m 1 ' kernels, malloc ' "$out/ops.txt" 2>/dev/null
    sed -n '/^summary /,$p' "$out/ops.txt" 2>/dev/null
    echo
    printf '%-10s  %-34s  %6s  %s\n' step result time "key figures"
    cat "$scratch/table"
    [ $failed = 0 ] && result=ok || result=failed
    printf '%-10s  %-34s  %4s s  %s\n' all "$result" "$(($(date +%s) - started))" "output of the steps: $out"
} > "$scratch/summary"
cat "$scratch/summary"
cp "$scratch/summary" "$out/summary.txt"
exit $failed
