#!/bin/sh
# Runs everything that needs an NVIDIA GPU: the tests marked `gpu` and the benchmark. Writes one file.
#
#     benchmarks/gpu.sh RESULTS.md [WORK] [arguments of benchmarks/gpu.py]
#
# WORK (a new temporary folder unless given) holds the full-size model: 4 GB. Needs higen[test] with torch for CUDA.
# With onnxruntime-gpu in place of onnxruntime the CUDA provider is tried too; with HIGEN_RUN=higen-run (built against
# onnxruntime-gpu) the C++ runtime too. A part that fails does not stop the others; then the exit status is not 0.
set -u
[ $# -ge 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
results=$1
shift
work=${1:-}
[ $# -eq 0 ] || shift
[ -n "$work" ] || { work=$(mktemp -d) && trap 'rm -rf "$work"' EXIT; }
here=$(cd "$(dirname "$0")" && pwd)
failed=0

part() {
    title=$1
    shift
    printf '\n# %s\n\n' "$title" | tee -a "$results"
    { "$@" 2>&1; echo $? >"$work/.status"; } | tee -a "$results"
    status=$(cat "$work/.status")
    [ "$status" -eq 0 ] || { failed=1; printf '\nFAILED: exit status %s\n' "$status" | tee -a "$results"; }
}

mkdir -p "$work"
: >"$results"
part "Tests" python3 -m pytest -m gpu -s -q --color=no -p no:cacheprovider "$here/../tests/gpu"
part "Benchmark" python3 "$here/gpu.py" "$work" "$@"
exit $failed
