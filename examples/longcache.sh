#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Asks the example model for numbers hidden in texts of 8192 to 65536 bytes, by plain attention, with selection, and
# with selection over coded keys and values: 20 that are alone in their text, and 27 that stand among eight others.
# Draws how many it finds over length and depth.
#
#     sh examples/longcache.sh [PROFILE]
#
# PROFILE is a calibrated profile of the model with unrotated keys, by default unrotated-12x.json beside the model.
# LENGTHS="8192 16384" asks for these lengths only. Builds in build-demo/ and leaves longcache.png and the answers
# (*.jsonl) there; those that are there already are not asked for again. The chart needs Python 3 with matplotlib.
# Takes two hours on two processors, of which 65536 tokens take three quarters.
set -eu
profile=${1:+$(realpath "$1")}
cd "$(dirname "$0")/.."
profile=${profile:-examples/models/needle-13m/unrotated-12x.json}
. tests/install-deps.sh

build=build-demo
install_missing gcc libc pkg-config meson ninja jansson openblas
[ -f "$build/build.ninja" ] || meson setup "$build" -Dtests=false >"$build.log"
meson compile -C "$build"

# ask NAME LENGTH OPTION..: alone-NAME-LENGTH.jsonl and among-NAME-LENGTH.jsonl
ask() {
    name=$1-$2 length=$2
    shift 2
    one "alone-$name" --same-text --items 20 --context "$length" "$@"
    one "among-$name" --together --distractors 8 --items 27 --context "$length" "$@"
}

one() {
    name=$1
    shift
    [ -s "$build/$name.jsonl" ] && return
    echo "$name"
    "$build/examples/needle/fkv-needle" --json "$@" >"$build/answers.part"
    mv "$build/answers.part" "$build/$name.jsonl"
}

for length in ${LENGTHS:-8192 16384 32768 65536}; do
    # Plain attention finds nothing beyond the window of 8192, and takes longest: once is enough.
    [ "$length" -gt 16384 ] || ask plain "$length" --chunk 512
    ask exact "$length" --longcache --index
    ask coded "$length" --longcache --profile "$profile"
done
python3 examples/longcache_chart.py "$build" "$build/longcache.png"
echo "The chart: $build/longcache.png"
