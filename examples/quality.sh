#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What codings of the cache cost the example model: bits per byte of text, one of 61 keys, a passage of 160 bytes,
# each asked at 8192 tokens after everything was coded, for every profile below.
#
#     sh examples/quality.sh [TEXT [ITEMS]]
#
# TEXT is a plain text that the profiles were not calibrated on, of a megabyte or more; without it the project's own
# documents serve, which the calibrated profiles know. ITEMS questions of each task (default 16). Builds in build-demo/
# and leaves quality.md, quality.csv, quality.png and the answers (quality-*.jsonl) there; a task whose answers are
# there already is not asked again. The table and the chart need Python 3, the chart matplotlib. Takes about 8 minutes
# on two processors with 16 items: a text is read once for all profiles.
set -eu
text=${1:+$(realpath "$1")}
items=${2:-16}
cd "$(dirname "$0")/.."
. tests/install-deps.sh

build=build-demo
model=examples/models/needle-13m
install_missing gcc libc pkg-config meson ninja jansson openblas
[ -f "$build/build.ninja" ] || meson setup "$build" -Dtests=false >"$build.log"
meson compile -C "$build"

set -- exact fourier
for bits in 8 4 3 2; do
    set -- "$@" "uniform:$bits:64:unrotated" "uniform:$bits:64"
done
for profile in "$model"/calibrated-*.json "$model"/forward-*.json; do
    set -- "$@" "$profile"
done
for profile; do
    set -- "$@" --profile "$profile"
    shift
done
for task in text multikey copy; do
    answers=$build/quality-$task.jsonl
    if [ -s "$answers" ]; then
        echo "$answers is there; delete it to ask again"
        continue
    fi
    "$build/examples/needle/fkv-needle" ${text:+--text "$text"} --task "$task" --items "$items" --json "$@" \
        >"$build/quality.part"
    mv "$build/quality.part" "$answers"
done
python3 examples/quality_chart.py "$build"
