#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Usage: test.sh crates|link|style
# crates: cargo's tests of both crates. link: each way in which the build script finds the library, or
# says what to do. style: rustfmt and clippy, where they are there.
#
# Environment: FKV_LIB_DIR, the directory of libfkv.so; CARGO_TARGET_DIR, where cargo writes, in a folder
# for each so that they can run at the same time; CARGO, if not `cargo`; FKV_PRELOAD, a sanitizer's library
# for the test programs (the compiler runs without); FKV_PC_DIR, the directory of fkv.pc or
# fkv-uninstalled.pc, for link.
set -u
cd "$(dirname "$0")" || exit 1
cargo=${CARGO:-cargo}
unset CARGO # cargo sets its own for those that it starts
libdir=$FKV_LIB_DIR
LD_LIBRARY_PATH=$libdir${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_LIBRARY_PATH
CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target}/${1:-}
CARGO_TERM_COLOR=never
export CARGO_TARGET_DIR CARGO_TERM_COLOR

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

# An example, built and run with this environment: runs VARIABLE=VALUE...
runs() {
    env "$@" "$cargo" run --offline --locked --quiet --example first
}

# The same must fail with this text: explains TEXT VARIABLE=VALUE...
explains() {
    text=$1
    shift
    ! runs "$@" >"$log" 2>&1 && grep -F "$text" "$log"
}

case ${1:-} in
crates)
    if [ -n "${FKV_PRELOAD:-}" ]; then
        # cargo starts test programs through a runner, but only newer ones do so with doc tests: they are
        # left out.
        target=$("${RUSTC:-rustc}" -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
        export "CARGO_TARGET_${target}_RUNNER=env LD_PRELOAD=$FKV_PRELOAD"
        exec "$cargo" test --offline --locked --no-fail-fast --all-targets
    fi
    exec "$cargo" test --offline --locked --no-fail-fast
    ;;
link)
    unset FKV_LIB_DIR
    log=$(mktemp) || exit 1
    trap 'rm -f "$log"' EXIT
    report "FKV_LIB_DIR" runs FKV_LIB_DIR="$libdir"
    report "FKV_STATIC" runs FKV_LIB_DIR="$libdir" FKV_STATIC=1 LD_LIBRARY_PATH=
    report "pkg-config" runs PKG_CONFIG_PATH="$FKV_PC_DIR"
    report "a directory without the library" explains "there is no /nowhere/libfkv.so" \
        FKV_LIB_DIR=/nowhere
    report "a pkg-config that knows no fkv" explains "set FKV_LIB_DIR to the directory" \
        PKG_CONFIG_LIBDIR=/nowhere PKG_CONFIG_PATH=
    report "no pkg-config" explains "does not run" PKG_CONFIG=/nowhere/pkg-config
    exit $failed
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
    echo "usage: test.sh crates|link|style" >&2
    exit 2
    ;;
esac
