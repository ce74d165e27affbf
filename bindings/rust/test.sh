#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Usage: test.sh crates|style
# Runs cargo's tests of both crates, or checks the sources with rustfmt and clippy where they are there.
#
# Environment: FKV_LIB_DIR, the directory of libfkv.so; CARGO_TARGET_DIR, where cargo writes; CARGO, if
# not `cargo`; FKV_PRELOAD, a sanitizer's library for the test programs (the compiler runs without).
set -u
cd "$(dirname "$0")" || exit 1
cargo=${CARGO:-cargo}
unset CARGO # cargo sets its own for those that it starts
LD_LIBRARY_PATH=$FKV_LIB_DIR${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH
CARGO_TERM_COLOR=never
export CARGO_TERM_COLOR

count=0
failed=0

# report WHAT COMMAND...
report() {
    what=$1
    shift
    count=$((count + 1))
    if "$@" 2>&1; then
        echo "ok $count - $what"
    else
        failed=1
        echo "not ok $count - $what"
    fi
}

skip() {
    count=$((count + 1))
    echo "ok $count - $1 # SKIP it is not installed"
}

case $1 in
crates)
    if [ -n "${FKV_PRELOAD:-}" ]; then
        # cargo starts test programs through this; rustc's leaks would be reported otherwise.
        ASAN_OPTIONS=${ASAN_OPTIONS:+$ASAN_OPTIONS:}detect_leaks=0
        export ASAN_OPTIONS
        target=$("${RUSTC:-rustc}" -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
        export "CARGO_TARGET_${target}_RUNNER=env LD_PRELOAD=$FKV_PRELOAD"
    fi
    exec "$cargo" test --offline --locked --no-fail-fast
    ;;
style)
    if "$cargo" fmt --version >/dev/null 2>&1; then
        report rustfmt "$cargo" fmt --check
    else
        skip rustfmt
    fi
    if "$cargo" clippy --version >/dev/null 2>&1; then
        report clippy "$cargo" clippy --offline --locked --all-targets -- -D warnings
    else
        skip clippy
    fi
    exit $failed
    ;;
*)
    echo "usage: test.sh crates|style" >&2
    exit 2
    ;;
esac
