#!/bin/sh
# Everything that needs an NVIDIA GPU, in one command: the tests marked `gpu` and the benchmark. Leaves one file.
#
#     benchmarks/gpu.sh RESULTS.md [WORK] [arguments of benchmarks/gpu.py]
#
# WORK (a new temporary folder unless given) takes the full-size model: 4 GB. Needs higen[test] with torch for CUDA;
# with onnxruntime-gpu in place of onnxruntime the CUDA provider is tried as well, and with HIGEN_RUN=higen-run (built
# against it) the C++ runtime. A part that fails does not stop the others; the exit status says whether one did.
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
