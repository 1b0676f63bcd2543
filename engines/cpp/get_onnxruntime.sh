#!/usr/bin/env bash
# Make a folder for ONNXRUNTIME_ROOT on Debian or Ubuntu: include/ from Debian's libonnxruntime-dev (headers only) and
# lib/ from the Python package `onnxruntime`, which has no headers.
#
#     get_onnxruntime.sh FOLDER [PYTHON] [SUITE]
#
# PYTHON has `onnxruntime` installed (default: python3); SUITE is a Debian release that has the package (default: trixie).
# The system's package lists and settings are not changed. The mirror is the one that apt is set up with.
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
target=$(realpath -m "$1")
python=${2:-python3}
suite=${3:-trixie}

library=$("$python" - <<'PYTHON'
import pathlib, sys
try:
    import onnxruntime
except ImportError:
    sys.exit("this Python has no onnxruntime: pip install onnxruntime")
found = sorted((pathlib.Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
if not found:
    sys.exit("this onnxruntime has no libonnxruntime.so")
print(found[0])
PYTHON
)

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mirror=$(apt-get indextargets --format '$(SITE)' | grep -m1 -E 'debian/?$') \
    || { echo "no Debian mirror is configured in apt; download a release of ONNX Runtime instead" >&2; exit 1; }
mkdir -p "$work"/{lists/partial,cache/archives/partial,etc,package}
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" >"$work/etc/sources.list"
apt=(apt-get -qq
    -o Dir::Etc::SourceList="$work/etc/sources.list" -o Dir::Etc::SourceParts=/dev/null
    -o Dir::Etc::PreferencesParts=/dev/null -o Dir::State::Lists="$work/lists" -o Dir::Cache="$work/cache"
    -o APT::Sandbox::User=root -o Acquire::Languages=none)
"${apt[@]}" update
(cd "$work/package" && "${apt[@]}" download libonnxruntime-dev)
dpkg-deb -x "$work"/package/libonnxruntime-dev_*.deb "$work/unpacked"

mkdir -p "$target/include" "$target/lib"
cp -r "$work/unpacked/usr/include/onnxruntime/." "$target/include/"
cp "$work/unpacked/usr/share/doc/libonnxruntime-dev/copyright" "$target/include/COPYRIGHT.onnxruntime"
# The Python package has the library under one name only; a linker and a loader need these names.
ln -sf "$library" "$target/lib/libonnxruntime.so.1"
ln -sf libonnxruntime.so.1 "$target/lib/libonnxruntime.so"
echo "$target: headers of API $(sed -n 's/^#define ORT_API_VERSION //p' "$target/include/onnxruntime_c_api.h"), library ${library##*/}"
