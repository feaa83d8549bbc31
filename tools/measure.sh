#!/usr/bin/env bash
# Benchmarks on a GPU machine, one after another, each within its own limit, results and output in one folder.
#
#   tools/measure.sh prepare ROUTING DATA   traces of recorded routing, and with a GPU the predictor, which takes a minute there
#   tools/measure.sh run DATA OUT ROW...    rows by name; `tools/measure.sh rows` lists them
#
# ROUTING is a folder for `expertflow trace import`. DATA and OUT are folders; DATA may lie on the machine from one call to the next.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD/src:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1

declare -A LIMIT COMMAND
row() { LIMIT[$1]=$2 COMMAND[$1]=$3; }
recorded='--trace $DATA/test.trace'
row first-g 90 "long_context.py --parts first --rows g/mxfp4/50% $recorded"
row first-g-25 60 "long_context.py --parts first --rows g/mxfp4/25% $recorded"
row first-g-bf16 110 "long_context.py --parts first --rows g/bf16 $recorded"
row first-q 110 "long_context.py --parts first --rows q/bf16 $recorded"
row stall 80 "long_context.py --parts stall --rows g/mxfp4/50% $recorded"
row prompt-bf16 150 "long_context.py --parts prompt --rows g/bf16 $recorded"
row arrivals 170 "serve_arrivals.py --turns 2 --requests 64"
row streams 150 "serve_streams.py --tokens 1024"
row sampling 70 "sampling.py --parts steps --batches 1,8,16"
row loading 120 "loading.py --shape g120 --repeats 1"
row engine-g 75 "engine_h100.py --shape g --formats mxfp4 --strategies plec --shares 0.5,0.25 --batches 1,4 $recorded --predictor \$DATA/predictor"
row engine-q30 170 "engine_h100.py --shape q30 --formats bf16 --strategies next-use --shares 12GiB --batches 16"
row tune 110 "tune_experts.py --deadline 85"
row plans 240 "plans.py"
row costs 120 "batch_invariant.py --parts costs"
row step-q30 120 "dense_step.py --shapes q30"
row tests 560 "-m pytest -q -n 12 --dist loadgroup -p no:cacheprovider -p no:benchmark tests"

prepare() {
    mkdir -p "$2"
    $PYTHON -m expertflow trace import "$1" --out "$2/all.trace" || return
    $PYTHON benchmarks/predictor_split.py "$2/all.trace" "$2/train.trace" "$2/test.trace" || return
    if command -v nvidia-smi >/dev/null; then $PYTHON -m expertflow train-predictor "$2/train.trace" --out "$2/predictor"; fi
}

run() {
    local DATA=$1 OUT=$2 name began given
    shift 2
    mkdir -p "$OUT"
    # results depend on the host: some hosts take three times as long as others
    $PYTHON -c 'import time; t = time.perf_counter(); [None for step in range(3_000_000)]; print(f"3 million steps of a Python loop: {time.perf_counter() - t:.2f} s")'
    for name in "$@"; do
        began=$SECONDS
        eval "given=(${COMMAND[$name]:?no such row: $name})"
        [[ ${given[0]} == -m ]] || given=("benchmarks/${given[0]}" "${given[@]:1}" --out "$OUT/$name.json")
        timeout "${LIMIT[$name]}" "$PYTHON" "${given[@]}" >"$OUT/$name.txt" 2>&1
        echo "== $name: exit code $?, $((SECONDS - began)) s"
        tail -n 12 "$OUT/$name.txt" | cut -c1-240
    done
}

case ${1:-} in
    prepare) prepare "${2:?the folder of recorded routing}" "${3:?a folder for traces}" ;;
    run) run "${@:2}" ;;
    rows) for name in "${!COMMAND[@]}"; do echo "$name: ${COMMAND[$name]}"; done | sort ;;
    *) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
