#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Makes fkv-sys/src/bindings.rs from include/fkv/fkv.h, or compares the two.
#
#     regenerate.sh                         write bindings.rs; needs bindgen 0.60.1 and rustfmt
#     regenerate.sh --check [INCLUDE_DIR]   is bindings.rs what this header gives? needs bindgen only
#
# --check ends with 0 (equal), 1 (not equal) or 77 (there is no bindgen 0.60.1: other versions write
# otherwise). Debian bookworm's package bindgen is that version.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
bindings=$here/fkv-sys/src/bindings.rs
bindgen=${BINDGEN:-bindgen}

# The C types' names are those of std::os::raw: core::ffi has them only since Rust 1.64.
generate() { # INCLUDE_DIR OUTPUT
    "$bindgen" "$1/fkv/fkv.h" --output "$2" --no-rustfmt-bindings \
        --use-core --ctypes-prefix std::os::raw --size_t-is-usize \
        --no-prepend-enum-name --default-enum-style consts \
        --allowlist-function 'fkv_.*' --allowlist-type 'fkv_.*' --allowlist-var 'FKV_.*' \
        -- -I "$1"
}

# Without white space and trailing commas, so that no version of rustfmt matters; a line for each item.
normal() {
    tr -d ' \t\n' <"$1" | sed 's/,\([])}>]\)/\1/g; s/\([;{}]\)/\1\n/g'
}

case $("$bindgen" --version 2>/dev/null) in
*' 0.60.1') ;;
*)
    echo "skipped: there is no bindgen 0.60.1" >&2
    exit 77
    ;;
esac
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
if [ "${1:-}" = --check ]; then
    generate "${2:-$here/../../include}" "$work/new.rs"
    normal "$work/new.rs" >"$work/new"
    normal "$bindings" >"$work/old"
    if ! diff "$work/old" "$work/new" >"$work/diff"; then
        echo "fkv-sys/src/bindings.rs is not what the header gives; run regenerate.sh:" >&2
        head -n 20 "$work/diff" >&2
        exit 1
    fi
elif [ $# -eq 0 ]; then
    generate "$here/../../include" "$work/new.rs"
    rustfmt --config-path "$here/rustfmt.toml" --edition 2021 "$work/new.rs"
    cp "$work/new.rs" "$bindings"
else
    echo "usage: regenerate.sh [--check [INCLUDE_DIR]]" >&2
    exit 2
fi
