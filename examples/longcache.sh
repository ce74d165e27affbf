#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Asks the example model for numbers hidden in texts of 8192 to 65536 bytes, 20 in each, by plain attention, with
# selection, and with selection over coded keys and values, and draws how many it finds over length and depth.
#
#     sh examples/longcache.sh [PROFILE]
#
# PROFILE is a calibrated profile of the model with unrotated keys (examples/models/needle-13m/calibrate.py --unrotated
# makes some); without it the third row is left out. Builds
# in build-demo/ and leaves longcache.png and the answers (*.jsonl) there; those that are there already are not
# asked for again. The chart needs Python 3 with matplotlib. Takes about an hour on two processors.
set -eu
profile=${1:+$(realpath "$1")}
cd "$(dirname "$0")/.."
. tests/install-deps.sh

build=build-demo
install_missing gcc libc pkg-config meson ninja jansson openblas
[ -f "$build/build.ninja" ] || meson setup "$build" -Dtests=false >"$build.log"
meson compile -C "$build"

# ask NAME LENGTH OPTION..
ask() {
    name=$1 length=$2
    shift 2
    [ -s "$build/$name-$length.jsonl" ] && return
    echo "$name, $length tokens"
    "$build/examples/needle/fkv-needle" --together --items 20 --context "$length" --json "$@" \
        >"$build/answers.part"
    mv "$build/answers.part" "$build/$name-$length.jsonl"
}

# Plain attention finds nothing beyond the window of 8192, and takes longest: once is enough.
for length in 8192 16384; do
    ask plain "$length" --chunk 512
done
for length in 8192 16384 32768 65536; do
    ask longcache "$length" --longcache
    [ -z "$profile" ] || ask coded "$length" --longcache --profile "$profile"
done
python3 examples/longcache_chart.py "$build" "$build/longcache.png"
echo "The chart: $build/longcache.png"
