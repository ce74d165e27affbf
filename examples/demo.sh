#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Asks a small language model for a number hidden in 8192 bytes of text, once with the keys and values
# held exactly and once as Fourier coefficients, and shows both beside each other. Builds in build-demo/;
# installs missing Debian packages if it may.
set -eu
cd "$(dirname "$0")/.."
. tests/install-deps.sh

build=build-demo
install_missing gcc libc pkg-config meson ninja jansson openblas

echo "Building libfkv and its example programs in $build/"
if [ ! -f "$build/build.ninja" ]; then
    rm -rf "$build"
    meson setup "$build" -Dtests=false >"$build.log" 2>&1 || {
        cat "$build.log" >&2
        exit 1
    }
    mv "$build.log" "$build/setup.log"
fi
meson compile -C "$build"

for profile in exact fourier; do
    printf '\nHolding the keys and values: %s\n' "$profile"
    "$build/examples/needle/fkv-needle" --context 8192 --items 1 --profile "$profile" --json \
        >"$build/$profile.json"
done

# value FILE KEY: of the first line, which is the item; strings keep their quotes
value() {
    awk -v key="\"$2\": " 'NR == 1 {
        if (!match($0, key "(\"([^\"\\\\]|\\\\.)*\"|[^,}]*)"))
            exit 1
        print substr($0, RSTART + length(key), RLENGTH - length(key))
    }' "$1"
}

# row TITLE KEY FORMAT: FORMAT is awk's, for numbers; strings are printed as they are
row() {
    exact=$(value "$build/exact.json" "$2")
    fourier=$(value "$build/fourier.json" "$2")
    E=$exact F=$fourier awk -v title="$1" -v format="$3" 'BEGIN {
        e = ENVIRON["E"]; f = ENVIRON["F"]
        if (format != "") { e = sprintf(format, e); f = sprintf(format, f) }
        printf "%-24s %14s %14s\n", title, e, f
    }'
}

echo
printf 'question: %s\n' "$(value "$build/exact.json" question)"
printf 'expected: %s\n\n' "$(value "$build/exact.json" expected)"
printf '%-24s %14s %14s\n' "" exact fourier
row "answer" answer ""
row "right" right ""
row "bytes of KV cache" kv_bytes "%.0f"
row "bytes as dense f16" dense_bytes "%.0f"
row "times smaller" ratio "%.2f"
row "prefill, seconds" prefill_s "%.2f"
row "decode, ms per token" decode_ms_per_token "%.2f"

if command -v gnuplot >/dev/null 2>&1; then
    cat >"$build/demo.gnuplot" <<END
set terminal png size 640,400
set output "$build/demo.png"
set title "KV cache of 8192 tokens"
set ylabel "MiB"
set yrange [0:*]
set boxwidth 0.6
set style fill solid 0.7
unset key
plot "-" using (\$0):(\$2 / 1048576):xtic(1) with boxes
"dense f16" $(value "$build/exact.json" dense_bytes)
"exact" $(value "$build/exact.json" kv_bytes)
"fourier" $(value "$build/fourier.json" kv_bytes)
e
END
    if gnuplot "$build/demo.gnuplot" >"$build/gnuplot.log" 2>&1; then
        printf '\nA chart of the bytes: %s\n' "$build/demo.png"
    else
        printf '\ngnuplot could not draw the chart: %s\n' "$build/gnuplot.log"
    fi
fi
