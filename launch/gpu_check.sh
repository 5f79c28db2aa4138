#!/bin/sh
# Test and measure on a machine with a GPU, in five minutes, without a network: compile the kernels, run the tests marked
# `cuda`, measure training steps beside a plain loop and ops beside a copy, kill and resume runs, and train on photos. A
# checkout is enough. It ends with one table. Steps that find no time left are named there.
#
#   OUT=DIR            folder for the output of each step; runs/gpu_check
#   DATA=PATH          photos of 32x32 with classes to train on, as CIFAR-10's: an .lmdb, or what `saddle prepare` takes
#   PYTHON=PROGRAM     a Python with torch for CUDA, numpy, pillow, scikit-learn, pytest, ninja, safetensors, click, tqdm;
#                      python3
#   SADDLE_WHEELS=DIR  folder with the wheels that launch/gpu_wheels.txt lists, if these packages are not installed
#
# Exit code: 0 if all steps passed, whatever was measured; 1 if a step failed; 2 if there is no GPU.
set -u
started=$(date +%s)
deadline=$((started + 295)) # the table takes the rest
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
case ${OUT:=runs/gpu_check} in /*) out=$OUT ;; *) out=$PWD/$OUT ;; esac
data=${DATA:-}

found=$("$python" -c 'import torch; print("GPU" if torch.cuda.is_available() else f"torch {torch.__version__} sees none")' 2>&1 | tail -n 1)
if [ "$found" != GPU ]; then
    echo "gpu_check: no GPU to check on: ${found:-$python does not run}" >&2
    exit 2
fi
mkdir -p "$out" || exit 2
scratch=$(mktemp -d) || exit 2
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM

export PYTHONPATH="$PWD:$scratch/wheels${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 PYTHONUNBUFFERED=1
export SADDLE_OPS=compiled  # fail rather than measure the reference kernels in place of ours

# row STEP RESULT SECONDS FIGURES WANTED: one line of the table
row() {
    printf '%-46s  %-30s  %6s  %s%s\n' "$1" "$2" "$3" "$4" "${5:+; wanted $5}"
}

# wanted SIZE: what a step of that size is to reach, beside the plain loop
wanted() {
    case $1 in
        *busy) echo ">= 0.95" ;;
        "32x32, batch 256") echo 2.6 ;;
        "64x64, batch 128") echo 3.2 ;;
        "256x256, batch 32") echo 6.5 ;;
        "1024x1024, batch 8") echo 25 ;;
        "32x32, batch 32") echo 2.5 ;;
    esac | sed '/^>/!s/.*/>= & x, memory <= 0.55/'
}

# step NUMBER-NAME SECONDS PATTERN COMMAND...: run a command for at most SECONDS, with its output in NAME.txt, and leave
# its rows for the table in the file of that number: its result with the last line of output that matches PATTERN, and
# each line that begins with "in short, ". Steps may run side by side.
step() {
    rows=$scratch/$1.rows name=${1#*-} limit=$2 pattern=$3
    shift 3
    begun=$(date +%s)
    left=$((deadline - begun))
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 5 ]; then
        : > "$out/$name.txt"
        code="no time left"
    else
        echo "gpu_check: $name, at most $limit s"
        # On SIGINT a benchmark shows what it has measured so far.
        timeout --signal=INT --kill-after=5 "$limit" "$@" > "$out/$name.txt" 2>&1
        code=$?
    fi
    case $code in
        0 | 75) result=ok ;; # 75: training was stopped by a signal, with everything saved
        "no time left") result=$code ;;
        124) result="failed: took longer than $limit s" ;;
        *) result="failed: $code" ;;
    esac
    [ "$result" = ok ] || : > "$scratch/failed"
    line=$(grep -E "$pattern" "$out/$name.txt" | tail -n 1 | tr -s " " | cut -c 1-150)
    row "$name" "$result" "$(($(date +%s) - begun)) s" "$line" > "$rows"
    sed -n 's/^in short, //p' "$out/$name.txt" | while IFS= read -r line; do
        row "  ${line%%:*}" "" "" "${line#*: }" "$(wanted "${line%%:*}")"
    done >> "$rows"
}

if [ -n "${SADDLE_WHEELS:-}" ]; then
    step 1-wheels 40 '^Successfully|^ERROR|already satisfied' "$python" -m pip install --quiet --no-index --no-deps \
        --find-links "$SADDLE_WHEELS" --target "$scratch/wheels" -r launch/gpu_wheels.txt
fi
prepares=
case $data in
    "" | *.lmdb) ;;
    *)
        step 2-data 60 . "$python" -m launch.prepare "$data" "$scratch/photos.lmdb" --resolution=32 &
        prepares=$!
        data=$scratch/photos.lmdb
        ;;
esac
step 3-build 120 '^ops(: ready|.build: error)' "$python" -m ops.build
# Side by side, as what is right does not depend on what else runs. Only files with such tests are collected: others import
# packages that this machine may lack.
marked=$(grep -lE 'mark\.cuda|^from devices import' tests/test_*.py)
of_ops=$(echo "$marked" | grep -E 'test_(bias|conv|gradient|upfirdn|ops)')
of_rest=$(echo "$marked" | grep -vE 'test_(bias|conv|gradient|upfirdn|ops)')
counts='[0-9]+ (passed|failed|error|deselected)|^no tests'
# shellcheck disable=SC2086 # lists of files
step 4-tests-of-ops 90 "$counts" "$python" -m pytest -m cuda -p no:cacheprovider $of_ops &
ops=$!
# shellcheck disable=SC2086
step 4-tests-of-rest 90 "$counts" "$python" -m pytest -m cuda -p no:cacheprovider $of_rest &
rest=$!
step 7-resume 90 '^bit-equal|^gpu_resume: |Error' "$python" -m launch.gpu_resume "$scratch/resume"
wait "$ops" "$rest"
# The plain loop takes 2 to 4 seconds a step on an H100, and longer at 1024 pixels: hence one round, and that size last.
step 5-steps 110 '^note: |Error' "$python" -m launch.benchmark step --gpus=1 --preset=default --against=plain --rounds=1 \
    --at=32/256,256/32,64/128,32/32,1024/8 --set=precision.compute=bf16 --json="$out/steps.json"
step 6-ops 50 '^stopped|Error' "$python" -m launch.benchmark ops --device=cuda --against=copy --repeats=5 --json="$out/ops.json"
[ -z "$prepares" ] || wait "$prepares"
if [ -z "$data" ]; then
    row train skipped "" "DATA names no photos" > "$scratch/8-train.rows"
else
    seconds=$((deadline - $(date +%s) - 15)) # to save, and to make the grid
    [ "$seconds" -gt 120 ] && seconds=120
    [ "$seconds" -lt 1 ] && seconds=1
    # Both limits: a run that is asked to stop saves first.
    step 8-train "$((seconds + 12))" '^stopped|[Ee]rror' timeout --preserve-status --signal=INT "$seconds" \
        "$python" -m launch.train --data="$data" --outdir="$scratch/train" --preset=32 --cond=1 --kimg=100000 --tick=5 \
        --snap=1000 --set=growth.mode=none --set="growth.shares=[]"
    awk '/^tick / { for (i = 1; i < NF; i++) seen[$i] = $(i + 1) }
        END { if (seen["sec/kimg"] > 0) printf "%.0f img/s, loss/D %s, loss/G %s, kimg %s, grid.png\n",
            1000 / seen["sec/kimg"], seen["loss/D"], seen["loss/G"], seen["kimg"] }' "$out/train.txt" |
        while IFS= read -r line; do row "  photos, 32x32, batch 64" "" "" "$line"; done >> "$scratch/8-train.rows"
    grid=$(find "$scratch/train" -name 'fakes0*.png' 2>/dev/null | sort | tail -n 1)
    [ -z "$grid" ] || cp "$grid" "$out/grid.png"
fi

failed=0
[ ! -e "$scratch/failed" ] || failed=1
{
    echo
    grep -h -m 1 ' kernels, malloc ' "$out/ops.txt" 2>/dev/null
    row step result time figures
    cat "$scratch"/?-*.rows
    [ $failed = 0 ] && result=ok || result=failed
    row all "$result" "$(($(date +%s) - started)) s" "output of the steps: $out"
} > "$scratch/summary"
cat "$scratch/summary"
cp "$scratch/summary" "$out/summary.txt"
exit $failed
